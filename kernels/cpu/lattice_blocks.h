// Pass 2 of building a lattice: records (vertices as the tiles number them) are sorted into blocks.
//
// A vertex's last coordinates, one per axis, depend only on position; boxes of these coordinates divide space into blocks. All records
// of one vertex are in one block, so from here on blocks are independent. Their tables stay in the L1 or L2 cache, and nearby vertices
// get nearby numbers, which determines the speed of blurring.
#pragma once

#include <algorithm>
#include <cmath>
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

// Records by block, and in the order of the tiles within each block.
template <class Key>
struct BlockRecords {
    std::vector<uint32_t> block_begin;  // first of each block, and the end
    Buffer<Key> keys;
    Buffer<uint32_t> record;  // its number among the tiles' records
};

// Calls body(block, thread) for every block. Most blocks are small: a thread takes several at a time.
template <class Body>
void for_blocks(int64_t num_blocks, ThreadPool& pool, Body&& body) {
    constexpr int64_t kGroup = 16;
    pool.run((num_blocks + kGroup - 1) / kGroup, [&](int64_t group, int thread) {
        for (int64_t b = group * kGroup; b < std::min((group + 1) * kGroup, num_blocks); ++b) body(b, thread);
    });
}

// Most blocks, and fewest voxels per block: most of a block's cost is its list, even if it is empty.
constexpr double kFewBlocks = 4096, kVoxelsPerBlock = 32;

// Tiles are divided into this many groups that count and write independently. Each needs a counter per block.
constexpr int64_t kTileGroups = 16;

inline BlockLayout lay_out_blocks(const KeyLayout& keys, const Voxels& voxels) {
    BlockLayout layout;
    layout.num_axes = voxels.num_axes;
    const int d = keys.num_features;
    const double most = std::max(kFewBlocks, static_cast<double>(voxels.num_voxels) / kVoxelsPerBlock);
    // The lowest bits of each coordinate are dropped until there are few enough blocks.
    int coarser = 0;
    double blocks = 0;
    do {
        blocks = 1;
        for (int a = 0; a < layout.num_axes; ++a) blocks *= std::ldexp(1.0, std::max(0, keys.width[d - a] - coarser));
        if (blocks > most) ++coarser;
    } while (blocks > most);
    layout.num_blocks = static_cast<int64_t>(blocks);
    int bits[kMaxAxes], most_bits = 0;
    for (int a = 0; a < layout.num_axes; ++a) {
        const int i = d - a;
        bits[a] = std::max(0, keys.width[i] - coarser);
        most_bits = std::max(most_bits, bits[a]);
        layout.shift[a] = keys.shift[i] + std::min(coarser, keys.width[i]);
        layout.mask[a] = (uint64_t{1} << bits[a]) - 1;
        layout.place[a].assign(layout.mask[a] + 1, 0);
    }
    // Blocks are numbered along a Morton curve: blocks that are near in space, with their vertices, are near in memory.
    int target = 0;
    for (int bit = 0; bit < most_bits; ++bit)
        for (int a = 0; a < layout.num_axes; ++a) {
            if (bit >= bits[a]) continue;
            for (uint64_t value = 0; value <= layout.mask[a]; ++value)
                layout.place[a][value] |= static_cast<uint32_t>(value >> bit & 1) << target;
            ++target;
        }
    return layout;
}

// Frees the tiles' keys.
template <class Key>
BlockRecords<Key> sort_by_block(LatticeTiles<Key>& tiles, const BlockLayout& layout, ThreadPool& pool) {
    const int64_t num_tiles = static_cast<int64_t>(tiles.tiles.size());
    const int64_t num_groups = std::min(num_tiles, kTileGroups);
    auto group_begin = [&](int64_t g) { return num_tiles * g / num_groups; };
    std::vector<std::vector<uint32_t>> next(num_groups);  // per group and block: a count, then the place of the next record
    Buffer<uint32_t> block_of_record(tiles.num_records);
    pool.run(num_groups, [&](int64_t g, int) {
        next[g].assign(layout.num_blocks, 0);
        for (int64_t t = group_begin(g); t < group_begin(g + 1); ++t) {
            uint32_t* block = block_of_record.get() + tiles.tiles[t].first_vertex;
            for (Key key : tiles.keys[t]) ++next[g][*block++ = static_cast<uint32_t>(layout.block_of(key))];
        }
    });
    BlockRecords<Key> sorted;
    sorted.block_begin.resize(layout.num_blocks + 1);
    uint32_t total = 0;
    for (int64_t b = 0; b < layout.num_blocks; ++b) {
        sorted.block_begin[b] = total;
        for (auto& group : next) {
            const uint32_t count = group[b];
            group[b] = total;
            total += count;
        }
    }
    sorted.block_begin[layout.num_blocks] = total;
    sorted.keys = Buffer<Key>(tiles.num_records);
    sorted.record = Buffer<uint32_t>(tiles.num_records);
    pool.run(num_groups, [&](int64_t g, int) {
        for (int64_t t = group_begin(g); t < group_begin(g + 1); ++t) {
            uint32_t record = static_cast<uint32_t>(tiles.tiles[t].first_vertex);
            for (Key key : tiles.keys[t]) {
                const uint32_t place = next[g][block_of_record[record]]++;
                sorted.keys[place] = key;
                sorted.record[place] = record++;
            }
            tiles.keys[t] = {};
        }
    });
    tiles.keys.clear();
    return sorted;
}

}  // namespace crf
