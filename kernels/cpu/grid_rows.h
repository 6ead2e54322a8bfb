// Rows of the bilateral grid with one modality whose intensity cells fit into one vector per
// spatial cell. The cells stay in registers, and a look-up is a permutation of lanes. Only where
// the instruction set has such permutations.
#pragma once

#include "cpu/simd.h"

namespace crf {
// (cell, power): the weights of the four cells around a point, as polynomials of its fraction of a
// cell.
constexpr float kSpline[4][4] = {{1 / 6.0f, -0.5f, 0.5f, -1 / 6.0f},
                                 {4 / 6.0f, 0, -1, 0.5f},
                                 {1 / 6.0f, 0.5f, 0.5f, -0.5f},
                                 {0, 0, 0, 1 / 6.0f}};

// Weights of the four cells around points, four lanes per point. f: the points' fractions of cells.
template <class V>
inline V spline_weights(V f) {
    constexpr int kPoints = sizeof(V) / 16;
    constexpr auto factor = [](int power) {
        const float a = kSpline[0][power];
        const float b = kSpline[1][power];
        const float c = kSpline[2][power];
        const float d = kSpline[3][power];
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
    return (vquads)_mm512_maskz_permutexvar_ps(0xffff, lane,
                                               _mm512_castps128_ps512(_mm_loadu_ps(from)));
}
// Every fourth number, four times.
template <int Lane>
inline vquads quad_lane(vquads v) {
    return (vquads)_mm512_maskz_permute_ps(0xffff, (__m512)v, Lane * 0x55);
}
#elif defined(__AVX2__)
constexpr int kQuads = 2;
typedef vregister vquads;

inline vquads load_quads(const float* from, const int32_t* place) {
    return (vquads)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + place[0])),
                                        _mm_loadu_ps(from + place[1]), 1);
}
inline vquads spread_quads(const float* from) {
    return (vquads)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_broadcast_ss(from)),
                                        _mm_broadcast_ss(from + 1), 1);
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

// The sum of part(0) to part(3), each times its weight.
template <class Part>
[[gnu::always_inline]] inline vquads blend_quads(vquads weight, Part&& part) {
    vquads total = part(0) * quad_lane<0>(weight);
    total += part(1) * quad_lane<1>(weight);
    total += part(2) * quad_lane<2>(weight);
    return total + part(3) * quad_lane<3>(weight);
}

inline vquads load_quads(const vfloat4* from) {
    return load_lanes<vquads>(reinterpret_cast<const float*>(from));
}

// Whether the instruction set can place a vector's lanes in another vector and look them up there.
#if defined(__AVX512F__)
constexpr bool kPlacesLanes = true, kLooksUpLanes = true;

// Lane i of the result is lane index[i] of `table`, modulo the number of lanes.
inline vfloat look_up(vfloat table, vint index) {
    return (vfloat)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, (__m512)table);
}

// The four numbers at one of the quads at lanes first to first + 3, zeros in the others.
template <int Quad>
inline vfloat place_quad(vquads four, int32_t first) {
    const vint lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512i index = (__m512i)(lane - first);
    const __mmask16 inside = _mm512_cmplt_epu32_mask(index, _mm512_maskz_set1_epi32(0xffff, 4));
    return (vfloat)_mm512_maskz_permutexvar_ps(inside, (__m512i)((vint)index + 4 * Quad),
                                               (__m512)four);
}
#else
constexpr bool kLooksUpLanes = false;

inline vfloat look_up(vfloat table, vint index) {
    float from[kLanes], found[kLanes];
    store(from, table);
    for (int i = 0; i < kLanes; ++i) found[i] = from[index[i] % kLanes];
    return load(found);
}
#if defined(__AVX2__)
constexpr bool kPlacesLanes = true;

template <int Quad>
inline vfloat place_quad(vquads four, int32_t first) {
    static constexpr int32_t kInside[] = {0,  0,  0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1, -1,
                                          -1, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  0};
    const __m256i lane = _mm256_setr_epi32(4 * Quad, 4 * Quad + 1, 4 * Quad + 2, 4 * Quad + 3,
                                           4 * Quad + 4, 4 * Quad + 5, 4 * Quad + 6, 4 * Quad + 7);
    const __m256 turned =
        _mm256_permutevar8x32_ps((__m256)four, _mm256_sub_epi32(lane, _mm256_set1_epi32(first)));
    const auto part = [&](int i) {
        const __m256i inside =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kInside + 12 - first + i));
        return (vregister)_mm256_and_ps(turned, _mm256_castsi256_ps(inside));
    };
    if constexpr (std::is_class_v<vfloat>) {
        return {part(0), part(8)};
    } else {  // clang's vectors are wider than its registers
        return (vfloat)__builtin_shufflevector(part(0), part(8), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,
                                               11, 12, 13, 14, 15);
    }
}
#else
constexpr bool kPlacesLanes = false;

template <int Quad>
inline vfloat place_quad(vquads four, int32_t first) {
    alignas(vfloat) float placed[kLanes]{};
    store_lanes(placed + first, four);
    return load(placed);
}
#endif
#endif

// The weights of the four cells around points at fraction f of their cells.
inline void spline_weights(vfloat f, vfloat (&weight)[4]) {
    for (int k = 0; k < 4; ++k)
        weight[k] = kSpline[k][0] + f * (kSpline[k][1] + f * (kSpline[k][2] + f * kSpline[k][3]));
}

// A row's voxels along x, and the cells that they touch.
class NarrowRows {
   public:
    // Voxels of a row times its spatial cells: the table of weights should stay in the cache.
    static constexpr int64_t kMostWeights = 1 << 16;

    // cell, weight: the first cell of each voxel along x, and the weights of the four from there.
    void prepare(const std::vector<int32_t>& cell, const std::vector<vfloat4>& weight,
                 int64_t length, int64_t num_cells) {
        stride_ = length + kLanes;
        cell_.assign(cell.begin(), cell.begin() + length);
        dense_.assign(num_cells * stride_, 0.0f);
        for (int j = 0; j < 4; ++j) weight_[j].assign(stride_, 0.0f);
        for (int64_t x = 0; x < length; ++x)
            for (int j = 0; j < 4; ++j) {
                weight_[j][x] = weight[x][j];
                dense_[(cell_[x] + j) * stride_ + x] = weight[x][j];
            }
    }

    // The cells of the row being splatted: four spatial cells at a time, from number `first` on.
    struct Window {
        int64_t first = 0;
        vfloat cell[4]{};
    };

    // Adds `count` voxels, the first of them at x, to the row `to`. bin: the first intensity cell;
    // f: the fraction of it.
    void splat(Window& window, int64_t x, int count, const vfloat& value, const int32_t* bin,
               const float* f, float* to) const {
        alignas(vfloat) float scaled[4][kLanes];
        for (int j = 0; j < 4; ++j) store(scaled[j], load(weight_[j].data() + x) * value);
        // In registers; the array's elements would stay in memory.
        vfloat a = window.cell[0], b = window.cell[1], c = window.cell[2], d = window.cell[3];
        const auto add = [&](vfloat placed, int i) __attribute__((always_inline)) {
            for (; window.first < cell_[x + i]; ++window.first) {
                store(to + window.first * kLanes, a);
                a = b;
                b = c;
                c = d;
                d = vfloat{};
            }
            a += placed * scaled[0][i];
            b += placed * scaled[1][i];
            c += placed * scaled[2][i];
            d += placed * scaled[3][i];
        };
        for (int i = 0; i < count; i += kQuads) {
            const vquads four = spline_weights(spread_quads(f + i));
            add(place_quad<0>(four, bin[i]), i);
            if constexpr (kQuads > 1)
                if (i + 1 < count) add(place_quad<1>(four, bin[i + 1]), i + 1);
            if constexpr (kQuads > 2) {
                if (i + 2 < count) add(place_quad<2>(four, bin[i + 2]), i + 2);
                if (i + 3 < count) add(place_quad<3>(four, bin[i + 3]), i + 3);
            }
        }
        window.cell[0] = a;
        window.cell[1] = b;
        window.cell[2] = c;
        window.cell[3] = d;
    }

    // To be called when the row ends.
    void finish(const Window& window, float* to) const {
        for (int j = 0; j < 4; ++j) store(to + (window.first + j) * kLanes, window.cell[j]);
    }

    // The blended cells at `count` voxels, the first of them at x.
    vfloat slice(const float* from, int64_t x, int count, const int32_t* bin,
                 const float* f) const {
        const vint first = load_lanes<vint>(bin);
        vfloat blended[4]{};
        for (int64_t c = cell_[x]; c < cell_[x + count - 1] + 4; ++c) {
            const vfloat cells = load(from + c * kLanes);
            const vfloat across = load(dense_.data() + c * stride_ + x);
            for (int k = 0; k < 4; ++k) blended[k] += look_up(cells, first + k) * across;
        }
        vfloat weight[4];
        spline_weights(load(f), weight);
        return (blended[0] * weight[0] + blended[1] * weight[1]) +
               (blended[2] * weight[2] + blended[3] * weight[3]);
    }

   private:
    int64_t stride_ = 0;
    std::vector<int32_t> cell_;
    std::vector<float> weight_[4], dense_;  // of each of a voxel's four cells; (cell, voxel)
};
}  // namespace crf
