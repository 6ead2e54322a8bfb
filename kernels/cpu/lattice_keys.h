// The lattice's vertices as numbers (KeyLayout in lattice_math.h): the width of each field for an
// image, and steps between vertices.
#pragma once

#include "cpu/filter.h"
#include "cpu/simd.h"
#include "lattice_math.h"

namespace crf {
constexpr int kMaxLatticeFeatures = KeyLayout::kMaxFeatures;

// Barycentric weights are kept in 16 bits, in units of 1 / kWeightUnit.
constexpr int32_t kWeightUnit = 65535;

// The results of lattice_math.h for sixteen voxels, lane by lane.
struct SimplexBatch {
    int32_t quotient[kMaxLatticeFeatures + 1]
                    [kLanes];  // q of the remainder-0 vertex, before the coordinates that wrap
    int32_t order[kMaxLatticeFeatures + 1][kLanes];  // index of the coordinate at each rank
    // of the vertex of each remainder; they sum to kWeightUnit, or to D / 2 more
    int32_t weight[kMaxLatticeFeatures + 1][kLanes];
    int32_t wrapped[kLanes];  // number of coordinates that wrap, with the direction as sign
};

// features: one row of `stride` floats per feature. scale: per feature.
using SimplexFunction = void (*)(const float* features, int64_t stride, const float* scale,
                                 SimplexBatch& batch);

struct LatticeGeometry {
    // of the lattice; the first num_features - (those of the image) are zero for every voxel
    int num_features;
    std::vector<float> scale;  // of each feature, before elevation
    SimplexFunction find;
};

// The smallest compiled lattice for this many features; further features are zero. Throws
// CapacityError above kMaxLatticeFeatures.
LatticeGeometry choose_geometry(int num_features);

using WideKey = unsigned __int128;

// Multiplicative hashing in 32 bits: a power of two over the golden ratio spreads neighboring keys
// over the high bits.
inline uint32_t hash_key(uint64_t key) {
    return static_cast<uint32_t>(key * 0x9E3779B97F4A7C15ull >> 32);
}
inline uint32_t hash_key(uint32_t key) { return key * 0x9E3779B9u; }
inline uint32_t hash_key(WideKey key) {
    // Another odd constant (of xxHash) folds the upper half in, so that the halves do not cancel.
    return hash_key(uint64_t{static_cast<uint64_t>(key) ^
                             static_cast<uint64_t>(key >> 64) * 0xC2B2AE3D27D4EB4Full});
}

// Throws CapacityError if a feature spans more bandwidths than integers can count.
KeyLayout layout_keys(const KernelInput& input, const LatticeGeometry& geometry);

// Total bits of a key's fields.
inline int key_bits(const KeyLayout& layout) {
    return layout.shift[layout.num_features] + layout.width[layout.num_features];
}

// The numbers of a table at sixteen places, which are below `size`.
template <class Key>
inline void look_up(const Key* table, [[maybe_unused]] int size, const int32_t* places,
                    Key* numbers) {
#if defined(__AVX512F__)
    // A table that fits one register; the masked forms, because GCC 12 warns of the others.
    if constexpr (sizeof(Key) == 4) {
        if (size <= 16)
            return store_lanes(numbers,
                               _mm512_maskz_permutexvar_epi32(0xffff, _mm512_loadu_si512(places),
                                                              _mm512_loadu_si512(table)));
    } else if constexpr (sizeof(Key) == 8) {
        for (int half = 0; half < kLanes && size <= 8; half += 8) {
            const __m256i eight =
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(places + half));
            store_lanes(numbers + half, _mm512_maskz_permutexvar_epi64(
                                            0xff, _mm512_maskz_cvtepi32_epi64(0xff, eight),
                                            _mm512_loadu_si512(table)));
        }
        if (size <= 8) return;
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(Key) == 4) {
        const auto eight = [](const auto* from) {
            return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        };
        for (int half = 0; half < kLanes && size <= 8; half += 8)
            store_lanes(numbers + half,
                        _mm256_permutevar8x32_epi32(eight(table), eight(places + half)));
        if (size <= 8) return;
    }
#endif
    for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = table[places[lane]];
}

// Arithmetic on packed keys. Key: uint32_t, uint64_t or WideKey.
template <class Key>
class KeySpace {
   public:
    explicit KeySpace(const KeyLayout& layout)
        : layout_(layout), num_features_(layout.num_features) {
        for (int i = 0; i <= num_features_; ++i) {
            unit_[i] = key_unit<Key>(layout, i);
            bias_ -= unit_[i] * static_cast<Key>(static_cast<int64_t>(layout.lowest[i]));
            all_units_ += unit_[i];
        }
        remainder_mask_ = (Key(1) << layout.width[0]) - 1;
    }

    const KeyLayout& layout() const { return layout_; }
    int num_features() const { return num_features_; }

    // The vertices of the lanes' simplices: keys[k * kLanes + lane] for remainder k.
    void corner_keys(const SimplexBatch& batch, Key* keys) const {
        with_constant<4, 5, 7, 0>(num_features_,
                                  [&](auto features) { corner_keys<features()>(batch, keys); });
    }
    // kFeatures: D, or 0 if known only at run time.
    template <int kFeatures>
    void corner_keys(const SimplexBatch& batch, Key* keys) const {
        const int d = kFeatures > 0 ? kFeatures : num_features_;
        Key key[kLanes],
            unit[kMaxLatticeFeatures + 1][kLanes];  // unit: of the coordinate at each rank
        for (Key& k : key) k = bias_;
        for (int i = 1; i <= d; ++i)
            for (int lane = 0; lane < kLanes; ++lane)
                key[lane] += static_cast<Key>(static_cast<int64_t>(batch.quotient[i][lane]))
                             << layout_.shift[i];
        for (int p = 0; p <= d; ++p) {
            look_up(unit_, d + 1, batch.order[p], unit[p]);
            for (int lane = 0; lane < kLanes; ++lane) {
                const int wrapped = batch.wrapped[lane];
                key[lane] -= p < wrapped ? unit[p][lane] : Key(0);
                key[lane] += p > d + wrapped ? unit[p][lane] : Key(0);
            }
        }
        // From the vertex of remainder k to that of k + 1: one more in every coordinate, except
        // that of the k-th smallest residual.
        for (int k = 0; k <= d; ++k)
            for (int lane = 0; lane < kLanes; ++lane) {
                keys[k * kLanes + lane] = key[lane];
                key[lane] += Key(1) - unit[d - k][lane];
            }
    }

    // The vertex after `key` along a direction: its coordinate falls by D, others grow by 1; if the
    // remainder wraps, quotients grow.
    Key after(Key key, int direction) const {
        const Key d = static_cast<Key>(num_features_);
        return key + ((key & remainder_mask_) < d ? Key(1) - unit_[direction]
                                                  : all_units_ - d - unit_[direction]);
    }

    // The change of a key if all quotients grow by one.
    Key after_all() const { return all_units_; }

   private:
    KeyLayout layout_;
    int num_features_;
    Key unit_[kMaxLatticeFeatures + 1]{};
    Key bias_ = 0, all_units_ = 0;
    Key remainder_mask_ = 0;
};

// Calls function(geometry, key space) with the narrowest keys that hold the image's features.
// Throws CapacityError without any.
template <class Function>
auto with_key_space(const KernelInput& input, Function&& function) {
    const LatticeGeometry geometry = choose_geometry(input.num_features());
    const KeyLayout layout = layout_keys(input, geometry);
    const int bits = key_bits(layout);
    if (bits < 32) return function(geometry, KeySpace<uint32_t>(layout));
    if (bits <= 64) return function(geometry, KeySpace<uint64_t>(layout));
    if (bits > 128)
        throw CapacityError("the lattice's cells need " + std::to_string(bits) +
                            "-bit numbers, and 128 is the most; use larger bandwidths");
    return function(geometry, KeySpace<WideKey>(layout));
}
}  // namespace crf
