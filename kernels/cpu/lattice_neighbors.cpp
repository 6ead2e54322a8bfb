#include "cpu/lattice_neighbors.h"

#include <algorithm>

namespace crf {

namespace {

constexpr uint32_t kNone = 0xffffffff;

// Look-ups run in batches of this size, stage by stage, so that memory is prefetched before it is needed.
constexpr uint32_t kBatch = 128;

// Number of vertices whose chains are listed together.
constexpr int64_t kChainBlock = 4096;

// Hash tables of all blocks' vertices, one after the other.
template <class Key>
class BlockTables {
   public:
    BlockTables(const LatticeVertices<Key>& vertices, const BlockLayout& layout, ThreadPool& pool)
        : keys_(vertices.keys), layout_(layout), blocks_(vertices.blocks.size()) {
        int64_t num_buckets = 0;
        for (size_t b = 0; b < blocks_.size(); ++b) {
            Block& block = blocks_[b];
            block.first_vertex = vertices.blocks[b].first_vertex;
            block.num_vertices = vertices.blocks[b].num_vertices;
            if (block.num_vertices == 0) continue;
            // Two thirds full: few collisions, and a typical block's table stays in the L1 cache.
            block.first_bucket = num_buckets;
            block.num_buckets = block.num_vertices + block.num_vertices / 2 + 1;
            num_buckets += block.num_buckets;
        }
        buckets_ = Buffer<Bucket>(num_buckets);
        for_blocks(num_blocks(), pool, [&](int64_t b, int) { fill(blocks_[b]); });
    }

    int64_t num_blocks() const { return static_cast<int64_t>(blocks_.size()); }

    // Calls found(vertex, next) for every vertex of a block, where `next` is the vertex after it along a direction, or kNone.
    template <class Found>
    void look_up_after(int64_t b, int direction, const KeySpace<Key>& space, Found&& found) const {
        const Block& block = blocks_[b];
        Search searches[kBatch];
        for (uint32_t first = 0; first < block.num_vertices; first += kBatch) {
            const uint32_t count = std::min(kBatch, block.num_vertices - first);
            for (uint32_t i = 0; i < count; ++i) {
                searches[i] = begin_search(space.after(keys_[block.first_vertex + first + i], direction));
                __builtin_prefetch(searches[i].bucket);
            }
            for (uint32_t i = 0; i < count; ++i) {
                Search& s = searches[i];
                if (s.block->num_vertices == 0) continue;
                const Bucket* buckets = buckets_.get() + s.block->first_bucket;
                advance(s, static_cast<uint32_t>(s.bucket - buckets));
                __builtin_prefetch(&keys_[s.block->first_vertex + (s.number == kNone ? 0 : s.number)]);
            }
            for (uint32_t i = 0; i < count; ++i) {
                Search& s = searches[i];
                while (s.number != kNone && keys_[s.block->first_vertex + s.number] != s.key) {
                    const Bucket* buckets = buckets_.get() + s.block->first_bucket;
                    advance(s, s.block->next(static_cast<uint32_t>(s.bucket - buckets)));
                }
                found(block.first_vertex + first + i, s.number == kNone ? kNone : s.block->first_vertex + s.number);
            }
        }
    }

   private:
    struct Block {
        int64_t first_bucket = 0;
        uint32_t num_buckets = 0;
        uint32_t first_vertex = 0, num_vertices = 0;

        // The first bucket to look for a hash in, and the one after a bucket.
        uint32_t home(uint64_t hash) const { return static_cast<uint32_t>((hash >> 32) * num_buckets >> 32); }
        uint32_t next(uint32_t bucket) const { return bucket + 1 == num_buckets ? 0 : bucket + 1; }
    };

    // The low half of a key's hash, and the vertex within the block; kNone where it is empty.
    struct Bucket {
        uint32_t tag, number;
    };

    // A look-up in progress.
    struct Search {
        Key key;
        const Block* block;
        const Bucket* bucket;
        uint32_t tag, number;
    };

    void fill(const Block& block) {
        if (block.num_vertices == 0) return;
        Bucket* const buckets = buckets_.get() + block.first_bucket;
        std::fill(buckets, buckets + block.num_buckets, Bucket{0, kNone});
        for (uint32_t n = 0; n < block.num_vertices; ++n) {
            const uint64_t hash = hash_key(keys_[block.first_vertex + n]);
            uint32_t bucket = block.home(hash);
            while (buckets[bucket].number != kNone) bucket = block.next(bucket);
            buckets[bucket] = {static_cast<uint32_t>(hash), n};
        }
    }

    Search begin_search(Key key) const {
        Search s;
        s.key = key;
        s.block = &blocks_[layout_.block_of(key)];
        const uint64_t hash = hash_key(key);
        s.tag = static_cast<uint32_t>(hash);
        s.bucket = buckets_.get() + s.block->first_bucket + s.block->home(hash);
        s.number = kNone;
        return s;
    }

    // Moves a search to the next bucket, starting at `bucket`, that may hold its key; the key itself is not compared.
    void advance(Search& s, uint32_t bucket) const {
        const Bucket* buckets = buckets_.get() + s.block->first_bucket;
        while (buckets[bucket].number != kNone && buckets[bucket].tag != s.tag) bucket = s.block->next(bucket);
        s.bucket = buckets + bucket;
        s.number = buckets[bucket].number;
    }

    const Buffer<Key>& keys_;
    const BlockLayout& layout_;
    std::vector<Block> blocks_;
    Buffer<Bucket> buckets_;
};

// after: for each vertex, the next one along the direction, or kNone. Blocks of vertices list the chains that begin in them.
Lattice::Chains list_chains(const Buffer<uint8_t>& has_before, const Buffer<uint32_t>& after, ThreadPool& pool) {
    const int64_t num_vertices = after.size, num_blocks = (num_vertices + kChainBlock - 1) / kChainBlock;
    std::vector<std::vector<uint32_t>> found(num_blocks);
    pool.run(num_blocks, [&](int64_t block, int) {
        const int64_t begin = block * kChainBlock, end = std::min(begin + kChainBlock, num_vertices);
        found[block].reserve(2 * kChainBlock);
        for (int64_t v = begin; v < end; ++v) {
            if (has_before[v] || after[v] == kNone) continue;
            for (uint32_t u = static_cast<uint32_t>(v), next; u != kNone; u = next) {
                next = after[u];
                found[block].push_back(2 * u + (next == kNone ? 1 : 0));
            }
        }
    });
    Lattice::Chains chains;
    chains.pieces.assign(num_blocks + 1, 0);
    for (int64_t block = 0; block < num_blocks; ++block)
        chains.pieces[block + 1] = chains.pieces[block] + static_cast<int64_t>(found[block].size());
    chains.entries = Buffer<uint32_t>(chains.pieces[num_blocks]);
    pool.run(num_blocks,
             [&](int64_t block, int) { std::copy(found[block].begin(), found[block].end(), chains.entries.get() + chains.pieces[block]); });
    return chains;
}

}  // namespace

template <class Key>
std::vector<Lattice::Chains> find_neighbors(const LatticeVertices<Key>& vertices, const BlockLayout& layout, const KeySpace<Key>& space,
                                            ThreadPool& pool) {
    const BlockTables<Key> tables(vertices, layout, pool);
    Buffer<uint32_t> after(vertices.num_vertices);
    Buffer<uint8_t> has_before(vertices.num_vertices);
    std::vector<Lattice::Chains> directions;
    for (int j = 0; j <= space.num_features(); ++j) {
        std::fill(has_before.get(), has_before.get() + vertices.num_vertices, uint8_t{0});
        // One look-up per vertex gives both directions: v follows u, so u precedes v.
        for_blocks(tables.num_blocks(), pool, [&](int64_t b, int) {
            tables.look_up_after(b, j, space, [&](uint32_t vertex, uint32_t next) {
                after[vertex] = next;
                if (next != kNone) has_before[next] = 1;
            });
        });
        directions.push_back(list_chains(has_before, after, pool));
    }
    return directions;
}

template std::vector<Lattice::Chains> find_neighbors(const LatticeVertices<uint64_t>&, const BlockLayout&, const KeySpace<uint64_t>&,
                                                     ThreadPool&);
template std::vector<Lattice::Chains> find_neighbors(const LatticeVertices<WideKey>&, const BlockLayout&, const KeySpace<WideKey>&,
                                                     ThreadPool&);

}  // namespace crf
