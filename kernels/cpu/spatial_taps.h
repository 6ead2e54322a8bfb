// The one-dimensional Gaussians that the spatial kernel is a product of.
#pragma once

#include <vector>

#include "cpu/voxels.h"

namespace crf {

// One list a box axis: the weight at distance 0, 1, ... voxels, cut at four standard deviations (where it is 3e-4) or the box's extent.
std::vector<std::vector<double>> spatial_taps(const Voxels& voxels, const std::vector<double>& theta_gamma);

}  // namespace crf
