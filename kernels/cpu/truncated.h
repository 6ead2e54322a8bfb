// The truncated direct sum: the size of its window is known before it is built, which is what its cost depends on.
#pragma once

#include "cpu/filter.h"

namespace crf {

constexpr double kTruncationRadius = 3.0;  // standard deviations of the spatial part of the kernel

// Pairs a voxel: half of the window's other voxels.
double num_truncated_pairs(const BilateralInput& input);

}  // namespace crf
