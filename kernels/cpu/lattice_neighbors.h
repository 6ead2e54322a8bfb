// Pass 4 of building a lattice: the next vertex along each direction, as chains of vertices or of lists.
#pragma once

#include <vector>

#include "cpu/lattice_vertices.h"

namespace crf {

// The members of a Lattice with these names.
struct LatticeNeighbors {
    Buffer<uint32_t> first_of_list;
    int64_t longest_list = 0;
    std::vector<Lattice::Chains> directions;
    int num_local = 0;
};

// of_lists: whether chains are to be of lists.
template <class Key>
LatticeNeighbors find_neighbors(const LatticeVertices<Key>& vertices, const VertexOrder<Key>& order, const BlockLayout& layout,
                                const KeySpace<Key>& space, bool of_lists, ThreadPool& pool);

}  // namespace crf
