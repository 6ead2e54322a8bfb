// The dense bilateral grid: its cost depends on its size, which is known before it is built.
#pragma once

#include "cpu/filter.h"
#include "grid_math.h"

namespace crf {

// Cells are counted from the feature origin, and only those that the box and its intensities need exist.
struct GridSize {
    int64_t first_cell[kMaxAxes]{};  // along each axis of the box
    int64_t cells[kMaxAxes]{};
    int32_t first_bin[2]{};  // along each modality
    int64_t bins[2]{1, 1};
    double num_cells = 0;
};

GridSize grid_size(const BilateralInput& input);

// Whether the grid filter supports this input: one or two modalities, and not far more cells than voxels.
bool fits_grid(const BilateralInput& input, const GridSize& size);

// Throws InputError or CapacityError if the input does not fit.
std::unique_ptr<Filter> make_grid_filter(const BilateralInput& input, const GridSize& size, ThreadPool& pool);

}  // namespace crf
