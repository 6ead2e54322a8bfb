// Pass 5 of building a lattice: the place of each tile's share of a vertex.
#pragma once

#include <vector>

#include "cpu/errors.h"
#include "cpu/lattice_vertices.h"

namespace crf {

// The members of a Lattice with these names.
struct LatticeSlots {
    Buffer<uint32_t> slot;
    std::vector<Lattice::Shared> shared;
    int64_t num_slots = 0;
};

// Within a block the records are in tile order, so the order in which shares are summed is fixed. Throws CapacityError if 32 bits cannot
// number the slots.
template <class Key>
LatticeSlots assign_slots(const BlockRecords<Key>& records, const LatticeVertices<Key>& vertices, ThreadPool& pool) {
    const int64_t num_blocks = static_cast<int64_t>(vertices.blocks.size());
    const auto& begin = records.block_begin;
    std::vector<std::vector<uint32_t>> shares(pool.num_threads()), further(pool.num_threads());  // of each vertex of a block
    auto count_shares = [&](int64_t b, std::vector<uint32_t>& count) {
        count.assign(vertices.blocks[b].num_vertices, 0);
        for (uint32_t i = begin[b]; i < begin[b + 1]; ++i) ++count[vertices.number[i]];
    };
    // First the sizes of all blocks, then the resulting places.
    std::vector<uint32_t> first_slot(num_blocks), first_shared(num_blocks);
    for_blocks(num_blocks, pool, [&](int64_t b, int thread) {
        count_shares(b, shares[thread]);
        for (uint32_t n : shares[thread]) {
            first_slot[b] += n - 1;
            first_shared[b] += n > 1;
        }
    });
    int64_t slots = vertices.num_vertices;
    uint32_t shared = 0;
    for (int64_t b = 0; b < num_blocks; ++b) {
        const uint32_t in_block = first_slot[b], shared_in_block = first_shared[b];
        first_slot[b] = static_cast<uint32_t>(slots);
        first_shared[b] = shared;
        slots += in_block;
        shared += shared_in_block;
    }
    if (slots > int64_t{0xfffffff0}) throw CapacityError("the lattice would need more than 2^32 slots");
    LatticeSlots result;
    result.slot = Buffer<uint32_t>(records.record.size);
    result.num_slots = slots;
    result.shared.resize(shared);
    for_blocks(num_blocks, pool, [&](int64_t b, int thread) {
        const uint32_t first_vertex = vertices.blocks[b].first_vertex;
        std::vector<uint32_t>& next = shares[thread];
        count_shares(b, next);
        std::vector<uint32_t>& after_first = further[thread];
        after_first.resize(next.size());
        uint32_t slot = first_slot[b], s = first_shared[b];
        for (uint32_t n = 0; n < next.size(); ++n) {
            const uint32_t vertex = first_vertex + n, others = next[n] - 1;
            next[n] = vertex;
            after_first[n] = slot;
            if (others > 0) result.shared[s++] = {vertex, slot, others};
            slot += others;
        }
        for (uint32_t i = begin[b]; i < begin[b + 1]; ++i) {
            const uint32_t n = vertices.number[i], own = next[n];
            result.slot[records.record[i]] = own;
            next[n] = own < vertices.num_vertices ? after_first[n] : own + 1;
        }
    });
    return result;
}

}  // namespace crf
