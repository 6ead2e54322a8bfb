// Four numbers for each of as many voxels as a register holds: the four cells around a point on an axis, or their weights.
#pragma once

#include "cpu/simd.h"

namespace crf {

// (cell, power): the weights of the four cells around a point, as polynomials of its fraction of a cell.
constexpr float kSpline[4][4] = {
    {1 / 6.0f, -0.5f, 0.5f, -1 / 6.0f}, {4 / 6.0f, 0, -1, 0.5f}, {1 / 6.0f, 0.5f, 0.5f, -0.5f}, {0, 0, 0, 1 / 6.0f}};

// Weights of the four cells around as many points as there are times four lanes. f: their fractions of cells.
template <class V>
inline V spline_weights(V f) {
    constexpr int kPoints = sizeof(V) / 16;
    constexpr auto factor = [](int power) {
        const float a = kSpline[0][power], b = kSpline[1][power], c = kSpline[2][power], d = kSpline[3][power];
        if constexpr (kPoints == 1) {
            return V{a, b, c, d};
        } else if constexpr (kPoints == 2) {
            return V{a, b, c, d, a, b, c, d};
        } else {
            return V{a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d};
        }
    };
    return factor(0) + f * (factor(1) + f * (factor(2) + f * factor(3)));
}
inline vfloat4 spline_weights(float f) { return spline_weights(splat<vfloat4>(f)); }

#if defined(__AVX512F__)
constexpr int kQuads = 4;
typedef vfloat vquads;

// The four numbers from each of the places on.
inline vquads load_quads(const float* from, const int32_t* place) {
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(from + place[0]));
    v = _mm512_maskz_insertf32x4(0xffff, v, _mm_loadu_ps(from + place[1]), 1);
    v = _mm512_maskz_insertf32x4(0xffff, v, _mm_loadu_ps(from + place[2]), 2);
    return (vquads)_mm512_maskz_insertf32x4(0xffff, v, _mm_loadu_ps(from + place[3]), 3);
}
// Each number four times.
inline vquads spread_quads(const float* from) {
    const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return (vquads)_mm512_maskz_permutexvar_ps(0xffff, lane, _mm512_castps128_ps512(_mm_loadu_ps(from)));
}
// One of each four numbers four times.
template <int Lane>
inline vquads quad_lane(vquads v) {
    return (vquads)_mm512_maskz_permute_ps(0xffff, (__m512)v, Lane * 0x55);
}
#elif defined(__AVX2__)
constexpr int kQuads = 2;
typedef vregister vquads;

inline vquads load_quads(const float* from, const int32_t* place) {
    return (vquads)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + place[0])), _mm_loadu_ps(from + place[1]), 1);
}
inline vquads spread_quads(const float* from) {
    return (vquads)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_broadcast_ss(from)), _mm_broadcast_ss(from + 1), 1);
}
template <int Lane>
inline vquads quad_lane(vquads v) {
    return (vquads)_mm256_permute_ps((__m256)v, Lane * 0x55);
}
#else
constexpr int kQuads = 1;
typedef vfloat4 vquads;

inline vquads load_quads(const float* from, const int32_t* place) { return load4(from + *place); }
inline vquads spread_quads(const float* from) { return splat<vquads>(*from); }
template <int Lane>
inline vquads quad_lane(vquads v) {
    return splat<vquads>(v[Lane]);
}
#endif

// The sum of what part(0) to part(3) give, each times its weight.
template <class Part>
[[gnu::always_inline]] inline vquads blend_quads(vquads weight, Part&& part) {
    vquads total = part(0) * quad_lane<0>(weight);
    total += part(1) * quad_lane<1>(weight);
    total += part(2) * quad_lane<2>(weight);
    return total + part(3) * quad_lane<3>(weight);
}

inline vquads load_quads(const vfloat4* from) { return load_lanes<vquads>(reinterpret_cast<const float*>(from)); }

}  // namespace crf
