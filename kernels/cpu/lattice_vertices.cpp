#include "cpu/lattice_vertices.h"

#include "cpu/errors.h"
#include "cpu/key_table.h"

namespace crf {

template <class Key>
LatticeVertices<Key> number_vertices(BlockRecords<Key>& records, ThreadPool& pool) {
    const int64_t num_blocks = static_cast<int64_t>(records.block_begin.size()) - 1;
    LatticeVertices<Key> result;
    result.blocks.resize(num_blocks);
    result.number = Buffer<uint32_t>(records.keys.size);
    std::vector<KeyTable<Key>> tables(pool.num_threads());
    // A block's keys move to its front, one per vertex.
    for_blocks(num_blocks, pool, [&](int64_t b, int thread) {
        const uint32_t begin = records.block_begin[b], end = records.block_begin[b + 1];
        if (begin == end) return;
        KeyTable<Key>& table = tables[thread];
        for (uint32_t i = begin; i < end; ++i) result.number[i] = table.find_or_add(records.keys[i]);
        const std::vector<Key> unique = table.take();
        std::copy(unique.begin(), unique.end(), records.keys.get() + begin);
        result.blocks[b].num_vertices = static_cast<uint32_t>(unique.size());
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

template LatticeVertices<uint64_t> number_vertices(BlockRecords<uint64_t>&, ThreadPool&);
template LatticeVertices<WideKey> number_vertices(BlockRecords<WideKey>&, ThreadPool&);

}  // namespace crf
