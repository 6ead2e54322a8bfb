// Pass 3 of building a lattice: in each block the records of one key become one vertex.
#pragma once

#include <vector>

#include "cpu/lattice_blocks.h"
#include "cpu/vertex_order.h"

namespace crf {

template <class Key>
struct LatticeVertices {
    struct Block {
        uint32_t first_vertex = 0, num_vertices = 0;
    };
    std::vector<Block> blocks;
    Buffer<Key> keys;         // of each vertex, block after block and in their order (vertex_order.h) within a block
    Buffer<uint32_t> number;  // of each sorted record's vertex within its block
    int64_t num_vertices = 0;
};

// Frees the records' keys. Throws CapacityError if 31 bits cannot number the vertices.
template <class Key>
LatticeVertices<Key> number_vertices(BlockRecords<Key>& records, const VertexOrder<Key>& order, ThreadPool& pool);

}  // namespace crf
