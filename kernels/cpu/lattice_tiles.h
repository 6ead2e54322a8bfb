// Pass 1 of building a lattice: the box is cut into tiles, and the simplex of every voxel in each
// tile is found. A tile is a brick of space, whose voxels share most vertices: these have 16-bit
// numbers, and splatted values fit into a small buffer.
#pragma once

#include "cpu/lattice_build.h"
#include "cpu/lattice_keys.h"

namespace crf {
// A Lattice whose tiles are filled in, and the keys of its vertices. A tile's vertices are its
// *records*: a vertex of several tiles has one in each, and they are numbered tile after tile.
template <class Key>
struct LatticeTiles : Lattice {
    std::vector<std::vector<Key>> keys;  // of each tile's vertices, by first touch
    int64_t num_records = 0;
};

// A small hash table that numbers keys in order of insertion; each thread reuses its table.
template <class Key>
class KeyTable {
   public:
    // Most keys of a table: their numbers have 16 bits, and one marks an empty bucket.
    static constexpr int64_t kMostKeys = 65535;

    KeyTable() : found_(kMostKeys + 1) {
        found_[kNoNumber] = kNoKey;
        resize(kFirstBits);
    }

    // Numbers of the keys of the first `lanes` lanes, assigned in order of first touch; keys and
    // numbers: (corner, lane), and other lanes may get any number. No more than kMostKeys different
    // keys may come between two calls of `take`.
    void find_or_add(const Key* keys, int lanes, int num_corners, uint16_t* numbers) {
        while ((static_cast<int64_t>(num_found_) + lanes * num_corners) * kBucketsPerKey >
               buckets_.size)
            grow();
        constexpr int kMostPlaces = kLanes * (kMaxLatticeFeatures + 1), kBits = 64;
        const int count = num_corners * kLanes;
        uint32_t home[kMostPlaces];
        uint8_t is_elsewhere[kMostPlaces];
        for (int i = 0; i < count; ++i) home[i] = first_bucket(keys[i]);
        // Most keys are in their first bucket. Which ones is hard to predict, so nothing branches
        // on it; the others are found in the end.
        for (int first = 0; first < count; first += kLanes) {
            Key present[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) {
                const uint16_t number = numbers[first + lane] = buckets_[home[first + lane]];
                present[lane] = found_[number];
            }
            for (int lane = 0; lane < kLanes; ++lane)
                is_elsewhere[first + lane] = present[lane] != keys[first + lane];
        }
        // of each corner's lanes
        const uint64_t valid = ((uint64_t{1} << lanes) - 1) * 0x0001000100010001ull;
        for (int first = 0; first < count; first += kBits) {
            uint64_t left = 0;
            for (int i = first; i < std::min(first + kBits, count); i += 8)
                left |= uint64_t{bits_of_eight(is_elsewhere + i)} << (i - first);
            for (left &= valid; left != 0; left &= left - 1) {
                const int i = first + std::countr_zero(left);
                numbers[i] = static_cast<uint16_t>(search(keys[i], home[i]));
            }
        }
    }

    // Moves the keys out, and empties the table for its next use.
    std::vector<Key> take() {
        std::vector<Key> keys(found_.get(), found_.get() + num_found_);
        num_found_ = 0;
        std::fill(buckets_.get(), buckets_.get() + buckets_.size, kNoNumber);
        return keys;
    }

   private:
    // An empty bucket has the number of a key of all ones. No vertex has this key, as each field
    // has room above its range.
    static constexpr uint16_t kNoNumber = kMostKeys;
    static constexpr Key kNoKey = ~Key(0);

    static constexpr int kFirstBits = 13;
    static constexpr int64_t kBucketsPerKey = 24;

    uint32_t first_bucket(Key key) const { return hash_key(key) >> down_; }

    // The number of a key that was not in its first bucket.
    uint32_t search(Key key, uint32_t bucket) {
        const uint32_t mask = static_cast<uint32_t>(buckets_.size - 1);
        for (;; bucket = (bucket + 1) & mask) {
            const uint32_t number = buckets_[bucket];
            if (found_[number] == key) return number;
            if (number != kNoNumber) continue;
            buckets_[bucket] = static_cast<uint16_t>(num_found_);
            found_[num_found_] = key;
            return num_found_++;
        }
    }

    void resize(int bits) {
        buckets_ = Buffer<uint16_t>(int64_t{1} << bits);
        std::fill(buckets_.get(), buckets_.get() + buckets_.size, kNoNumber);
        down_ = 32 - bits;
    }

    void grow() {
        resize(32 - down_ + 1);
        const uint32_t mask = static_cast<uint32_t>(buckets_.size - 1);
        for (uint32_t n = 0; n < num_found_; ++n) {
            uint32_t bucket = first_bucket(found_[n]);
            while (buckets_[bucket] != kNoNumber) bucket = (bucket + 1) & mask;
            buckets_[bucket] = static_cast<uint16_t>(n);
        }
    }

    Buffer<uint16_t> buckets_;  // the number of the key in it
    Buffer<Key> found_;         // by number
    uint32_t num_found_ = 0;
    int down_ = 0;
};

// Consecutive voxels of a row within one tile, ready for the geometry.
struct TilePiece {
    int64_t voxel, grid;  // of the first: compact index, and linear index in the whole grid
    int32_t length;
    int32_t coordinate[kMaxAxes];  // of the first, in the box
};

struct TileVoxels {
    Buffer<TilePiece> pieces;          // tile after tile
    std::vector<int64_t> first_piece;  // of each tile, and the end

    int64_t num_tiles() const { return static_cast<int64_t>(first_piece.size()) - 1; }
};

// Cuts the box into bricks of at most this many voxels and assigns the runs to them; bricks without
// voxels are dropped.
inline TileVoxels cut_into_tiles(const Voxels& voxels, int64_t most_voxels) {
    const int axes = voxels.num_axes;
    int64_t extent[kMaxAxes], count[kMaxAxes];
    // As close to a cube as powers of two allow, except for the last axis, which is cut into whole
    // vectors.
    extent[axes - 1] = axes == 1 ? most_voxels : kLanes;
    for (int64_t a = axes - 2, left = most_voxels / kLanes; a >= 0; --a) {
        const double side = std::pow(static_cast<double>(left), 1.0 / static_cast<double>(a + 1));
        // An exact power of two may come out slightly too small.
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
                const int64_t length =
                    std::min((brick + 1) * extent[axes - 1] - x, run.length - done);
                TilePiece piece{
                    run.voxel + done, run.grid + done, static_cast<int32_t>(length), {}};
                for (int a = 0; a < axes; ++a)
                    piece.coordinate[a] = static_cast<int32_t>(a == axes - 1 ? x : c[a]);
                body(brick_row * count[axes - 1] + brick, piece);
                done += length;
            }
        }
    };
    // Count first, then place.
    std::vector<int64_t> position(num_bricks + 1, 0);
    for_brick_pieces([&](int64_t brick, const TilePiece&) { ++position[brick + 1]; });
    TileVoxels tiles;
    tiles.first_piece.push_back(0);
    for (int64_t b = 0; b < num_bricks; ++b) {
        position[b + 1] += position[b];
        if (position[b + 1] > position[b]) tiles.first_piece.push_back(position[b + 1]);
    }
    tiles.pieces = Buffer<TilePiece>(position[num_bricks]);
    for_brick_pieces(
        [&](int64_t brick, const TilePiece& piece) { tiles.pieces[position[brick]++] = piece; });
    return tiles;
}

// For one tile's features, one batch of simplices, and the keys of a tile; each thread reuses it.
template <class Key>
struct EmbeddingScratch {
    explicit EmbeddingScratch(int64_t count) : features(count) {
        std::fill(features.get(), features.get() + features.size, 0.0f);
    }
    Buffer<float> features;
    SimplexBatch batch;
    KeyTable<Key> table;
};

template <class Key>
class TileEmbedding {
   public:
    TileEmbedding(const KernelInput& input, const LatticeGeometry& geometry,
                  const KeySpace<Key>& space)
        : input_(input),
          geometry_(geometry),
          space_(space),
          d_(geometry.num_features),
          tile_voxels_(Lattice::tile_voxels(geometry.num_features)),
          voxels_(cut_into_tiles(*input.voxels, tile_voxels_)) {}

    const TileVoxels& voxels() const { return voxels_; }
    int64_t tile_voxels() const { return tile_voxels_; }
    EmbeddingScratch<Key> make_scratch() const { return EmbeddingScratch<Key>(d_ * tile_voxels_); }

    // Fills in one tile's part of Lattice::local and Lattice::weight, and the scratch with its
    // keys; returns its number of voxels.
    int64_t embed(int64_t tile, EmbeddingScratch<Key>& scratch, uint16_t* local,
                  uint16_t* weight) const {
        const int64_t count = load_features(tile, scratch.features.get());
        SimplexBatch& batch = scratch.batch;
        for (int64_t first = 0; first < count; first += kLanes) {
            geometry_.find(scratch.features.get() + first, tile_voxels_, geometry_.scale.data(),
                           batch);
            const int lanes = static_cast<int>(std::min<int64_t>(kLanes, count - first));
            Key keys[kLanes * (kMaxLatticeFeatures + 1)];
            space_.corner_keys(batch, keys);
            scratch.table.find_or_add(keys, lanes, d_ + 1, local);
            for (int k = 0; k <= d_; ++k)
                for (int lane = 0; lane < kLanes; ++lane)
                    weight[k * kLanes + lane] = static_cast<uint16_t>(batch.weight[k][lane]);
            local += kLanes * (d_ + 1);
            weight += kLanes * (d_ + 1);
        }
        return count;
    }

   private:
    // Rows of tile_voxels_ floats; those of the lattice's features that the image lacks stay zero.
    int64_t load_features(int64_t tile, float* features) const {
        float* const of_image = features + (d_ - input_.num_features()) * tile_voxels_;
        int64_t count = 0;
        for (int64_t p = voxels_.first_piece[tile]; p < voxels_.first_piece[tile + 1]; ++p) {
            const TilePiece& piece = voxels_.pieces[p];
            if (p + kPiecesAhead < voxels_.pieces.size)
                for (const float* intensity : input_.intensity) {
                    const TilePiece& ahead = voxels_.pieces[p + kPiecesAhead];
                    __builtin_prefetch(intensity + ahead.grid);
                    __builtin_prefetch(intensity + ahead.grid + ahead.length - 1);
                }
            piece_features(input_, piece.grid, piece.coordinate, piece.length, of_image + count,
                           tile_voxels_);
            count += piece.length;
        }
        return count;
    }

    const KernelInput& input_;
    const LatticeGeometry& geometry_;
    const KeySpace<Key>& space_;
    const int d_;
    const int64_t tile_voxels_;
    const TileVoxels voxels_;
};

// The pieces, and for each tile the values that are known before its vertices. Returns the voxels
// of all tiles, each in whole batches.
template <class Key>
int64_t list_pieces(const TileVoxels& voxels, LatticeTiles<Key>& result) {
    result.tiles.resize(voxels.num_tiles());
    result.pieces.reserve(voxels.pieces.size);
    int64_t entry = 0;
    for (int64_t t = 0; t < voxels.num_tiles(); ++t) {
        Lattice::Tile& tile = result.tiles[t];
        tile.first_piece = voxels.first_piece[t];
        tile.num_pieces = voxels.first_piece[t + 1] - voxels.first_piece[t];
        tile.first_entry = entry;
        for (int64_t p = voxels.first_piece[t]; p < voxels.first_piece[t + 1]; ++p) {
            result.pieces.push_back({voxels.pieces[p].voxel, voxels.pieces[p].length});
            tile.num_voxels += voxels.pieces[p].length;
        }
        entry += whole_vectors(tile.num_voxels);
    }
    return entry;
}
// Throws CapacityError if 32 bits cannot number the records.
template <class Key>
LatticeTiles<Key> embed_tiles(const KernelInput& input, const LatticeGeometry& geometry,
                              const KeySpace<Key>& space, ThreadPool& pool) {
    const TileEmbedding<Key> embedding(input, geometry, space);
    const int64_t num_tiles = embedding.voxels().num_tiles();
    const int64_t num_corners = geometry.num_features + 1;
    LatticeTiles<Key> result;
    const int64_t num_entries = list_pieces(embedding.voxels(), result) * num_corners;
    result.local = Buffer<uint16_t>(num_entries);
    result.weight = Buffer<uint16_t>(num_entries);
    result.keys.resize(num_tiles);
    std::vector<EmbeddingScratch<Key>> scratch;
    for (int i = 0; i < pool.num_threads(); ++i) scratch.push_back(embedding.make_scratch());
    pool.run(num_tiles, [&](int64_t t, int thread) {
        const int64_t first = result.tiles[t].first_entry * num_corners;
        embedding.embed(t, scratch[thread], result.local.get() + first,
                        result.weight.get() + first);
        result.keys[t] = scratch[thread].table.take();
    });
    int64_t record = 0;
    for (size_t t = 0; t < result.tiles.size(); ++t) {
        Lattice::Tile& tile = result.tiles[t];
        tile.first_vertex = record;
        tile.num_vertices = static_cast<int64_t>(result.keys[t].size());
        record += tile.num_vertices;
        result.largest_tile = std::max(result.largest_tile, tile.num_vertices);
    }
    if (record > int64_t{0xfffffff0})
        throw CapacityError("the lattice would have more than 2^32 vertices");
    result.num_records = record;
    return result;
}

// Distinct vertices per voxel in about this many tiles, spread over the volume.
template <class Key>
double sample_vertices_per_voxel(const KernelInput& input, const LatticeGeometry& geometry,
                                 const KeySpace<Key>& space, int64_t num_samples) {
    const TileEmbedding<Key> embedding(input, geometry, space);
    const int64_t num_tiles = embedding.voxels().num_tiles();
    const int64_t step = std::max<int64_t>(1, num_tiles / num_samples);
    EmbeddingScratch<Key> scratch = embedding.make_scratch();
    std::vector<uint16_t> local(embedding.tile_voxels() * (geometry.num_features + 1)),
        weight(local.size());
    int64_t num_vertices = 0, num_voxels = 0;
    for (int64_t t = step / 2; t < num_tiles; t += step) {
        num_voxels += embedding.embed(t, scratch, local.data(), weight.data());
        num_vertices += static_cast<int64_t>(scratch.table.take().size());
    }
    return static_cast<double>(num_vertices) / static_cast<double>(num_voxels);
}
}  // namespace crf
