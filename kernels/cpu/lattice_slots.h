// Pass 5 of building a lattice: the place of each tile's share of a vertex.
#pragma once

#include <vector>

#include "cpu/lattice_vertices.h"

namespace crf {

// The members of a Lattice with these names.
struct LatticeSlots {
    Buffer<uint32_t> slot;
    std::vector<Lattice::Shared> shared;
    int64_t num_slots = 0;
};

// Throws CapacityError if 32 bits cannot number the slots.
template <class Key>
LatticeSlots assign_slots(const BlockRecords<Key>& records, const LatticeVertices<Key>& vertices, ThreadPool& pool);

}  // namespace crf
