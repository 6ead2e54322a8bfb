// The one-dimensional factors of the spatial kernel.
#pragma once

#include <vector>

#include "cpu/voxels.h"

namespace crf {

// Radius, in standard deviations, within which a tap has its full weight. A Gaussian is 3e-4 there, with 6e-5 of its mass beyond.
inline constexpr double kSpatialRadius = 4.0;

// Along one box axis, at distance 0, 1, ... voxels.
struct SpatialTaps {
    std::vector<double> weight;
    std::vector<double> slope;  // theta_gamma times the derivative of the weight with respect to theta_gamma
};

// The taps of each box axis. Within one voxel beyond `radius` standard deviations the Gaussian fades to zero, with a continuous slope, so
// that no weight jumps when theta_gamma changes and another voxel comes within reach (docs/reference/math.md).
std::vector<SpatialTaps> spatial_taps(const Voxels& voxels, const std::vector<double>& theta_gamma, double radius);

// sigma: standard deviation along each axis, in voxels.
std::vector<SpatialTaps> spatial_taps(const std::vector<double>& sigma, const std::vector<int64_t>& shape, double radius);

}  // namespace crf
