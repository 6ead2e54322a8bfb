// Builds the lattice in four passes, each in parallel and each with the same result for any number of threads:
//   1. tiles: the simplex of every voxel (sixteen at a time), and the tile's own list of vertices, by first touch;
//   2. blocks: a vertex's last coordinates depend on position alone, so they cut space into blocks; every tile's vertices are dealt
//      out to their blocks;
//   3. in each block: duplicates merged through a small hash table, vertices numbered block after block, neighbors looked up;
//   4. slots: where each tile puts its share of a vertex.
// Blocks keep every table inside the L1 or L2 cache and give near vertices near numbers, which is what blurring is fast or slow by.
#include "cpu/lattice_build.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "cpu/features.h"
#include "cpu/simd.h"
#include "lattice_math.h"

namespace crf {

namespace {

using WideKey = unsigned __int128;

// Voxels of one tile, ready for the geometry.
struct TilePiece {
    int64_t voxel, grid;
    int32_t length;
    int32_t coordinate[kMaxAxes];  // of its first voxel, in the box
};

// What the geometry gives for sixteen voxels, lane by lane.
struct SimplexBatch {
    int32_t quotient[kMaxLatticeFeatures + 1][kLanes];
    int32_t order[kMaxLatticeFeatures + 1][kLanes];   // coordinate index at each rank
    int32_t weight[kMaxLatticeFeatures + 1][kLanes];  // in 1 / 65535
    int32_t wrapped[kLanes];
};

template <int D>
void find_simplices(const float* features, int64_t stride, const float* scale, SimplexBatch& batch) {
    vfloat scaled[D], elevated[D + 1], weight[D + 1];
    vint quotient[D + 1], sorted[D + 1], wrapped;
    for (int i = 0; i < D; ++i) scaled[i] = load(features + i * stride) * scale[i];
    elevate<D>(scaled, elevated);
    enclosing_simplex<D>(elevated, quotient, sorted, wrapped);
    barycentric_weights<D>(sorted, weight);
    vint rest = splat_lanes(65535);
    for (int k = 1; k <= D; ++k) {
        const vint rounded = truncate_to_int(weight[k] * 65535.0f + 0.5f);
        rest -= rounded;
        std::memcpy(batch.weight[k], &rounded, sizeof rounded);
    }
    rest = vmax(rest, vint{});
    std::memcpy(batch.weight[0], &rest, sizeof rest);
    for (int i = 0; i <= D; ++i) {
        std::memcpy(batch.quotient[i], &quotient[i], sizeof quotient[i]);
        const vint index = coordinate_index<D>(sorted[i]);
        std::memcpy(batch.order[i], &index, sizeof index);
    }
    std::memcpy(batch.wrapped, &wrapped, sizeof wrapped);
}

using SimplexFunction = void (*)(const float*, int64_t, const float*, SimplexBatch&);

struct Geometry {
    int num_features;  // of the lattice; the first num_features - (those of the image) are zero for every voxel
    SimplexFunction find;
};

// The smallest compiled lattice that holds D features. Features that are zero everywhere leave the kernel as it is.
Geometry choose_geometry(int num_features) {
#define CRF_DIMENSION(D) \
    if (num_features <= D) return {D, &find_simplices<D>};
    CRF_DIMENSION(1)
    CRF_DIMENSION(2)
    CRF_DIMENSION(3)
    CRF_DIMENSION(4)
    CRF_DIMENSION(5)
    CRF_DIMENSION(6)
    CRF_DIMENSION(7)
    CRF_DIMENSION(8)
    CRF_DIMENSION(9)
    CRF_DIMENSION(10)
    CRF_DIMENSION(11)
    CRF_DIMENSION(12)
    CRF_DIMENSION(16)
    CRF_DIMENSION(20)
    CRF_DIMENSION(28)
#undef CRF_DIMENSION
    throw CapacityError("the lattice holds at most 28 features (axes + modalities), not " + std::to_string(num_features));
}

// ---- Keys ------------------------------------------------------------------------------------------------------------------------

int bit_width(int64_t largest) { return std::bit_width(static_cast<uint64_t>(largest)); }

// Field widths from the range of every coordinate, by interval arithmetic on the elevation.
KeyLayout layout_keys(const BilateralInput& input, const Geometry& geometry, const std::vector<float>& scale, int64_t& total_bits) {
    const Voxels& voxels = *input.voxels;
    const int d = geometry.num_features;
    const int num_modalities = static_cast<int>(input.intensity.size());
    const int padding = d - num_modalities - voxels.num_axes;
    std::vector<double> low(d, 0.0), high(d, 0.0);
    for (int m = 0; m < num_modalities; ++m) {
        high[padding + m] = (input.highest[m] - input.lowest[m]) / input.theta_beta[m] * scale[padding + m];
    }
    for (int a = 0; a < voxels.num_axes; ++a) {
        const int i = padding + num_modalities + voxels.feature[a];
        high[i] = (voxels.box_shape[a] - 1) * voxels.spacing[a] / input.theta_alpha[a] * scale[i];
    }
    KeyLayout layout;
    layout.num_features = d;
    int64_t shift = bits_for(d + 1);
    double sum_low = 0, sum_high = 0;
    for (int i = d; i >= 1; --i) {
        // elevated_i = sum over j >= i of scaled_j - i scaled_(i-1). Margins: rounding, the wrap, a vertex below, a step either way.
        const double least = sum_low - i * high[i - 1], most = sum_high - i * low[i - 1];
        sum_low += low[i - 1];
        sum_high += high[i - 1];
        if (most - least > 1e9) throw CapacityError("a bandwidth is too small for the range of its feature");
        layout.lowest[i] = static_cast<int>(std::floor(least / (d + 1))) - 4;
        layout.width[i] = bit_width(static_cast<int64_t>(std::ceil(most / (d + 1))) + 4 - layout.lowest[i]);
    }
    layout.width[0] = static_cast<int>(shift);
    for (int i = 1; i <= d; ++i) {
        layout.shift[i] = static_cast<int>(shift);
        shift += layout.width[i];
    }
    total_bits = shift;
    return layout;
}

inline uint64_t hash_key(uint64_t key) { return key * 0x9E3779B97F4A7C15ull; }
inline uint64_t hash_key(WideKey key) {
    return (static_cast<uint64_t>(key) ^ static_cast<uint64_t>(key >> 64) * 0xC2B2AE3D27D4EB4Full) * 0x9E3779B97F4A7C15ull;
}

// ---- Tiles -----------------------------------------------------------------------------------------------------------------------

struct TileVoxels {
    std::vector<TilePiece> pieces;     // tile after tile
    std::vector<int64_t> first_piece;  // one a tile, and the end
};

// Cuts the box into bricks and deals the runs out to them; bricks without voxels vanish.
TileVoxels cut_into_tiles(const Voxels& voxels, int64_t most_voxels) {
    const int axes = voxels.num_axes;
    int64_t extent[kMaxAxes], count[kMaxAxes];
    // As near to a cube as powers of two allow, but for the last axis, which is cut into whole vectors.
    extent[axes - 1] = axes == 1 ? most_voxels : kLanes;
    for (int64_t a = axes - 2, left = most_voxels / kLanes; a >= 0; --a) {
        const double side = std::pow(static_cast<double>(left), 1.0 / static_cast<double>(a + 1));
        extent[a] = int64_t{1} << static_cast<int>(std::log2(side) + 1e-9);
        left /= extent[a];
    }
    int64_t num_bricks = 1;
    for (int a = 0; a < axes; ++a) {
        count[a] = (voxels.box_shape[a] + extent[a] - 1) / extent[a];
        num_bricks *= count[a];
    }
    auto for_brick_pieces = [&](auto&& body) {
        for (const Run& run : voxels.runs) {
            int64_t c[kMaxAxes];
            voxels.coordinates(run.box, c);
            int64_t brick_row = 0;
            for (int a = 0; a < axes - 1; ++a) brick_row = brick_row * count[a] + c[a] / extent[a];
            for (int64_t done = 0; done < run.length;) {
                const int64_t x = c[axes - 1] + done, brick = x / extent[axes - 1];
                const int64_t length = std::min((brick + 1) * extent[axes - 1] - x, run.length - done);
                TilePiece piece{run.voxel + done, run.grid + done, static_cast<int32_t>(length), {}};
                for (int a = 0; a < axes; ++a) piece.coordinate[a] = static_cast<int32_t>(a == axes - 1 ? x : c[a]);
                body(brick_row * count[axes - 1] + brick, piece);
                done += length;
            }
        }
    };
    std::vector<int64_t> position(num_bricks + 1, 0);
    for_brick_pieces([&](int64_t brick, const TilePiece&) { ++position[brick + 1]; });
    TileVoxels tiles;
    tiles.first_piece.push_back(0);
    for (int64_t b = 0; b < num_bricks; ++b) {
        position[b + 1] += position[b];
        if (position[b + 1] > position[b]) tiles.first_piece.push_back(position[b + 1]);
    }
    tiles.pieces.resize(position[num_bricks]);
    for_brick_pieces([&](int64_t brick, const TilePiece& piece) { tiles.pieces[position[brick]++] = piece; });
    return tiles;
}

// ---- The builder -----------------------------------------------------------------------------------------------------------------

// A hash table of one tile's vertices, kept by a thread from tile to tile.
template <class Key>
class TileTable {
   public:
    static constexpr Key kEmpty = ~Key(0);

    TileTable() { resize(12); }

    // Number of the key within the tile, given out in order of first touch.
    uint32_t find_or_add(Key key) {
        uint64_t bucket = hash_key(key) >> down_;
        while (buckets_[bucket].key != key) {
            if (buckets_[bucket].key == kEmpty) {
                const uint32_t number = static_cast<uint32_t>(found_.size());
                buckets_[bucket] = {key, number};
                found_.push_back(key);
                places_.push_back(static_cast<uint32_t>(bucket));
                if (2 * found_.size() > buckets_.size()) grow();
                return number;
            }
            bucket = (bucket + 1) & mask_;
        }
        return buckets_[bucket].number;
    }

    // Hands the tile's keys over, and empties the table for the next tile.
    std::vector<Key> take() {
        for (uint32_t bucket : places_) buckets_[bucket].key = kEmpty;
        places_.clear();
        std::vector<Key> keys(found_);
        found_.clear();
        return keys;
    }

   private:
    struct Bucket {
        Key key = kEmpty;
        uint32_t number = 0;
    };

    void resize(int bits) {
        buckets_.assign(size_t{1} << bits, Bucket{});
        mask_ = (uint64_t{1} << bits) - 1;
        down_ = 64 - bits;
        bits_ = bits;
    }

    void grow() {
        resize(bits_ + 1);
        for (size_t n = 0; n < found_.size(); ++n) {
            uint64_t bucket = hash_key(found_[n]) >> down_;
            while (buckets_[bucket].key != kEmpty) bucket = (bucket + 1) & mask_;
            buckets_[bucket] = {found_[n], static_cast<uint32_t>(n)};
            places_[n] = static_cast<uint32_t>(bucket);
        }
    }

    std::vector<Bucket> buckets_;
    std::vector<Key> found_;
    std::vector<uint32_t> places_;
    uint64_t mask_ = 0;
    int down_ = 0, bits_ = 0;
};

template <class Key>
class Builder {
   public:
    Builder(const BilateralInput& input, const Geometry& geometry, const KeyLayout& layout, const std::vector<float>& scale,
            ThreadPool& pool)
        : input_(input),
          geometry_(geometry),
          layout_(layout),
          scale_(scale),
          pool_(pool),
          d_(geometry.num_features),
          tile_voxels_(Lattice::tile_voxels(geometry.num_features)) {
        for (int i = 0; i <= d_; ++i) {
            unit_[i] = key_unit<Key>(layout, i);
            bias_ -= unit_[i] * static_cast<Key>(static_cast<int64_t>(layout.lowest[i]));
            all_units_ += unit_[i];
        }
    }

    Lattice build() {
        lattice_.num_features = d_;
        find_tiles();
        lay_out_blocks();
        deal_out();
        BlockCache::release_idle();  // the tiles' own lists, before more is taken
        number_vertices();
        find_neighbors();
        assign_slots();
        return std::move(lattice_);
    }

    // Distinct vertices per voxel in some of the tiles, spread over the volume.
    double sample(int64_t num_samples) {
        const TileVoxels tiles = cut_into_tiles(*input_.voxels, tile_voxels_);
        const int64_t num_tiles = static_cast<int64_t>(tiles.first_piece.size()) - 1;
        const int64_t step = std::max<int64_t>(1, num_tiles / num_samples);
        TileTable<Key> table;
        Scratch scratch(d_ * tile_voxels_);
        std::vector<uint16_t> local(tile_voxels_ * (d_ + 1)), weight(local.size());
        int64_t num_vertices = 0, num_voxels = 0;
        for (int64_t t = step / 2; t < num_tiles; t += step) {
            num_voxels += embed_tile(tiles, t, scratch, table, local.data(), weight.data());
            num_vertices += static_cast<int64_t>(table.take().size());
        }
        return static_cast<double>(num_vertices) / static_cast<double>(num_voxels);
    }

   private:
    struct Scratch {
        explicit Scratch(int64_t count) : features(count) { std::fill(features.get(), features.get() + features.size, 0.0f); }
        Buffer<float> features;
        SimplexBatch batch;
    };

    // A box of space with its own hash table.
    struct Block {
        int64_t first_bucket = 0;
        uint32_t first_record = 0, first_vertex = 0, num_vertices = 0;
        uint32_t num_buckets = 0;

        // The first bucket to look for a hash in, and the one after a bucket.
        uint32_t home(uint64_t hash) const { return static_cast<uint32_t>((hash >> 32) * num_buckets >> 32); }
        uint32_t next(uint32_t bucket) const { return bucket + 1 == num_buckets ? 0 : bucket + 1; }
    };

    // Pass 1 for one tile; returns its number of voxels.
    int64_t embed_tile(const TileVoxels& tiles, int64_t t, Scratch& scratch, TileTable<Key>& table, uint16_t* local, uint16_t* weight) {
        const int image_features = num_features(input_);
        float* image = scratch.features.get() + (d_ - image_features) * tile_voxels_;
        int64_t count = 0;
        for (int64_t p = tiles.first_piece[t]; p < tiles.first_piece[t + 1]; ++p) {
            const TilePiece& piece = tiles.pieces[p];
            constexpr int64_t kAhead = 12;  // pieces are short and far apart, which no hardware foresees
            if (p + kAhead < static_cast<int64_t>(tiles.pieces.size()))
                for (const float* intensity : input_.intensity) __builtin_prefetch(intensity + tiles.pieces[p + kAhead].grid);
            piece_features(input_, piece.grid, piece.coordinate, piece.length, image + count, tile_voxels_);
            count += piece.length;
        }
        SimplexBatch& batch = scratch.batch;
        for (int64_t first = 0; first < count; first += kLanes) {
            geometry_.find(scratch.features.get() + first, tile_voxels_, scale_.data(), batch);
            const int lanes = static_cast<int>(std::min<int64_t>(kLanes, count - first));
            for (int lane = 0; lane < lanes; ++lane, local += d_ + 1, weight += d_ + 1) {
                Key key = bias_;
                for (int i = 1; i <= d_; ++i) key += unit_[i] * static_cast<Key>(static_cast<int64_t>(batch.quotient[i][lane]));
                const int wrapped = batch.wrapped[lane];
                for (int p = 0; p < wrapped; ++p) key -= unit_[batch.order[p][lane]];
                for (int p = d_ + 1 + wrapped; p <= d_; ++p) key += unit_[batch.order[p][lane]];
                // From the vertex of remainder k to that of k + 1: one more in every coordinate, but for the k-th smallest residual's.
                for (int k = 0; k <= d_; ++k) {
                    local[k] = static_cast<uint16_t>(table.find_or_add(key));
                    weight[k] = static_cast<uint16_t>(batch.weight[k][lane]);
                    key += Key(1) - unit_[batch.order[d_ - k][lane]];
                }
            }
        }
        return count;
    }

    void find_tiles() {
        const TileVoxels tiles = cut_into_tiles(*input_.voxels, tile_voxels_);
        const int64_t num_tiles = static_cast<int64_t>(tiles.first_piece.size()) - 1;
        lattice_.tiles.resize(num_tiles);
        lattice_.pieces.reserve(tiles.pieces.size());
        int64_t entry = 0;
        for (int64_t t = 0; t < num_tiles; ++t) {
            Lattice::Tile& tile = lattice_.tiles[t];
            tile.first_piece = tiles.first_piece[t];
            tile.num_pieces = tiles.first_piece[t + 1] - tiles.first_piece[t];
            tile.first_entry = entry;
            for (int64_t p = tiles.first_piece[t]; p < tiles.first_piece[t + 1]; ++p) {
                lattice_.pieces.push_back({tiles.pieces[p].voxel, tiles.pieces[p].length});
                entry += tiles.pieces[p].length;
            }
            tile.num_voxels = entry - tile.first_entry;
        }
        lattice_.local = Buffer<uint16_t>(entry * (d_ + 1));
        lattice_.weight = Buffer<uint16_t>(entry * (d_ + 1));
        tile_keys_.resize(num_tiles);
        std::vector<TileTable<Key>> tables(pool_.num_threads());
        std::vector<Scratch> scratch;
        for (int i = 0; i < pool_.num_threads(); ++i) scratch.emplace_back(d_ * tile_voxels_);
        pool_.run(num_tiles, [&](int64_t t, int thread) {
            const int64_t first = lattice_.tiles[t].first_entry * (d_ + 1);
            embed_tile(tiles, t, scratch[thread], tables[thread], lattice_.local.get() + first, lattice_.weight.get() + first);
            tile_keys_[t] = tables[thread].take();
        });
        int64_t vertex = 0;
        for (int64_t t = 0; t < num_tiles; ++t) {
            Lattice::Tile& tile = lattice_.tiles[t];
            tile.first_vertex = vertex;
            tile.num_vertices = static_cast<int64_t>(tile_keys_[t].size());
            vertex += tile.num_vertices;
            lattice_.largest_tile = std::max(lattice_.largest_tile, tile.num_vertices);
        }
        num_records_ = vertex;
        if (num_records_ > int64_t{0xfffffff0}) throw CapacityError("the lattice would have more than 2^32 vertices");
    }

    // Blocks are boxes of the coordinates that depend on position alone: the last ones, as many as there are axes.
    void lay_out_blocks() {
        const int axes = input_.voxels->num_axes;
        const double most = std::max(4096.0, static_cast<double>(input_.voxels->num_voxels) / 32);
        double blocks = 0;
        do {
            blocks = 1;
            for (int a = 0; a < axes; ++a) blocks *= std::ldexp(1.0, std::max(0, layout_.width[d_ - a] - coarser_));
            if (blocks > most) ++coarser_;
        } while (blocks > most);
        num_blocks_ = static_cast<int64_t>(blocks);
        num_axes_ = axes;
        int bits[kMaxAxes], most_bits = 0;
        for (int a = 0; a < axes; ++a) {
            const int i = d_ - a;
            bits[a] = std::max(0, layout_.width[i] - coarser_);
            most_bits = std::max(most_bits, bits[a]);
            field_shift_[a] = layout_.shift[i] + std::min(coarser_, layout_.width[i]);
            field_mask_[a] = (uint64_t{1} << bits[a]) - 1;
            place_[a].assign(field_mask_[a] + 1, 0);
        }
        // Blocks are numbered along a Morton curve: blocks that are near in space, and with them their vertices, are near in memory.
        int target = 0;
        for (int bit = 0; bit < most_bits; ++bit)
            for (int a = 0; a < axes; ++a) {
                if (bit >= bits[a]) continue;
                for (uint64_t value = 0; value <= field_mask_[a]; ++value)
                    place_[a][value] |= static_cast<uint32_t>(value >> bit & 1) << target;
                ++target;
            }
    }

    int64_t block_of(Key key) const {
        int64_t block = 0;
        for (int a = 0; a < num_axes_; ++a) block += place_[a][static_cast<uint64_t>(key >> field_shift_[a]) & field_mask_[a]];
        return block;
    }

    // Pass 2: tile vertices sorted by block, in tile order within each block. Groups of tiles count and write on their own.
    void deal_out() {
        const int64_t num_tiles = static_cast<int64_t>(lattice_.tiles.size());
        const int64_t num_groups = std::min<int64_t>(num_tiles, 16);
        auto group_begin = [&](int64_t g) { return num_tiles * g / num_groups; };
        std::vector<std::vector<uint32_t>> next(num_groups);
        Buffer<uint32_t> block_of_record(num_records_);
        pool_.run(num_groups, [&](int64_t g, int) {
            next[g].assign(num_blocks_, 0);
            for (int64_t t = group_begin(g); t < group_begin(g + 1); ++t) {
                uint32_t* block = block_of_record.get() + lattice_.tiles[t].first_vertex;
                for (Key key : tile_keys_[t]) ++next[g][*block++ = static_cast<uint32_t>(block_of(key))];
            }
        });
        block_begin_.resize(num_blocks_ + 1);
        uint32_t total = 0;
        for (int64_t b = 0; b < num_blocks_; ++b) {
            block_begin_[b] = total;
            for (auto& group : next) {
                const uint32_t count = group[b];
                group[b] = total;
                total += count;
            }
        }
        block_begin_[num_blocks_] = total;
        keys_ = Buffer<Key>(num_records_);
        record_ = Buffer<uint32_t>(num_records_);
        pool_.run(num_groups, [&](int64_t g, int) {
            for (int64_t t = group_begin(g); t < group_begin(g + 1); ++t) {
                uint32_t record = static_cast<uint32_t>(lattice_.tiles[t].first_vertex);
                for (Key key : tile_keys_[t]) {
                    const uint32_t place = next[g][block_of_record[record]]++;
                    keys_[place] = key;
                    record_[place] = record++;
                }
                tile_keys_[t] = {};
            }
        });
        tile_keys_.clear();
    }

    // Pass 3a: in each block the first record of a key becomes a vertex. A block's keys move to its front, one a vertex.
    void number_vertices() {
        number_ = Buffer<uint32_t>(num_records_);  // of each record's vertex within its block
        blocks_.resize(num_blocks_);
        std::vector<TileTable<Key>> tables(pool_.num_threads());
        pool_.run(num_block_groups(), [&](int64_t group, int thread) {
            for (int64_t b = group * kBlockGroup; b < std::min((group + 1) * kBlockGroup, num_blocks_); ++b) {
                blocks_[b].first_record = block_begin_[b];
                if (block_begin_[b] == block_begin_[b + 1]) continue;
                TileTable<Key>& table = tables[thread];
                for (uint32_t i = block_begin_[b]; i < block_begin_[b + 1]; ++i) number_[i] = table.find_or_add(keys_[i]);
                const std::vector<Key> unique = table.take();
                std::copy(unique.begin(), unique.end(), keys_.get() + block_begin_[b]);
                blocks_[b].num_vertices = static_cast<uint32_t>(unique.size());
            }
        });
        uint32_t vertices = 0;
        for (Block& block : blocks_) {
            block.first_vertex = vertices;
            vertices += block.num_vertices;
            if (block.num_vertices == 0) continue;
            block.first_bucket = num_buckets_;
            block.num_buckets = block.num_vertices + block.num_vertices / 2 + 1;
            num_buckets_ += block.num_buckets;
        }
        lattice_.num_vertices = vertices;
        // From here on one key a vertex is enough.
        Buffer<Key> keys(vertices);
        for (const Block& block : blocks_)
            std::copy_n(keys_.get() + block.first_record, block.num_vertices, keys.get() + block.first_vertex);
        keys_ = std::move(keys);
        if (lattice_.num_vertices > int64_t{0x7ffffff0}) throw CapacityError("the lattice would have more than 2^31 vertices");
    }

    static constexpr int64_t kBlockGroup = 16;
    int64_t num_block_groups() const { return (num_blocks_ + kBlockGroup - 1) / kBlockGroup; }

    template <class Body>
    void for_blocks(Body&& body) {
        pool_.run(num_block_groups(), [&](int64_t group, int) {
            for (int64_t b = group * kBlockGroup; b < std::min((group + 1) * kBlockGroup, num_blocks_); ++b)
                if (blocks_[b].num_vertices > 0) body(blocks_[b]);
        });
    }

    // A bucket of the blocks' tables: the low half of the key's hash, and the vertex within the block.
    struct Bucket {
        uint32_t tag, number;
    };

    // A look-up under way.
    struct Search {
        Key key;
        const Block* block;
        Bucket* bucket;
        uint32_t tag, number;
    };

    void fill_tables(Bucket* table) {
        for_blocks([&](const Block& block) {
            Bucket* buckets = table + block.first_bucket;
            std::fill(buckets, buckets + block.num_buckets, Bucket{0, kNone});
            for (uint32_t n = 0; n < block.num_vertices; ++n) {
                const uint64_t hash = hash_key(keys_[block.first_vertex + n]);
                uint32_t bucket = block.home(hash);
                while (buckets[bucket].number != kNone) bucket = block.next(bucket);
                buckets[bucket] = {static_cast<uint32_t>(hash), n};
            }
        });
    }

    // Moves a search on to the next bucket that may hold its key: the key itself is not looked at.
    static void advance(Search& search, Bucket* buckets, uint32_t bucket) {
        while (buckets[bucket].number != kNone && buckets[bucket].tag != search.tag) bucket = search.block->next(bucket);
        search.bucket = buckets + bucket;
        search.number = buckets[bucket].number;
    }

    // Pass 3b, direction by direction: one look-up a vertex. Look-ups go in batches, stage by stage, so that
    // the memory they will need is on its way.
    void find_neighbors() {
        const int64_t num_vertices = lattice_.num_vertices;
        Buffer<Bucket> table(num_buckets_);
        fill_tables(table.get());
        Buffer<uint32_t> after(num_vertices);
        Buffer<uint8_t> has_before(num_vertices);
        for (int j = 0; j <= d_; ++j) {
            std::fill(has_before.get(), has_before.get() + num_vertices, uint8_t{0});
            for_blocks([&](const Block& block) { look_up_after(block, j, table.get(), after.get(), has_before.get()); });
            lattice_.directions.push_back(list_chains(has_before.get(), after.get()));
        }
    }

    void look_up_after(const Block& block, int direction, Bucket* table, uint32_t* after, uint8_t* has_before) const {
        constexpr uint32_t kBatch = 128;
        const uint32_t none = static_cast<uint32_t>(lattice_.num_vertices);
        const Key remainder_mask = (Key(1) << layout_.width[0]) - 1;
        // Along a direction every coordinate grows by 1 but the direction's own, which falls by D.
        const Key up = Key(1) - unit_[direction], wrap = all_units_ - static_cast<Key>(d_) - unit_[direction];
        Search searches[kBatch];
        for (uint32_t first = 0; first < block.num_vertices; first += kBatch) {
            const uint32_t count = std::min(kBatch, block.num_vertices - first);
            for (uint32_t i = 0; i < count; ++i) {
                const Key key = keys_[block.first_vertex + first + i];
                Search& s = searches[i];
                s.key = key + ((key & remainder_mask) < static_cast<Key>(d_) ? up : wrap);
                s.block = &blocks_[block_of(s.key)];
                const uint64_t hash = hash_key(s.key);
                s.tag = static_cast<uint32_t>(hash);
                s.bucket = table + s.block->first_bucket + s.block->home(hash);
                __builtin_prefetch(s.bucket);
            }
            for (uint32_t i = 0; i < count; ++i) {
                Search& s = searches[i];
                s.number = kNone;
                if (s.block->num_vertices == 0) continue;
                Bucket* buckets = table + s.block->first_bucket;
                advance(s, buckets, static_cast<uint32_t>(s.bucket - buckets));
                __builtin_prefetch(&keys_[s.block->first_vertex + (s.number == kNone ? 0 : s.number)]);
            }
            for (uint32_t i = 0; i < count; ++i) {
                Search& s = searches[i];
                while (s.number != kNone && keys_[s.block->first_vertex + s.number] != s.key) {
                    Bucket* buckets = table + s.block->first_bucket;
                    advance(s, buckets, s.block->next(static_cast<uint32_t>(s.bucket - buckets)));
                }
                const uint32_t v = block.first_vertex + first + i;
                after[v] = s.number == kNone ? none : s.block->first_vertex + s.number;
                if (s.number != kNone) has_before[after[v]] = 1;
            }
        }
    }

    // Blocks of vertices list the chains that begin in them.
    Lattice::Chains list_chains(const uint8_t* has_before, const uint32_t* after) {
        constexpr int64_t kBlock = 4096;
        const int64_t num_vertices = lattice_.num_vertices, num_blocks = (num_vertices + kBlock - 1) / kBlock;
        const uint32_t none = static_cast<uint32_t>(num_vertices);
        std::vector<std::vector<uint32_t>> found(num_blocks);
        pool_.run(num_blocks, [&](int64_t block, int) {
            const int64_t begin = block * kBlock, end = std::min(begin + kBlock, num_vertices);
            found[block].reserve(2 * kBlock);
            for (int64_t v = begin; v < end; ++v) {
                if (has_before[v] || after[v] == none) continue;
                for (uint32_t u = static_cast<uint32_t>(v), next; u != none; u = next) {
                    next = after[u];
                    found[block].push_back(2 * u + (next == none ? 1 : 0));
                }
            }
        });
        Lattice::Chains chains;
        chains.pieces.assign(num_blocks + 1, 0);
        for (int64_t block = 0; block < num_blocks; ++block)
            chains.pieces[block + 1] = chains.pieces[block] + static_cast<int64_t>(found[block].size());
        chains.entries = Buffer<uint32_t>(chains.pieces[num_blocks]);
        pool_.run(num_blocks, [&](int64_t block, int) {
            std::copy(found[block].begin(), found[block].end(), chains.entries.get() + chains.pieces[block]);
        });
        return chains;
    }

    // Pass 4. Within a block the records are in tile order, so the order in which shares are summed is fixed.
    void assign_slots() {
        lattice_.vertex = Buffer<uint32_t>(num_records_);
        lattice_.slot = Buffer<uint32_t>(num_records_);
        std::vector<uint32_t> first_slot(num_blocks_), first_shared(num_blocks_);
        std::vector<std::vector<uint32_t>> shares(pool_.num_threads());
        auto count_shares = [&](int64_t b, std::vector<uint32_t>& count) {
            count.assign(blocks_[b].num_vertices, 0);
            for (uint32_t i = block_begin_[b]; i < block_begin_[b + 1]; ++i) ++count[number_[i]];
        };
        pool_.run(num_block_groups(), [&](int64_t group, int thread) {
            for (int64_t b = group * kBlockGroup; b < std::min((group + 1) * kBlockGroup, num_blocks_); ++b) {
                count_shares(b, shares[thread]);
                for (uint32_t n : shares[thread]) {
                    first_slot[b] += n > 1 ? n : 0;
                    first_shared[b] += n > 1;
                }
            }
        });
        int64_t slots = lattice_.num_vertices;
        uint32_t shared = 0;
        for (int64_t b = 0; b < num_blocks_; ++b) {
            const uint32_t in_block = first_slot[b], shared_in_block = first_shared[b];
            first_slot[b] = static_cast<uint32_t>(slots);
            first_shared[b] = shared;
            slots += in_block;
            shared += shared_in_block;
        }
        if (slots > int64_t{0xfffffff0}) throw CapacityError("the lattice would need more than 2^32 slots");
        lattice_.num_slots = slots;
        lattice_.shared.resize(shared);
        pool_.run(num_block_groups(), [&](int64_t group, int thread) {
            for (int64_t b = group * kBlockGroup; b < std::min((group + 1) * kBlockGroup, num_blocks_); ++b) {
                std::vector<uint32_t>& next = shares[thread];
                count_shares(b, next);
                uint32_t slot = first_slot[b], s = first_shared[b];
                for (uint32_t n = 0; n < next.size(); ++n) {
                    const uint32_t vertex = blocks_[b].first_vertex + n, count = next[n];
                    next[n] = count > 1 ? slot : vertex;
                    if (count > 1) {
                        lattice_.shared[s++] = {vertex, slot, count};
                        slot += count;
                    }
                }
                for (uint32_t i = block_begin_[b]; i < block_begin_[b + 1]; ++i) {
                    lattice_.vertex[record_[i]] = blocks_[b].first_vertex + number_[i];
                    lattice_.slot[record_[i]] = next[number_[i]]++;
                }
            }
        });
    }

    static constexpr uint32_t kNone = 0xffffffff;

    const BilateralInput& input_;
    const Geometry geometry_;
    const KeyLayout& layout_;
    const std::vector<float>& scale_;
    ThreadPool& pool_;
    const int d_;
    const int64_t tile_voxels_;
    Key unit_[kMaxLatticeFeatures + 1]{}, bias_ = 0, all_units_ = 0;
    Lattice lattice_;
    std::vector<std::vector<Key>> tile_keys_;
    int64_t num_records_ = 0;  // vertices of all tiles, counted in each
    int coarser_ = 0;          // bits of the coordinates that blocks leave out
    // The coordinates' bits that number the blocks, and what each value adds to the number.
    int num_axes_ = 0, field_shift_[kMaxAxes]{};
    uint64_t field_mask_[kMaxAxes]{};
    std::vector<uint32_t> place_[kMaxAxes];
    int64_t num_blocks_ = 0;
    std::vector<uint32_t> block_begin_;  // records of each block
    std::vector<Block> blocks_;
    int64_t num_buckets_ = 0;
    Buffer<Key> keys_;
    Buffer<uint32_t> record_, number_;
};

template <class Function>
auto with_builder(const BilateralInput& input, ThreadPool& pool, Function&& function) {
    const Geometry geometry = choose_geometry(num_features(input));
    std::vector<float> scale;
    for (int i = 0; i < geometry.num_features; ++i)
        scale.push_back(static_cast<float>(feature_scale(geometry.num_features, i, [](double x) { return std::sqrt(x); })));
    int64_t bits = 0;
    const KeyLayout layout = layout_keys(input, geometry, scale, bits);
    // The largest key of all ones marks an empty bucket; fields never reach it, as each has room above its range.
    if (bits <= 64) {
        Builder<uint64_t> builder(input, geometry, layout, scale, pool);
        return function(builder);
    }
    if (bits > 128)
        throw CapacityError("the lattice's cells need " + std::to_string(bits) +
                            "-bit numbers, and 128 is the most; use larger bandwidths");
    Builder<WideKey> builder(input, geometry, layout, scale, pool);
    return function(builder);
}

}  // namespace

Lattice build_lattice(const BilateralInput& input, ThreadPool& pool) {
    return with_builder(input, pool, [](auto& builder) { return builder.build(); });
}

bool fits_lattice(const BilateralInput& input) {
    ThreadPool pool(1);
    try {
        return with_builder(input, pool, [](auto&) { return true; });
    } catch (const CapacityError&) {
        return false;
    }
}

double estimate_vertices_per_voxel(const BilateralInput& input) {
    ThreadPool pool(1);
    if (!fits_lattice(input)) return std::numeric_limits<double>::infinity();
    return with_builder(input, pool, [](auto& builder) { return builder.sample(8); });
}

}  // namespace crf
