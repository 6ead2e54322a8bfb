#include <algorithm>
#include <cmath>

#include "cpu/grid.h"

namespace crf {

namespace {

// A grid with far more cells than voxels is a mistake that would take minutes. The limits: this many cells, or this many per voxel, and 8
// GB.
constexpr double kGenerousGrid = 1e7, kGenerousGridAVoxel = 200, kLargestGrid = 2e9;

}  // namespace

GridSize grid_size(const BilateralInput& input) {
    const Voxels& voxels = *input.voxels;
    GridSize size;
    double cells = 1;
    for (int a = 0; a < voxels.num_axes; ++a) {
        const double begin = std::floor(input.first[a] * voxels.spacing[a] / input.theta_alpha[a]);
        const double extent = (input.first[a] + voxels.box_shape[a] - 1) * voxels.spacing[a] / input.theta_alpha[a] - begin;
        size.first_cell[a] = static_cast<int64_t>(begin);
        size.cells[a] = static_cast<int64_t>(extent) + kSpan;
        cells *= extent + kSpan;
    }
    for (size_t m = 0; m < input.intensity.size() && m < 2; ++m) {
        // In single precision, like the voxels' own cells: none of them is before the first.
        const float begin = std::floor((input.lowest[m] - input.zero[m]) * static_cast<float>(1.0 / input.theta_beta[m]));
        const double extent = (static_cast<double>(input.highest[m]) - input.zero[m]) / input.theta_beta[m] - static_cast<double>(begin);
        size.first_bin[m] = static_cast<int32_t>(begin);
        // One more than the span: rounding in single precision may put the highest intensity into the next cell.
        size.bins[m] = static_cast<int64_t>(extent) + kSpan + 1;
        cells *= extent + kSpan + 1;
    }
    size.num_cells = cells;
    return size;
}

bool fits_grid(const BilateralInput& input, const GridSize& size) {
    const double most = std::max(kGenerousGrid, kGenerousGridAVoxel * static_cast<double>(input.voxels->num_voxels));
    return !input.intensity.empty() && input.intensity.size() <= 2 && size.num_cells <= std::min(kLargestGrid, most);
}

}  // namespace crf
