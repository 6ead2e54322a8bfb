// Function qualifiers and scalar forms of the lane operations in cpu/simd.h: with them one header
// serves g++, clang and NVRTC. Includes no standard headers: NVRTC does not have them.
#pragma once

#if defined(__CUDACC__)
#define CRF_HD __host__ __device__ __forceinline__
#else
#define CRF_HD inline
#endif

// Before a loop whose array is to stay in registers: every index becomes a constant. Sixteen lanes
// fill too many of SSE's.
#if defined(__CUDACC__)
#define CRF_UNROLL _Pragma("unroll")
#elif defined(__AVX2__) && !defined(__clang__)
#define CRF_UNROLL _Pragma("GCC unroll 64")
#else
#define CRF_UNROLL
#endif

namespace crf {
// Largest integer not above x; floor, not truncation: coordinates can be negative.
CRF_HD int floor_to_int(float x) {
    const int i = static_cast<int>(x);
    return i - (static_cast<float>(i) > x ? 1 : 0);
}
CRF_HD int truncate_to_int(float x) { return static_cast<int>(x); }
CRF_HD float to_float(int x) { return static_cast<float>(x); }
CRF_HD int select(bool condition, int a, int b) { return condition ? a : b; }
CRF_HD bool is_greater(int a, int b) { return a > b; }
CRF_HD int larger(int a, int b) { return a > b ? a : b; }
CRF_HD int smaller(int a, int b) { return a > b ? b : a; }
}  // namespace crf
