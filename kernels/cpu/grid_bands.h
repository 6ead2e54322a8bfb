// Adds up, blends and filters rows of the bilateral grid. Only a stretch of a row holds numbers.
#pragma once

#include "cpu/simd.h"
#include "cpu/voxels.h"

namespace crf {
constexpr int kSpan = 4;  // cells under one cubic B-spline along an axis

// Cells are one bandwidth wide. B-spline * filter * B-spline is then closest, in the least-squares
// sense over all phases, to exp(-d^2 / 2) with this three-tap filter: RMS 0.0057, at most 0.023 off
// in one dimension (docs/reference/math.md, section 5.2).
constexpr float kCenter = 1.67591f, kSide = 0.41632f;

// The three-tap filter of the bilateral grid, along one axis at a time and in place.

// Filters along consecutive rows of `length` floats, with cells of `width` floats. The scratch
// holds a row and two cells.
inline void blur_contiguous(float* rows, int64_t num_rows, int64_t length, int64_t width,
                            float* scratch) {
    std::fill(scratch, scratch + width, 0.0f);
    std::fill(scratch + width + length, scratch + length + 2 * width, 0.0f);
    for (float* row = rows; row < rows + num_rows * length; row += length) {
        std::copy(row, row + length, scratch + width);
        for (int64_t i = 0; i < length; ++i)
            row[i] = kCenter * scratch[i + width] + kSide * (scratch[i] + scratch[i + 2 * width]);
    }
}

// Filters one row across rows. The scratch holds the unfiltered row before, and afterwards this
// one. next: nullptr for the last row.
inline void blur_row(float* row, const float* next, int64_t width, float* scratch) {
    if (next) {
        for (int64_t i = 0; i < width; ++i) {
            const float own = row[i];
            row[i] = kCenter * own + kSide * (scratch[i] + next[i]);
            scratch[i] = own;
        }
    } else {
        for (int64_t i = 0; i < width; ++i) row[i] = kCenter * row[i] + kSide * scratch[i];
    }
}

// Filters across `count` consecutive rows of `length` floats.
inline void blur_strided(float* rows, int64_t count, int64_t length, float* scratch) {
    std::fill(scratch, scratch + length, 0.0f);
    for (int64_t r = 0; r < count; ++r, rows += length)
        blur_row(rows, r + 1 < count ? rows + length : nullptr, length, scratch);
}

// Extends the stretch that holds numbers by `wanted`, with zeros. Places outside the stretch are
// not written and count as zeros.
inline void cover(float* array, Stretch& held, const Stretch& wanted) {
    if (held.is_empty()) held = {wanted.begin, wanted.begin};
    for (const Stretch& missing :
         {Stretch{wanted.begin, held.begin}, Stretch{held.end, wanted.end}})
        if (!missing.is_empty()) std::fill(array + missing.begin, array + missing.end, 0.0f);
    held = held.with(wanted);
}

// A voxel's place along an axis: the first of the four cells around it, and their weights.
struct Place {
    int64_t cell;
    vfloat4 weight;
};

// Up to kGroup rows, or planes, that touch the same four cells: these are loaded and stored once.
struct RowGroup {
    static constexpr int kGroup = 4;
    int count = 0;
    int64_t cell = 0;
    float* row[kGroup];
    Stretch held[kGroup], all;
    vfloat4 weight[kGroup];

    bool takes(int64_t next) const { return count == 0 || (count < kGroup && next == cell); }
    void push(int64_t its_cell, float* from, const Stretch& its_stretch, vfloat4 its_weight) {
        cell = its_cell;
        row[count] = from;
        held[count] = its_stretch;
        all = all.with(its_stretch);
        weight[count++] = its_weight;
    }
};

template <int N>
void add_rows(const RowGroup& group, float* to, int64_t stride) {
    for (int64_t i = group.all.begin; i < group.all.end; i += kLanes) {
        vfloat total[kSpan];
        for (int j = 0; j < kSpan; ++j) total[j] = load(to + j * stride + i);
        for (int n = 0; n < N; ++n) {
            const vfloat from = load(group.row[n] + i);
            for (int j = 0; j < kSpan; ++j) total[j] += from * group.weight[n][j];
        }
        for (int j = 0; j < kSpan; ++j) store(to + j * stride + i, total[j]);
    }
}

// Adds the group's rows, times their weights, to four rows that are `stride` apart, and empties the
// group. The four rows hold numbers wherever a row of the group does.
inline void add_group(RowGroup& group, float* to, int64_t stride) {
    for (int n = 0; n < group.count; ++n) cover(group.row[n], group.held[n], group.all);
    if (group.count > 0)
        with_constant<1, 2, 3, RowGroup::kGroup>(
            group.count, [&](auto count) { add_rows<count()>(group, to, stride); });
    group = {};
}

// Sets a part of N rows, or planes, to weighted sums of the same four rows, which are loaded once.
template <int N>
void blend_rows(float* to, const float* from, int64_t stride, const Place* places,
                const Stretch& part, int64_t to_stride) {
    for (int64_t i = part.begin; i < part.end; i += kLanes) {
        const vfloat a = load(from + i);
        const vfloat b = load(from + stride + i);
        const vfloat c = load(from + 2 * stride + i);
        const vfloat d = load(from + 3 * stride + i);
        for (int n = 0; n < N; ++n) {
            const vfloat4 weight = places[n].weight;
            store(to + n * to_stride + i,
                  a * weight[0] + b * weight[1] + c * weight[2] + d * weight[3]);
        }
    }
}
inline void blend(float* to, const float* from, int64_t stride, const Place* places,
                  int64_t num_places, const Stretch& part, int64_t to_stride) {
    with_constant<1, 2, 3, RowGroup::kGroup>(static_cast<int>(num_places), [&](auto n) {
        blend_rows<n()>(to, from, stride, places, part, to_stride);
    });
}

// Widens each stretch to its neighbors up to `away` places before and after; takes every `step`-th.
inline void widen(const Stretch* from, int64_t count, int64_t step, int64_t away, Stretch* to) {
    for (int64_t i = 0; i < count; ++i) {
        Stretch all;
        for (int64_t k = std::max<int64_t>(0, i - away); k <= std::min(count - 1, i + away); ++k)
            all = all.with(from[k * step]);
        to[i * step] = all;
    }
}

// Filters `part` of rows that are `stride` apart, across the rows. held: the stretch of each row
// that holds numbers before; wider: after. Takes every `step`-th stretch. The scratch holds the
// previous row, unfiltered.
inline void blur_across(float* rows, int64_t count, int64_t stride, const Stretch* held,
                        const Stretch* wider, int64_t step, const Stretch& part, float* scratch) {
    Stretch own = held[0].within(part), before;
    for (int64_t r = 0; r < count; ++r) {
        float *const row = rows + r * stride, *const next = row + stride;
        const bool is_last = r + 1 == count;
        Stretch after = is_last ? Stretch{} : held[(r + 1) * step].within(part);
        const Stretch all = wider[r * step].within(part);
        if (!all.is_empty()) {
            cover(row, own, all);
            cover(scratch, before, all);
            if (!is_last) cover(next, after, all);
            blur_row(row + all.begin, is_last ? nullptr : next + all.begin, all.end - all.begin,
                     scratch + all.begin);
        }
        before = all;
        own = after;
    }
}
}  // namespace crf
