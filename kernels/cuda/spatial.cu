// The spatial kernel, axis by axis on the mask's bounding box: a product of one-dimensional Gaussians.
//
// CRF_WIDTH: channels that are filtered together. CRF_OUTPUTS: places per thread of filter_far_axis.
#include "cuda/launch.h"

namespace crf {

using Channels = Row<CRF_WIDTH>;
constexpr int kPadding = 7;  // zeros on either side of an axis's taps

// One thread per place of the box.
CRF_KERNEL(clear_box, Channels* box, int64 box_size) {
    const int64 i = thread_number();
    if (i < box_size) box[i] = zero_row<CRF_WIDTH>();
}

// One thread per voxel: its values to its place in the box, whose other places are zero.
CRF_KERNEL(scatter_to_box, const Channels* values, const Real* scale, int64 num_voxels, const int64* box_index, Channels* box) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    Channels row = zero_row<CRF_WIDTH>();
    add_scaled(row, values[n], scale ? scale[n] : Real(1.0));
    box[box_index[n]] = row;
}

// One thread per place of the box: the Gaussian along one axis, whose neighbors are adjacent in memory or nearly so.
//
// stride, extent: of the axis in the box. taps: (radius + 1) weights at distance 0, 1, ...
CRF_KERNEL(filter_near_axis, const Channels* from, int64 box_size, int64 stride, int64 extent, const Real* taps, int64 radius,
           Channels* to) {
    const int64 i = thread_number();
    if (i >= box_size) return;
    const int64 x = i / stride % extent;
    Channels total = zero_row<CRF_WIDTH>();
    const int64 first = x < radius ? -x : -radius, last = extent - 1 - x < radius ? extent - 1 - x : radius;
    for (int64 k = first; k <= last; ++k) add_scaled(total, from[i + k * stride], taps[k < 0 ? -k : k]);
    to[i] = total;
}

// One thread per CRF_OUTPUTS neighbors along an axis that is not the box's last, so that the places of a warp are adjacent; each value
// that a thread reads serves all of its places. The same sums as in filter_near_axis.
//
// taps: (2 radius + 1 + 2 kPadding), the weights of distances -(radius + kPadding) and up, zero beyond the radius.
CRF_KERNEL(filter_far_axis, const Channels* from, int64 num_threads, int64 stride, int64 extent, const Real* taps, int64 radius,
           Channels* to) {
    const int64 i = thread_number();
    if (i >= num_threads) return;
    constexpr int kOutputs = CRF_OUTPUTS;
    static_assert(kOutputs <= kPadding + 1);
    const int64 pieces = (extent + kOutputs - 1) / kOutputs;
    const int64 line = i / stride;
    const int64 first = line % pieces * kOutputs;
    const int64 begin = line / pieces * extent * stride + i % stride;  // of the line along the axis
    Channels total[kOutputs];
    Real weight[kOutputs];  // of the current sender for each of the places
    CRF_UNROLL
    for (int k = 0; k < kOutputs; ++k) total[k] = zero_row<CRF_WIDTH>();
    const int64 low = first < radius ? 0 : first - radius;
    const int64 high = extent - first < radius + kOutputs ? extent : first + radius + kOutputs;
    const Real* tap = taps + (low - first + radius + kPadding);
    CRF_UNROLL
    for (int k = 1; k < kOutputs; ++k) weight[k] = tap[-k];
    const Channels* sender = from + begin + low * stride;
    for (int64 left = high - low; left > 0; left -= kOutputs) {
        CRF_UNROLL
        for (int turn = 0; turn < kOutputs; ++turn) {
            if (turn >= left) break;
            // A place's weight equals that of the previous place for the previous sender.
            weight[(kOutputs - turn) % kOutputs] = *tap++;
            const Channels row = *sender;
            sender += stride;
            CRF_UNROLL
            for (int k = 0; k < kOutputs; ++k) add_scaled(total[k], row, weight[(k + kOutputs - turn) % kOutputs]);
        }
    }
    CRF_UNROLL
    for (int k = 0; k < kOutputs; ++k)
        if (first + k < extent) to[begin + (first + k) * stride] = total[k];
}

// One thread per voxel: sum += channel_weight * scale * the box's value at its place.
CRF_KERNEL(gather_from_box, const Channels* box, const int64* box_index, int64 num_voxels, const Real* scale, const Real* channel_weight,
           Channels* sum) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const Channels row = box[box_index[n]];
    const Real factor = scale ? scale[n] : Real(1.0);
    Channels out = sum[n];
    add_weighted(out, row, factor, channel_weight);
    sum[n] = out;
}

}  // namespace crf
