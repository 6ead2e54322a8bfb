// The spatial kernel, axis by axis on the mask's bounding box: a product of one-dimensional Gaussians.
//
// CRF_WIDTH: channels that are filtered together.
#include "cuda/launch.h"

namespace crf {

using Channels = Row<CRF_WIDTH>;

// One thread a place of the box.
CRF_KERNEL(clear_box, Channels* box, int64 box_size) {
    const int64 i = thread_number();
    if (i < box_size) box[i] = zero_row<CRF_WIDTH>();
}

// One thread a voxel: its values to its place in the box, whose other places are zero.
CRF_KERNEL(scatter_to_box, const Channels* values, const Real* scale, int64 num_voxels, const int64* box_index, Channels* box) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    Channels row = zero_row<CRF_WIDTH>();
    add_scaled(row, values[n], scale ? scale[n] : Real(1.0));
    box[box_index[n]] = row;
}

// One thread a place of the box: the Gaussian along one axis.
//
// stride, extent: of the axis in the box. taps: (radius + 1) weights at distance 0, 1, ...
CRF_KERNEL(filter_axis, const Channels* from, int64 box_size, int64 stride, int64 extent, const Real* taps, int64 radius, Channels* to) {
    const int64 i = thread_number();
    if (i >= box_size) return;
    const int64 x = i / stride % extent;
    Channels total = zero_row<CRF_WIDTH>();
    const int64 first = x < radius ? -x : -radius, last = extent - 1 - x < radius ? extent - 1 - x : radius;
    for (int64 k = first; k <= last; ++k) add_scaled(total, from[i + k * stride], taps[k < 0 ? -k : k]);
    to[i] = total;
}

// One thread a voxel: sum += channel_weight * scale * what the box holds at its place.
CRF_KERNEL(gather_from_box, const Channels* box, const int64* box_index, int64 num_voxels, const Real* scale, const Real* channel_weight,
           Channels* sum) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const Channels row = box[box_index[n]];
    const Real factor = scale ? scale[n] : Real(1.0);
    Channels out = sum[n];
    CRF_UNROLL
    for (int c = 0; c < CRF_WIDTH; ++c) out.value[c] += channel_weight[c] * factor * row.value[c];
    sum[n] = out;
}

}  // namespace crf
