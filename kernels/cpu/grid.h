// The dense bilateral grid: its size is known before it is built, which is what its cost depends on.
#pragma once

#include "cpu/filter.h"

namespace crf {

constexpr double kLargestGrid = 2e9;  // cells: 8 GB

// A grid with far more cells than voxels is a mistake that would take minutes: this many, or this many a voxel, are allowed.
constexpr double kGenerousGrid = 1e7, kGenerousGridAVoxel = 200;

struct GridSize {
    int64_t cells[kMaxAxes]{};  // along each axis of the box
    int64_t bins[2]{1, 1};      // along each modality
    float lowest[2]{};          // intensity, where the first cell begins
    double num_cells = 0;
};

GridSize grid_size(const BilateralInput& input);
std::unique_ptr<Filter> make_grid_filter(const BilateralInput& input, const GridSize& size, ThreadPool& pool);

}  // namespace crf
