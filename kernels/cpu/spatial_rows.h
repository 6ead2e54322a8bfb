// Filters rows with the taps of one axis: along the rows, or across them, in panels of columns.
#pragma once

#include "cpu/filter.h"
#include "cpu/simd.h"

namespace crf {
// The taps along one box axis, at distance 0, 1, ... voxels.
struct SpatialTaps {
    std::vector<double> weight;
    // theta_gamma times the derivative of the weight with respect to theta_gamma
    std::vector<double> slope;
};

// The taps of each axis; sigma: standard deviations in voxels. Within one voxel beyond the radius
// the Gaussian fades to zero, with a continuous slope, so that no weight jumps when theta_gamma
// changes and another voxel comes within reach (docs/reference/math.md).
inline std::vector<SpatialTaps> spatial_taps(const std::vector<double>& sigma,
                                             const std::vector<int64_t>& shape) {
    std::vector<SpatialTaps> taps(sigma.size());
    for (size_t a = 0; a < sigma.size(); ++a) {
        const double reach = kSpatialRadius * sigma[a];
        // Compared as floating point, because a huge bandwidth overflows any integer.
        const int64_t last =
            static_cast<int64_t>(std::min(std::ceil(reach), static_cast<double>(shape[a] - 1)));
        for (int64_t k = 0; k <= last; ++k) {
            const double u = static_cast<double>(k) / sigma[a], gaussian = std::exp(-0.5 * u * u);
            // 0 at the end of the kernel, 1 where it has its full weight
            const double x = std::clamp(reach + 1 - static_cast<double>(k), 0.0, 1.0);
            const double fade = x * x * (3 - 2 * x), fade_slope = 6 * x * (1 - x) * reach;
            taps[a].weight.push_back(gaussian * fade);
            // A tap with full weight has only the Gaussian's slope; and reach may be infinite.
            taps[a].slope.push_back(x < 1 ? gaussian * (u * u * fade + fade_slope)
                                          : gaussian * u * u);
        }
    }
    return taps;
}

// columns of a panel: four vectors, so that a panel of some hundred rows stays in L1 and L2
constexpr int64_t kColumns = 4 * kLanes;

// Vectors of a panel's row that are filtered together: as many as registers hold.
#if defined(__AVX512F__)
constexpr int kVectorsTogether = 2;
#else
constexpr int kVectorsTogether = 1;
#endif

// Room for `size` numbers between `margin` zeros on either side.
inline float* padded_copy(Buffer<float>& scratch, int64_t size, int64_t margin) {
    scratch.grow(size + 2 * margin);
    float* const first = scratch.get() + margin;
    std::fill(scratch.get(), first, 0.0f);
    std::fill(first + size, first + size + margin, 0.0f);
    return first;
}

// Sixteen lanes of two vectors, one after another, from lane `First` on.
template <int First>
inline vfloat two_vectors(vfloat low, vfloat high) {
    if constexpr (First == 0) return low;
    if constexpr (First == kLanes) return high;
#if defined(__AVX512F__)
    return (vfloat)_mm512_maskz_alignr_epi32(0xffff, (__m512i)high, (__m512i)low, First % kLanes);
#else
    return shuffle(low, high, [](int lane) { return (First + lane) % (2 * kLanes); });
#endif
}

// Adds the neighbors K to kLanes voxels away. Most are extracted from three loaded vectors, because
// most unaligned loads cross a cache line; some are loaded, because shuffles and loads do not wait
// for each other.
template <int K>
[[gnu::always_inline]] inline void add_near(vfloat before, vfloat own, vfloat after,
                                            const float* center, const std::vector<float>& taps,
                                            vfloat& total) {
    if (static_cast<size_t>(K) >= taps.size()) return;
    const vfloat next = K % 2 == 0 ? two_vectors<K>(own, after) : load(center + K);
    total += (two_vectors<kLanes - K>(before, own) + next) * taps[K];
    if constexpr (K < kLanes) add_near<K + 1>(before, own, after, center, taps, total);
}

// Filters one row from a padded copy.
inline void filter_row(const float* center, float* row, int64_t length,
                       const std::vector<float>& taps) {
    const int64_t radius = static_cast<int64_t>(taps.size()) - 1;
    vfloat before = load(center - kLanes), own = load(center);
    for (int64_t i = 0; i < length; i += kLanes) {
        const vfloat after = load(center + i + kLanes);
        vfloat total = own * taps[0];
        add_near<1>(before, own, after, center + i, taps, total);
        for (int64_t k = kLanes + 1; k <= radius; ++k)
            total += (load(center + i - k) + load(center + i + k)) * taps[k];
        store_some(row + i, total, length - i);
        before = own;
        own = after;
    }
}

// Room for a row of the last axis that `filter_row` is to read: values beyond its ends are zero.
inline float* padded_row(Buffer<float>& scratch, int64_t length, const std::vector<float>& taps) {
    const int64_t radius = static_cast<int64_t>(taps.size()) - 1;
    return padded_copy(scratch, length, std::max<int64_t>(radius, kLanes) + kLanes);
}

// Filters one row, or two consecutive rows, of a panel.
template <int kRows>
void filter_some_rows(const float* copy, const std::vector<float>& taps, float* to, int64_t stride,
                      int64_t width) {
    const int64_t radius = static_cast<int64_t>(taps.size()) - 1;
    for (int64_t first = 0; first < width; first += kVectorsTogether * kLanes) {
        const float* const row = copy + first;
        vfloat total[kRows][kVectorsTogether], low[kVectorsTogether], high[kVectorsTogether];
        for (int v = 0; v < kVectorsTogether; ++v) {
            low[v] = load(row + v * kLanes);
            high[v] = load(row + (kRows - 1) * kColumns + v * kLanes);
            total[0][v] = low[v] * taps[0];
            if constexpr (kRows == 2) total[1][v] = high[v] * taps[0];
        }
        for (int64_t k = 1; k <= radius; ++k) {
            const float* const before = row - k * kColumns;
            const float* const after = row + (kRows - 1 + k) * kColumns;
            for (int v = 0; v < kVectorsTogether; ++v) {
                const vfloat below = load(before + v * kLanes), above = load(after + v * kLanes);
                if constexpr (kRows == 2) {
                    // Each row now needs the value that the other row read last.
                    total[0][v] += (below + high[v]) * taps[k];
                    total[1][v] += (low[v] + above) * taps[k];
                    low[v] = below;
                    high[v] = above;
                } else {
                    total[0][v] += (below + above) * taps[k];
                }
            }
        }
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < kVectorsTogether; ++v) {
                const int64_t left = width - first - v * kLanes;
                if (left > 0) store_some(to + r * stride + first + v * kLanes, total[r][v], left);
            }
    }
}

// Filters rows `begin` to `end` from the panel's copy, two at a time: both read mostly the same
// rows.
inline void filter_rows(const float* copy, int64_t begin, int64_t end,
                        const std::vector<float>& taps, float* panel, int64_t stride,
                        int64_t width) {
    int64_t i = begin;
    for (; i + 2 <= end; i += 2) {
        // The next panel's rows are far apart: the hardware cannot predict them.
        for (int64_t c = 0; c < 2 * kColumns; c += kLanes)
            __builtin_prefetch(panel + (i + c / kColumns) * stride + kColumns + c % kColumns, 1);
        filter_some_rows<2>(copy + i * kColumns, taps, panel + i * stride, stride, width);
    }
    if (i < end) filter_some_rows<1>(copy + i * kColumns, taps, panel + i * stride, stride, width);
}

// Filters one panel in place: `width` columns of rows `stride` apart. Only `needed` rows change.
inline void filter_panel(float* panel, int64_t length, int64_t stride, int64_t width,
                         const Stretch& needed, const std::vector<float>& taps,
                         Buffer<float>& scratch) {
    if (needed.is_empty()) return;
    const int64_t radius = static_cast<int64_t>(taps.size()) - 1;
    const int64_t first = std::max<int64_t>(0, needed.begin - radius);
    const int64_t last = std::min(length, needed.end + radius);
    float* const center = padded_copy(scratch, length * kColumns, radius * kColumns);
    for (int64_t i = first; i < last; ++i) {
        for (int64_t c = 0; c < kColumns; c += kLanes)
            store(center + i * kColumns + c,
                  c < width ? load_some(panel + i * stride + c, width - c) : vfloat{});
    }
    // Rows out of reach of all nonzero rows stay zero: only the rows within reach are filtered.
    const auto has_values = [&](int64_t i) { return !is_zero(center + i * kColumns, kColumns); };
    for (int64_t i = first, end = needed.begin; i < last;) {
        if (!has_values(i)) {
            ++i;
            continue;
        }
        const int64_t begin = std::max(end, i - radius);
        for (end = i + radius + 1; i < std::min(last, end + radius); ++i)
            if (has_values(i)) end = i + radius + 1;
        filter_rows(center, begin, std::min(end, needed.end), taps, panel, stride, width);
    }
}

// Filters a slab of `size` values across an axis, in place. needed: each panel's rows; nullptr:
// all.
inline void filter_across(float* slab, int64_t size, int64_t length, int64_t stride,
                          const std::vector<float>& taps, const Stretch* needed,
                          Buffer<float>& scratch) {
    for (int64_t outer = 0; outer < size; outer += length * stride)
        for (int64_t column = 0; column < stride; column += kColumns) {
            float* const panel = slab + outer + column;
            filter_panel(panel, length, stride, std::min(kColumns, stride - column),
                         needed ? *needed++ : Stretch{0, length}, taps, scratch);
        }
}

inline int64_t num_panels(int64_t inner) { return (inner + kColumns - 1) / kColumns; }
}  // namespace crf
