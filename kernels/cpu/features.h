// Features of the compact voxels: intensities first, positions last, each over its bandwidth.
#pragma once

#include "cpu/filter.h"

namespace crf {

// Features of `count` compact voxels from `first` on, as num_modalities + num_axes arrays of `stride` floats.
// They count from the feature origin. By default that is the box's corner and the lowest intensities: large offsets then cost no precision,
// and a lattice does not depend on how the voxels are numbered.
void gather_features(const BilateralInput& input, int64_t first, int64_t count, float* features, int64_t stride);

// The same for `length` voxels that follow one another in a row, from a place in the whole grid and coordinates in the box.
void piece_features(const BilateralInput& input, int64_t grid, const int32_t* coordinate, int64_t length, float* features, int64_t stride);

inline int num_features(const BilateralInput& input) { return static_cast<int>(input.intensity.size()) + input.voxels->num_axes; }

}  // namespace crf
