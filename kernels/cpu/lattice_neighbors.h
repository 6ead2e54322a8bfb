// Pass 4 of building a lattice: the next vertex along each direction, as chains.
#pragma once

#include <vector>

#include "cpu/lattice_vertices.h"

namespace crf {

// The members of a Lattice with these names.
struct LatticeNeighbors {
    std::vector<Lattice::Chains> directions;
    int num_local = 0;
};

template <class Key>
LatticeNeighbors find_neighbors(const LatticeVertices<Key>& vertices, const VertexOrder<Key>& order, const BlockLayout& layout,
                                const KeySpace<Key>& space, ThreadPool& pool);

}  // namespace crf
