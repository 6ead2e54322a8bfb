// The truncated direct sum: the size of its window is known before it is built, which is what its cost depends on.
#pragma once

#include "cpu/filter.h"

namespace crf {

constexpr double kTruncationRadius = 3.0;  // standard deviations of the spatial part of the kernel

// A pair of voxels of the window: how far apart along each box axis, in voxels, and the square of their distance in standard deviations.
struct WindowOffset {
    int64_t distance[kMaxAxes];
    double squared;
};

// One of each two opposite offsets: the one whose first distance that is not zero is positive.
std::vector<WindowOffset> truncated_window(const BilateralInput& input);

// Pairs a voxel: half of the window's other voxels.
double num_truncated_pairs(const BilateralInput& input);

}  // namespace crf
