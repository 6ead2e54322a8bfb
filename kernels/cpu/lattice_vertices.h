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
    constexpr int64_t kGroup = 16;
    pool.run((num_blocks + kGroup - 1) / kGroup, [&](int64_t group, int thread) {
        for (int64_t b = group * kGroup; b < std::min((group + 1) * kGroup, num_blocks); ++b)
            body(b, thread);
    });
}

// num_items: voxels or records, whichever are fewer.
BlockLayout lay_out_blocks(const KeyLayout& keys, int num_axes, int64_t num_items);

// Frees the tiles' keys.
template <class Key>
BlockRecords<Key> sort_by_block(LatticeTiles<Key>& tiles, const BlockLayout& layout,
                                ThreadPool& pool);

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

// Sorts a block's records by vertex, and then by tile, and frees their keys. Throws CapacityError
// if 31 bits cannot number the vertices.
template <class Key>
LatticeVertices<Key> number_vertices(BlockRecords<Key>& records, const VertexOrder<Key>& order,
                                     ThreadPool& pool);

// Pass 5 of building a lattice: the place of each tile's share of a vertex. A vertex's records are
// in tile order, so the order in which shares are summed is fixed.
template <class Key>
void assign_slots(const BlockRecords<Key>& records, const LatticeVertices<Key>& vertices,
                  ThreadPool& pool, Lattice& lattice);
}  // namespace crf
