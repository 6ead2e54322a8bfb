// The window of the truncated sum: an ellipsoid of voxels around each voxel.
#pragma once

#include "cpu/filter.h"

namespace crf {

constexpr double kLog2e = 1.4426950408889634;  // exp(x) = 2^(x kLog2e)

constexpr double kTruncationRadius = 3.0;  // standard deviations of the spatial part of the kernel

// A pair of voxels of the window: their offset along each box axis, in voxels, and their squared distance in standard deviations.
struct WindowOffset {
    int64_t distance[kMaxAxes];
    double squared;
};

// Voxels on either side along an axis. sigma: standard deviation in voxels; extent: of the box.
int64_t window_radius(double sigma, int64_t extent);

// One of each pair of opposite offsets: the one whose first nonzero distance is positive.
std::vector<WindowOffset> list_window(const BilateralInput& input);

// Pairs per voxel, half of the window's other voxels: without listing them.
double num_window_pairs(const BilateralInput& input);

}  // namespace crf
