// Pass 4 of building a lattice: the next vertex along each direction, as chains.
#pragma once

#include <vector>

#include "cpu/lattice_vertices.h"

namespace crf {

template <class Key>
std::vector<Lattice::Chains> find_neighbors(const LatticeVertices<Key>& vertices, const BlockLayout& layout, const KeySpace<Key>& space,
                                            ThreadPool& pool);

}  // namespace crf
