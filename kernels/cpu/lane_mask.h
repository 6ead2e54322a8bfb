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
    return ((vint{} + static_cast<int32_t>(mask)) & bit) != 0;
}

// The lanes where a comparison is true.
inline LaneMask mask_of(vint condition) {
#if defined(__AVX512DQ__)
    return _mm512_movepi32_mask((__m512i)condition);
#else
    uint32_t mask = 0;
    for (int lane = 0; lane < kLanes; ++lane) mask |= static_cast<uint32_t>(condition[lane] & 1) << lane;
    return static_cast<LaneMask>(mask);
#endif
}

inline LaneMask first_lanes_mask(int64_t count) { return count >= kLanes ? kAllLanes : static_cast<LaneMask>((1u << count) - 1); }

inline bool any_marked(const LaneMask* rows, int64_t count) {
    return std::any_of(rows, rows + count, [](LaneMask mask) { return mask != 0; });
}

}  // namespace crf
