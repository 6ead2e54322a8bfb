// Some of the sixteen voxels of a row of a tile, one bit each: the lowest is the first.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cpu/simd.h"

namespace crf {

typedef uint16_t LaneMask;
constexpr LaneMask kAllLanes = 0xffff;
static_assert(kLanes == 16);

// The lanes that are marked, as a comparison gives them.
inline vint lanes_of(LaneMask mask) {
    const vint bit = {1,      1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                      1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    return (splat_lanes(static_cast<int32_t>(mask)) & bit) != 0;
}

// The lanes where a comparison is true.
template <class V>
inline LaneMask mask_of(V condition) {
    if constexpr (std::is_class_v<V>) {
        return static_cast<LaneMask>(mask_of(condition.low) | mask_of(condition.high) << V::kHalf);
    } else {
#if defined(__AVX512DQ__)
        return _mm512_movepi32_mask((__m512i)condition);
#elif defined(__AVX2__) && !defined(__clang__)
        return static_cast<LaneMask>(_mm256_movemask_ps((__m256)condition));
#elif defined(__SSE2__) && !defined(__clang__)
        return static_cast<LaneMask>(_mm_movemask_ps((__m128)condition));
#else
        uint32_t mask = 0;
        for (size_t lane = 0; lane < sizeof condition / 4; ++lane) mask |= static_cast<uint32_t>(condition[lane] & 1) << lane;
        return static_cast<LaneMask>(mask);
#endif
    }
}

inline LaneMask first_lanes_mask(int64_t count) { return count >= kLanes ? kAllLanes : static_cast<LaneMask>((1u << count) - 1); }

inline bool any_marked(const LaneMask* rows, int64_t count) {
    return std::any_of(rows, rows + count, [](LaneMask mask) { return mask != 0; });
}

}  // namespace crf
