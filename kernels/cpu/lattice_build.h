// The permutohedral lattice of one image: its vertices, the voxels' links to them, and the
// neighbors of each vertex. Five passes build it, each in parallel and with the same result for any
// number of threads: the simplex of every voxel, and each tile's own list of vertices
// (lattice_tiles.h); the tiles' vertices sorted into blocks of space; duplicates merged and
// vertices numbered, block by block (lattice_vertices.h); the neighbors along each direction
// (lattice_build.cpp); the place of each tile's share.
#pragma once

#include "cpu/filter.h"
#include "cpu/lattice_keys.h"

namespace crf {
struct Lattice {
    // Most voxels of a tile, a brick of the box. A tile is splatted into one small buffer, whose
    // vertices are numbered in 16 bits.
    static constexpr int64_t tile_voxels(int num_features) {
        return num_features < 16 ? 4096 : 2048;
    }

    // Consecutive compact voxels of a tile.
    struct Piece {
        int64_t voxel;
        int32_t length;
    };
    struct Tile {
        int64_t first_piece, num_pieces;
        int64_t first_entry;  // its first voxel in `local` and `weight`, in units of D + 1
        int64_t num_voxels = 0;
        int64_t first_vertex;  // its first entry of `slot`
        int64_t num_vertices;
    };

    int num_features = 0;  // D of the lattice: at least that of the image
    int64_t num_vertices = 0;
    int64_t largest_tile = 0;  // vertices of the largest tile
    std::vector<Piece> pieces;
    std::vector<Tile> tiles;
    // For each voxel, in tile order: its D + 1 vertices as numbers within the tile, and their
    // barycentric weights in 1 / 65535. A tile's voxels come in batches of sixteen: (batch, D + 1,
    // 16), where the last batch is filled up.
    Buffer<uint16_t> local, weight;
    // For each tile's vertices: the slot of the tile's share of it. The first tile's is the
    // vertex's own number; further tiles' are consecutive and not below num_vertices. They are
    // added to the first before blurring, and get copies of it before slicing.
    Buffer<uint32_t> slot;
    // A vertex of several tiles, and the slots of all but the first.
    struct Shared {
        uint32_t vertex, first_slot, num_slots;
    };
    std::vector<Shared> shared;
    // Along one direction the lists of vertices, by which these are numbered (VertexOrder), form
    // chains: a step takes a list's vertices to those of one other list and keeps their order. Two
    // bits per vertex tell which ones have neighbors: the i-th vertex of a list that has one after
    // it is followed by the i-th vertex of the next list that has one before it.
    struct Chains {
        // Chain after chain, each entry a list's number times two, plus one at the end of its
        // chain; a list without neighbors is left out.
        Buffer<uint32_t> entries;
        // possible cuts for parallel work: beginnings of chains, and the end
        std::vector<int64_t> pieces;
        // a bit per vertex: whether it has a neighbor on that side; padded for reading whole words
        Buffer<uint8_t> after, before;
    };
    std::vector<Chains> directions;  // D + 1 of them
    // The first directions whose pieces are independent of one another: a piece of one has the
    // vertices of the same piece of another, so that a piece can be blurred along all of them while
    // it is in the cache.
    int num_local = 0;
    Buffer<uint32_t> first_of_list;  // the first vertex of each list, and the end
    int64_t longest_list = 0;        // vertices of the longest list
};

// Pieces are short and far apart, so the hardware cannot predict them: the numbers of the piece
// this many places ahead are prefetched.
constexpr int64_t kPiecesAhead = 12;

// Throws CapacityError if the features span more cells than a 128-bit key can number.
Lattice build_lattice(const KernelInput& input, ThreadPool& pool);

// Whether the features fit into the keys of a lattice.
bool fits_lattice(const KernelInput& input);

// Vertices per voxel, estimated from a few tiles; a lattice's cost depends on it. Infinite if no
// lattice can be built.
double estimate_vertices_per_voxel(const KernelInput& input);
}  // namespace crf
