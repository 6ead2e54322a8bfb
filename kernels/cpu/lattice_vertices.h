// Pass 3 of building a lattice: in each block the records of one key become one vertex.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/errors.h"
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
LatticeVertices<Key> number_vertices(BlockRecords<Key>& records, const VertexOrder<Key>& order, ThreadPool& pool) {
    const int64_t num_blocks = static_cast<int64_t>(records.block_begin.size()) - 1;
    LatticeVertices<Key> result;
    result.blocks.resize(num_blocks);
    result.number = Buffer<uint32_t>(records.keys.size);
    struct Scratch {
        KeySorter<Key> sorter;
        std::vector<Key> unique;
    };
    std::vector<Scratch> scratch(pool.num_threads());
    // A block's keys move to its front, one per vertex.
    for_blocks(num_blocks, pool, [&](int64_t b, int thread) {
        const uint32_t begin = records.block_begin[b], end = records.block_begin[b + 1];
        if (begin == end) return;
        auto& [sorter, unique] = scratch[thread];
        sorter.items.resize(end - begin);
        for (uint32_t i = begin; i < end; ++i) sorter.items[i - begin] = {order.rank_of(records.keys[i]), i};
        sorter.sort();
        unique.resize(end - begin);
        uint32_t number = 0;
        Key last = sorter.items.front().rank;
        for (const auto& [rank, record] : sorter.items) {
            number += rank != last;
            last = rank;
            unique[number] = records.keys[record];
            result.number[record] = number;
        }
        std::copy_n(unique.begin(), number + 1, records.keys.get() + begin);
        result.blocks[b].num_vertices = number + 1;
    });
    for (auto& block : result.blocks) {
        block.first_vertex = static_cast<uint32_t>(result.num_vertices);
        result.num_vertices += block.num_vertices;
    }
    if (result.num_vertices > int64_t{0x7ffffff0}) throw CapacityError("the lattice would have more than 2^31 vertices");
    result.keys = Buffer<Key>(result.num_vertices);
    for (int64_t b = 0; b < num_blocks; ++b)
        std::copy_n(records.keys.get() + records.block_begin[b], result.blocks[b].num_vertices,
                    result.keys.get() + result.blocks[b].first_vertex);
    records.keys = Buffer<Key>();
    return result;
}

}  // namespace crf
