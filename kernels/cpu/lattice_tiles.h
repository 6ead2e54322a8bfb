// Pass 1 of building a lattice: the box is cut into tiles, and the simplex of every voxel in each
// tile is found. A tile is a brick of space, whose voxels share most vertices: these have 16-bit
// numbers, and splatted values fit into a small buffer.
#pragma once

#include "cpu/lattice_build.h"
#include "cpu/lattice_keys.h"

namespace crf {
// A Lattice whose tiles are filled in, and the keys of its vertices. A tile's vertices are its
// *records*: a vertex of several tiles has one in each, and they are numbered tile after tile.
template <class Key>
struct LatticeTiles : Lattice {
    std::vector<std::vector<Key>> keys;  // of each tile's vertices, by first touch
    int64_t num_records = 0;
};

// Throws CapacityError if 32 bits cannot number the records.
template <class Key>
LatticeTiles<Key> embed_tiles(const BilateralInput& input, const LatticeGeometry& geometry,
                              const KeySpace<Key>& space, ThreadPool& pool);

// Distinct vertices per voxel in about this many tiles, spread over the volume.
template <class Key>
double sample_vertices_per_voxel(const BilateralInput& input, const LatticeGeometry& geometry,
                                 const KeySpace<Key>& space, int64_t num_samples);
}  // namespace crf
