// The lattice's vertices as numbers (KeyLayout in lattice_math.h): the width of each field for an image, and steps between vertices.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/errors.h"
#include "cpu/features.h"
#include "cpu/lattice_geometry.h"
#include "lattice_math.h"

namespace crf {

using WideKey = unsigned __int128;

// Multiplicative hashing: 2^64 over the golden ratio spreads neighboring keys over the high bits.
inline uint64_t hash_key(uint64_t key) { return key * 0x9E3779B97F4A7C15ull; }
inline uint64_t hash_key(WideKey key) {
    // Another odd constant (of xxHash) folds the upper half in, so that the halves do not cancel.
    return hash_key(uint64_t{static_cast<uint64_t>(key) ^ static_cast<uint64_t>(key >> 64) * 0xC2B2AE3D27D4EB4Full});
}

// Throws CapacityError if a feature spans more bandwidths than integers can count.
KeyLayout layout_keys(const BilateralInput& input, const LatticeGeometry& geometry);

// Total bits of a key's fields.
inline int key_bits(const KeyLayout& layout) { return layout.shift[layout.num_features] + layout.width[layout.num_features]; }

// Arithmetic on packed keys. Key: uint64_t or WideKey.
template <class Key>
class KeySpace {
   public:
    explicit KeySpace(const KeyLayout& layout) : layout_(layout), num_features_(layout.num_features) {
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
        const int d = num_features_;
        Key key[kLanes], unit[kMaxLatticeFeatures + 1][kLanes];  // unit: of the coordinate at each rank
        for (Key& k : key) k = bias_;
        for (int i = 1; i <= d; ++i)
            for (int lane = 0; lane < kLanes; ++lane)
                key[lane] += static_cast<Key>(static_cast<int64_t>(batch.quotient[i][lane])) << layout_.shift[i];
        for (int p = 0; p <= d; ++p) {
            units_of(batch.order[p], unit[p]);
            for (int lane = 0; lane < kLanes; ++lane) {
                const int wrapped = batch.wrapped[lane];
                key[lane] -= p < wrapped ? unit[p][lane] : Key(0);
                key[lane] += p > d + wrapped ? unit[p][lane] : Key(0);
            }
        }
        // From the vertex of remainder k to that of k + 1: one more in every coordinate, except that of the k-th smallest residual.
        for (int k = 0; k <= d; ++k)
            for (int lane = 0; lane < kLanes; ++lane) {
                keys[k * kLanes + lane] = key[lane];
                key[lane] += Key(1) - unit[d - k][lane];
            }
    }

    // The vertex after `key` along a direction: every coordinate grows by 1, except the direction's own, which falls by D. If the
    // remainder wraps to 0, all quotients grow instead.
    Key after(Key key, int direction) const {
        const Key d = static_cast<Key>(num_features_);
        return key + ((key & remainder_mask_) < d ? Key(1) - unit_[direction] : all_units_ - d - unit_[direction]);
    }

    // What is added to a key if all quotients grow by one.
    Key after_all() const { return all_units_; }

    // The D + 1 coordinates of a vertex, which sum to 0.
    void decode(Key key, int64_t* coordinate) const {
        const int64_t size = num_features_ + 1, remainder = static_cast<int64_t>(key & remainder_mask_);
        coordinate[0] = 0;
        for (int i = 1; i <= num_features_; ++i) {
            const int64_t field =
                static_cast<int64_t>(static_cast<uint64_t>(key >> layout_.shift[i])) & ((int64_t{1} << layout_.width[i]) - 1);
            coordinate[i] = size * (field + layout_.lowest[i]) + remainder;
            coordinate[0] -= coordinate[i];
        }
    }

   private:
    // The units of sixteen coordinates.
    void units_of(const int32_t* coordinate, Key* unit) const {
#if defined(__AVX512F__)
        if constexpr (sizeof(Key) == 8) {
            if (num_features_ < 16) {
                const __m512i low = _mm512_loadu_si512(unit_), high = _mm512_loadu_si512(unit_ + 8);
                for (int lane = 0; lane < kLanes; lane += 8) {
                    const __m512i index =
                        _mm512_maskz_cvtepi32_epi64(0xff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(coordinate + lane)));
                    _mm512_storeu_si512(unit + lane, _mm512_maskz_permutex2var_epi64(0xff, low, index, high));
                }
                return;
            }
        }
#endif
        for (int lane = 0; lane < kLanes; ++lane) unit[lane] = unit_[coordinate[lane]];
    }

    KeyLayout layout_;
    int num_features_;
    Key unit_[kMaxLatticeFeatures + 1]{};
    Key bias_ = 0, all_units_ = 0;
    Key remainder_mask_ = 0;
};

// Calls function(geometry, key space) with the geometry and the narrowest keys that hold the image's features. Throws CapacityError if
// there are none.
template <class Function>
auto with_key_space(const BilateralInput& input, Function&& function) {
    const LatticeGeometry geometry = choose_geometry(num_features(input));
    const KeyLayout layout = layout_keys(input, geometry);
    const int bits = key_bits(layout);
    if (bits <= 64) return function(geometry, KeySpace<uint64_t>(layout));
    if (bits > 128)
        throw CapacityError("the lattice's cells need " + std::to_string(bits) +
                            "-bit numbers, and 128 is the most; use larger bandwidths");
    return function(geometry, KeySpace<WideKey>(layout));
}

}  // namespace crf
