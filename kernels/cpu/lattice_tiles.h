// Pass 1 of building a lattice: the box is cut into tiles, and the simplex of every voxel in each tile is found.
//
// A tile is a brick of space, so that its voxels share most of their vertices: its vertices are numbered in 16 bits, and its splatted
// values fit into one small buffer.
#pragma once

#include <vector>

#include "cpu/lattice_build.h"
#include "cpu/lattice_keys.h"

namespace crf {

// Consecutive voxels of a row within one tile, ready for the geometry.
struct TilePiece {
    int64_t voxel, grid;  // of the first: compact index, and linear index in the whole grid
    int32_t length;
    int32_t coordinate[kMaxAxes];  // of the first, in the box
};

struct TileVoxels {
    std::vector<TilePiece> pieces;     // tile after tile
    std::vector<int64_t> first_piece;  // of each tile, and the end

    int64_t num_tiles() const { return static_cast<int64_t>(first_piece.size()) - 1; }
};

// Cuts the box into bricks of at most this many voxels and assigns the runs to them; bricks without voxels are dropped.
TileVoxels cut_into_tiles(const Voxels& voxels, int64_t most_voxels);

// The members of a Lattice with these names, and the keys of its vertices. A tile's vertices are its *records*: a vertex of
// several tiles has one in each, and they are numbered tile after tile.
template <class Key>
struct LatticeTiles {
    std::vector<Lattice::Piece> pieces;
    std::vector<Lattice::Tile> tiles;
    Buffer<uint16_t> local, weight;
    std::vector<std::vector<Key>> keys;  // of each tile's vertices, by first touch
    int64_t num_records = 0;
    int64_t largest_tile = 0;
};

// Throws CapacityError if 32 bits cannot number the records.
template <class Key>
LatticeTiles<Key> embed_tiles(const BilateralInput& input, const LatticeGeometry& geometry, const KeySpace<Key>& space, ThreadPool& pool);

// Distinct vertices per voxel in about this many tiles, spread over the volume.
template <class Key>
double sample_vertices_per_voxel(const BilateralInput& input, const LatticeGeometry& geometry, const KeySpace<Key>& space,
                                 int64_t num_samples);

}  // namespace crf
