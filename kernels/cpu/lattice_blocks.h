// Pass 2 of building a lattice: records (vertices as the tiles number them) are sorted into blocks.
//
// A vertex's last coordinates, one per axis, depend only on position; boxes of these coordinates divide space into blocks. All records
// of one vertex are in one block, so from here on blocks are independent. Their tables stay in the L1 or L2 cache, and nearby vertices
// get nearby numbers, which determines the speed of blurring.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/lattice_tiles.h"

namespace crf {

// The block of a key: some bits of the coordinates that depend on position, and what each of their values adds to the block's number.
struct BlockLayout {
    int num_axes = 0;
    int shift[kMaxAxes]{};
    uint64_t mask[kMaxAxes]{};
    std::vector<uint32_t> place[kMaxAxes];
    int64_t num_blocks = 0;

    template <class Key>
    int64_t block_of(Key key) const {
        int64_t block = 0;
        for (int a = 0; a < num_axes; ++a) block += place[a][static_cast<uint64_t>(key >> shift[a]) & mask[a]];
        return block;
    }
};

BlockLayout lay_out_blocks(const KeyLayout& keys, const Voxels& voxels);

// Records by block, and in the order of the tiles within each block.
template <class Key>
struct BlockRecords {
    std::vector<uint32_t> block_begin;  // first of each block, and the end
    Buffer<Key> keys;
    Buffer<uint32_t> record;  // its number among the tiles' records
};

// Frees the tiles' keys.
template <class Key>
BlockRecords<Key> sort_by_block(LatticeTiles<Key>& tiles, const BlockLayout& layout, ThreadPool& pool);

// Calls body(block, thread) for every block. Most blocks are small: a thread takes several at a time.
template <class Body>
void for_blocks(int64_t num_blocks, ThreadPool& pool, Body&& body) {
    constexpr int64_t kGroup = 16;
    pool.run((num_blocks + kGroup - 1) / kGroup, [&](int64_t group, int thread) {
        for (int64_t b = group * kGroup; b < std::min((group + 1) * kGroup, num_blocks); ++b) body(b, thread);
    });
}

}  // namespace crf
