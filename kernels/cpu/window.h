// The window of the truncated sum: an ellipsoid of voxels around each voxel.
#pragma once

#include "cpu/filter.h"

namespace crf {
// Relative: voxels on the window's surface belong to it, however their distance was rounded.
constexpr double kRounding = numerics::RADIUS_MARGIN;

// Squared distance in standard deviations up to which a voxel belongs to the window.
constexpr double kLargestSquare = kTruncationRadius * kTruncationRadius * (1 + kRounding);

// Voxels of the window on either side along an axis. sigma: standard deviation in voxels; extent:
// of the grid.
int64_t window_radius(double sigma, int64_t extent);

// A voxel of the window: its distance along each axis, in voxels, and the square of that in
// standard deviations.
struct WindowOffset {
    int64_t distance[kMaxAxes];
    double squared[kMaxAxes];
};

// One of each pair of opposite offsets: the one whose first nonzero distance is positive.
std::vector<WindowOffset> list_window(const std::vector<double>& sigma,
                                      const std::vector<int64_t>& shape);

// Pairs per voxel, half of the window's other voxels, counted without a list.
double num_window_pairs(const std::vector<double>& sigma, const std::vector<int64_t>& shape);
double num_window_pairs(const BilateralInput& input);
}  // namespace crf
