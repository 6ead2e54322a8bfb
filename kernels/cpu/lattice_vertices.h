// Passes 2, 3 and 5 of building a lattice: records are sorted into blocks of space; in each block
// the records of one key become one vertex; and each tile's share of a vertex gets its place.
#pragma once

#include "cpu/lattice_keys.h"
#include "cpu/lattice_tiles.h"

namespace crf {
// Pass 2 of building a lattice: records (vertices as the tiles number them) are sorted into blocks.
// Boxes of a vertex's last coordinates, one per axis, which depend only on position, divide space
// into blocks. All records of a vertex are in one block: blocks are independent, and nearby
// vertices get nearby numbers, which determines the speed of blurring.

// The block of a key: some bits of the coordinates that depend on position, and what each of their
// values adds to the block's number.
struct BlockLayout {
    int num_axes = 0;
    int shift[kMaxAxes]{};
    uint64_t mask[kMaxAxes]{};
    std::vector<uint32_t> place[kMaxAxes];
    int64_t num_blocks = 0;

    template <class Key>
    int64_t block_of(Key key) const {
        int64_t block = 0;
        for (int a = 0; a < num_axes; ++a)
            block += place[a][static_cast<uint64_t>(key >> shift[a]) & mask[a]];
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

// Calls body(block, thread) for every block. Most blocks are small: a thread takes several at a
// time.
template <class Body>
void for_blocks(int64_t num_blocks, ThreadPool& pool, Body&& body) {
    pool.run_blocks(num_blocks, 16, [&](int64_t begin, int64_t end, int thread) {
        for (int64_t b = begin; b < end; ++b) body(b, thread);
    });
}

// Most blocks, and fewest voxels or records per block: most of a block's cost is its list, even if
// it is empty.
constexpr double kFewBlocks = 4096, kItemsPerBlock = 32;

// num_items: voxels or records, whichever are fewer.
inline BlockLayout lay_out_blocks(const KeyLayout& keys, int num_axes, int64_t num_items) {
    BlockLayout layout;
    layout.num_axes = num_axes;
    const int d = keys.num_features;
    const double most = std::max(kFewBlocks, static_cast<double>(num_items) / kItemsPerBlock);
    // The lowest bits of each coordinate are dropped until there are few enough blocks.
    int coarser = 0;
    double blocks = 0;
    do {
        blocks = 1;
        for (int a = 0; a < layout.num_axes; ++a)
            blocks *= std::ldexp(1.0, std::max(0, keys.width[d - a] - coarser));
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
    // Blocks are numbered along a Morton curve: blocks that are near in space, with their vertices,
    // are near in memory.
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

// Tiles are divided into this many groups that count and write independently. Each needs a counter
// per block.
constexpr int64_t kTileGroups = 16;

// Frees the tiles' keys.
template <class Key>
BlockRecords<Key> sort_by_block(LatticeTiles<Key>& tiles, const BlockLayout& layout,
                                ThreadPool& pool) {
    const int64_t num_tiles = static_cast<int64_t>(tiles.tiles.size());
    const int64_t num_groups = std::min(num_tiles, kTileGroups);
    auto group_begin = [&](int64_t g) { return num_tiles * g / num_groups; };
    std::vector<std::vector<uint32_t>> next(
        num_groups);  // per group and block: a count, then the place of the next record
    Buffer<uint32_t> block_of_record(tiles.num_records);
    pool.run(num_groups, [&](int64_t g, int) {
        next[g].assign(layout.num_blocks, 0);
        for (int64_t t = group_begin(g); t < group_begin(g + 1); ++t) {
            uint32_t* block = block_of_record.get() + tiles.tiles[t].first_vertex;
            for (Key key : tiles.keys[t])
                ++next[g][*block++ = static_cast<uint32_t>(layout.block_of(key))];
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

// The order of a block's vertices: by column (the coordinates that depend on position), then by
// remainder, and within this *list* by the rest of the key. A step along a direction takes a list
// to another one and adds one number to each key.

template <class Key>
class VertexOrder {
   public:
    VertexOrder(const KeyLayout& layout, int num_axes)
        : remainder_bits_(layout.width[0]),
          rest_end_(layout.shift[layout.num_features - num_axes + 1]) {
        remainder_ = (Key(1) << remainder_bits_) - 1;
        rest_ = ((Key(1) << rest_end_) - 1) & ~remainder_;
    }

    // The fields that name a key's column, or its list; columns and lists are in the order of these
    // numbers.
    Key column_of(Key key) const { return key & ~(rest_ | remainder_); }
    Key list_of(Key key) const { return key & ~rest_; }

    // Keys in the order of these numbers are in the order of vertices: the remainder moves above
    // the rest of the fields.
    Key rank_of(Key key) const {
        return (key & ~(rest_ | remainder_)) | (key & remainder_) << (rest_end_ - remainder_bits_) |
               (key & rest_) >> remainder_bits_;
    }

   private:
    int remainder_bits_, rest_end_;  // the rest's first bit, and the one after its last
    Key remainder_ = 0, rest_ = 0;   // their bits
};

template <class Key>
struct LatticeVertices {
    struct Block {
        uint32_t num_vertices = 0, num_shared = 0;  // shared: those of several tiles
        uint32_t first_vertex = 0, first_shared = 0;
    };
    std::vector<Block> blocks;
    // of each vertex, block after block and in their order (VertexOrder) within a block
    Buffer<Key> keys;
    Buffer<uint8_t> is_shared;  // (sorted record) whether it has the vertex of the record before it
    int64_t num_vertices = 0, num_shared = 0;
};

// Sorts by rank, then by index, which rises at first: by digits of eight bits from the lowest bit
// on in which ranks differ.
template <class Key>
void sort_by_rank(std::vector<std::pair<Key, uint32_t>>& items,
                  std::vector<std::pair<Key, uint32_t>>& other) {
    constexpr size_t kFewItems = 64;
    if (items.size() < kFewItems) return std::sort(items.begin(), items.end());
    Key varying = 0;
    for (const auto& item : items) varying |= item.first ^ items.front().first;
    other.resize(items.size());
    for (int shift = 0; varying != 0; varying &= ~(Key(255) << shift)) {
        while (!(varying >> shift & 1)) ++shift;
        uint32_t place[256]{}, total = 0;
        for (const auto& item : items) ++place[static_cast<uint8_t>(item.first >> shift)];
        for (uint32_t& p : place) total += std::exchange(p, total);
        for (const auto& item : items)
            other[place[static_cast<uint8_t>(item.first >> shift)]++] = item;
        items.swap(other);
    }
}
// Sorts a block's records by vertex, and then by tile, and frees their keys. Throws CapacityError
// if 31 bits cannot number the vertices.
template <class Key>
LatticeVertices<Key> number_vertices(BlockRecords<Key>& records, const VertexOrder<Key>& order,
                                     ThreadPool& pool) {
    const int64_t num_blocks = static_cast<int64_t>(records.block_begin.size()) - 1;
    LatticeVertices<Key> result;
    result.blocks.resize(num_blocks);
    result.is_shared = Buffer<uint8_t>(records.keys.size);
    struct Scratch {
        std::vector<std::pair<Key, uint32_t>> ranks, sorted;  // and records
        std::vector<Key> unique;
        std::vector<uint32_t> record;
    };
    std::vector<Scratch> scratch(pool.num_threads());
    // A block's keys move to its front, one per vertex.
    for_blocks(num_blocks, pool, [&](int64_t b, int thread) {
        const uint32_t begin = records.block_begin[b], size = records.block_begin[b + 1] - begin;
        if (size == 0) return;
        auto& [ranks, sorted, unique, record] = scratch[thread];
        ranks.resize(size);
        for (uint32_t i = 0; i < size; ++i)
            ranks[i] = {order.rank_of(records.keys[begin + i]), begin + i};
        sort_by_rank(ranks, sorted);
        unique.resize(size);
        record.resize(size);
        auto& block = result.blocks[b];
        bool is_shared = false;
        for (uint32_t i = 0; i < size; ++i) {
            const bool was_shared = is_shared;
            is_shared = i > 0 && ranks[i].first == ranks[i - 1].first;
            block.num_vertices += !is_shared;
            block.num_shared += is_shared && !was_shared;
            unique[block.num_vertices - 1] = records.keys[ranks[i].second];
            record[i] = records.record[ranks[i].second];
            result.is_shared[begin + i] = is_shared;
        }
        std::copy_n(unique.begin(), block.num_vertices, records.keys.get() + begin);
        std::copy_n(record.begin(), size, records.record.get() + begin);
    });
    for (auto& block : result.blocks) {
        block.first_vertex = static_cast<uint32_t>(result.num_vertices);
        block.first_shared = static_cast<uint32_t>(result.num_shared);
        result.num_vertices += block.num_vertices;
        result.num_shared += block.num_shared;
    }
    if (result.num_vertices > int64_t{0x7ffffff0})
        throw CapacityError("the lattice would have more than 2^31 vertices");
    result.keys = Buffer<Key>(result.num_vertices);
    for (int64_t b = 0; b < num_blocks; ++b)
        std::copy_n(records.keys.get() + records.block_begin[b], result.blocks[b].num_vertices,
                    result.keys.get() + result.blocks[b].first_vertex);
    records.keys = Buffer<Key>();
    return result;
}

// Pass 5 of building a lattice: the place of each tile's share of a vertex. A vertex's records are
// in tile order, so the order in which shares are summed is fixed.
template <class Key>
void assign_slots(const BlockRecords<Key>& records, const LatticeVertices<Key>& vertices,
                  ThreadPool& pool, Lattice& lattice) {
    lattice.slot = Buffer<uint32_t>(records.record.size);
    lattice.shared.resize(vertices.num_shared);
    for_blocks(static_cast<int64_t>(vertices.blocks.size()), pool, [&](int64_t b, int) {
        const uint32_t begin = records.block_begin[b];
        const auto& block = vertices.blocks[b];
        uint32_t vertex = block.first_vertex, shared = block.first_shared;  // the next ones
        uint32_t slot = static_cast<uint32_t>(vertices.num_vertices) + begin - vertex;
        for (uint32_t i = begin; i < records.block_begin[b + 1]; ++i) {
            if (!vertices.is_shared[i]) {
                lattice.slot[records.record[i]] = vertex++;
                continue;
            }
            if (!vertices.is_shared[i - 1]) lattice.shared[shared++] = {vertex - 1, slot, 0};
            ++lattice.shared[shared - 1].num_slots;
            lattice.slot[records.record[i]] = slot++;
        }
    });
}
}  // namespace crf
