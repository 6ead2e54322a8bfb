// The window of the truncated sum: an ellipsoid of voxels around each voxel.
#pragma once

#include "cpu/filter.h"

namespace crf {
// Relative: voxels on the window's surface belong to it, however their distance was rounded.
constexpr double kRounding = 1e-6;

// Squared distance in standard deviations up to which a voxel belongs to the window.
constexpr double kLargestSquare = kTruncationRadius * kTruncationRadius * (1 + kRounding);

// Voxels on either side along an axis. sigma: standard deviation in voxels; extent: of the box.
inline int64_t window_radius(double sigma, int64_t extent) {
    // Compared as floating point, because a huge bandwidth overflows any integer.
    return static_cast<int64_t>(
        std::min(kTruncationRadius * sigma * (1 + kRounding), static_cast<double>(extent - 1)));
}

// Pairs per voxel, half of the window's other voxels, counted without a list.
double num_window_pairs(const BilateralInput& input);
}  // namespace crf
