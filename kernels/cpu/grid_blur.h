// The three-tap filter of the bilateral grid, along one axis at a time and in place.
#pragma once

#include <algorithm>
#include <cstdint>

#include "grid_math.h"

namespace crf {

constexpr float kCenter = static_cast<float>(kCenterTap), kSide = static_cast<float>(kSideTap);

// Along consecutive rows of `length` floats, `width` of which lie side by side in a cell. The scratch holds a row and two cells more.
inline void blur_contiguous(float* rows, int64_t num_rows, int64_t length, int64_t width, float* scratch) {
    std::fill(scratch, scratch + width, 0.0f);
    std::fill(scratch + width + length, scratch + length + 2 * width, 0.0f);
    for (float* row = rows; row < rows + num_rows * length; row += length) {
        std::copy(row, row + length, scratch + width);
        for (int64_t i = 0; i < length; ++i) row[i] = kCenter * scratch[i + width] + kSide * (scratch[i] + scratch[i + 2 * width]);
    }
}

// One row of `width` floats, with the previous row, unfiltered, in the scratch, which then holds this one; next: nullptr after the last.
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

// Across `count` consecutive rows of `length` floats.
inline void blur_strided(float* rows, int64_t count, int64_t length, float* scratch) {
    std::fill(scratch, scratch + length, 0.0f);
    for (int64_t r = 0; r < count; ++r, rows += length) blur_row(rows, r + 1 < count ? rows + length : nullptr, length, scratch);
}

}  // namespace crf
