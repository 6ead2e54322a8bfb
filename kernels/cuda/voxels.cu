// Conversion between arrays of channels on the whole grid and rows of channels at the compact voxels; normalization factors of voxels.
//
// CRF_WIDTH: channels that are filtered together.
#include "cuda/launch.h"

namespace crf {

using Channels = Row<CRF_WIDTH>;

// One thread per voxel: rows of the first `num_channels` channels, the others zero.
CRF_KERNEL(gather_rows, const Real* channels, int64 grid_size, int num_channels, const int64* grid_index, int64 num_voxels,
           Channels* rows) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    Channels row = zero_row<CRF_WIDTH>();
    CRF_UNROLL
    for (int c = 0; c < CRF_WIDTH; ++c)
        if (c < num_channels) row.value[c] = channels[c * grid_size + grid_index[n]];
    rows[n] = row;
}

// One thread per voxel: the reverse.
CRF_KERNEL(scatter_rows, const Channels* rows, int64 num_voxels, const int64* grid_index, int num_channels, int64 grid_size,
           Real* channels) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const Channels row = rows[n];
    CRF_UNROLL
    for (int c = 0; c < CRF_WIDTH; ++c)
        if (c < num_channels) channels[c * grid_size + grid_index[n]] = row.value[c];
}

// One thread per voxel: the factor of the normalization, from the sum of the kernel's row.
CRF_KERNEL(normalizer, const Real* row_sum, int64 num_voxels, int is_symmetric, Real* scale) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const Real sum = larger(row_sum[n], kTiny);
    scale[n] = Real(1.0) / (is_symmetric ? sqrt(sum) : sum);
}

}  // namespace crf
