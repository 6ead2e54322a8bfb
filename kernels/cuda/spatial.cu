// The spatial kernel, axis by axis on the mask's bounding box: a product of one-dimensional Gaussians.
//
// CRF_WIDTH: channels that are filtered together. CRF_OUTPUTS: places per thread of filter_far_axis.
#include "cuda/launch.h"

namespace crf {

using Channels = Row<CRF_WIDTH>;
constexpr int kPadding = 7;  // zeros on either side of an axis's taps

// The Gaussian along one axis at place i of the box. stride, extent: of the axis in the box. taps: (radius + 1) weights at distance
// 0, 1, ...; sender_at(place): the row there.
template <class SenderAt>
CRF_D Channels sum_near(int64 i, int64 stride, int64 extent, const Real* taps, int64 radius, SenderAt sender_at) {
    const int64 x = i / stride % extent;
    Channels total = zero_row<CRF_WIDTH>();
    const int64 first = x < radius ? -x : -radius, last = extent - 1 - x < radius ? extent - 1 - x : radius;
    for (int64 k = first; k <= last; ++k) add_scaled(total, sender_at(i + k * stride), taps[k < 0 ? -k : k]);
    return total;
}

// One thread per place of the box: the Gaussian along the box's last axis, of the voxels' values.
//
// scale: (voxel) or nullptr for ones. number: (place) number of the voxel, -1: none; nullptr: all places are voxels, in order.
CRF_KERNEL(filter_values, const Channels* values, const Real* scale, const int* number, int64 box_size, int64 extent, const Real* taps,
           int64 radius, Channels* to) {
    const int64 i = thread_number();
    if (i >= box_size) return;
    to[i] = sum_near(i, 1, extent, taps, radius, [=](int64 place) {
        const int64 n = number ? number[place] : place;
        Channels row = zero_row<CRF_WIDTH>();
        if (n >= 0) add_scaled(row, values[n], scale ? scale[n] : Real(1.0));
        return row;
    });
}

// One thread per place of the box: the Gaussian along one axis, whose neighbors are adjacent in memory or nearly so.
CRF_KERNEL(filter_near_axis, const Channels* from, int64 box_size, int64 stride, int64 extent, const Real* taps, int64 radius,
           Channels* to) {
    const int64 i = thread_number();
    if (i < box_size) to[i] = sum_near(i, stride, extent, taps, radius, [=](int64 place) { return from[place]; });
}

// The same as the last one of the axes, one thread per voxel: sum += channel_weight * scale * the Gaussian; see put_weighted.
//
// box_index: (voxel) place in the box, nullptr: as in filter_values.
CRF_KERNEL(filter_near_axis_to_voxels, const Channels* from, const int64* box_index, int64 num_voxels, int64 stride, int64 extent,
           const Real* taps, int64 radius, const Real* scale, const Real* channel_weight, Channels* sum, int adds) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const int64 i = box_index ? box_index[n] : n;
    const Channels total = sum_near(i, stride, extent, taps, radius, [=](int64 place) { return from[place]; });
    put_weighted(sum, n, total, scale ? scale[n] : Real(1.0), channel_weight, adds);
}

// The Gaussian at CRF_OUTPUTS neighbors along an axis that is not the box's last, so that the places of a warp are adjacent; each value
// that a thread reads serves all of its places. The same sums as in sum_near. put(place, total) takes each of them.
//
// i: number of the thread. taps: (2 radius + 1 + 2 kPadding), the weights of distances -(radius + kPadding) and up, zero beyond the radius.
template <class Put>
CRF_D void sum_far(const Channels* from, int64 i, int64 stride, int64 extent, const Real* taps, int64 radius, Put put) {
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
        if (first + k < extent) put(begin + (first + k) * stride, total[k]);
}

// One thread per CRF_OUTPUTS places.
CRF_KERNEL(filter_far_axis, const Channels* from, int64 num_threads, int64 stride, int64 extent, const Real* taps, int64 radius,
           Channels* to) {
    const int64 i = thread_number();
    if (i < num_threads) sum_far(from, i, stride, extent, taps, radius, [=](int64 place, Channels total) { to[place] = total; });
}

// The same as the last one of the axes: sum += channel_weight * scale * the Gaussian at the voxels; see put_weighted.
//
// number: as in filter_values.
CRF_KERNEL(filter_far_axis_to_voxels, const Channels* from, const int* number, int64 num_threads, int64 stride, int64 extent,
           const Real* taps, int64 radius, const Real* scale, const Real* channel_weight, Channels* sum, int adds) {
    const int64 i = thread_number();
    if (i >= num_threads) return;
    sum_far(from, i, stride, extent, taps, radius, [=](int64 place, Channels total) {
        const int64 n = number ? number[place] : place;
        if (n >= 0) put_weighted(sum, n, total, scale ? scale[n] : Real(1.0), channel_weight, adds);
    });
}

// One thread per voxel: sum += channel_weight * scale * the box's value at its place, where the only axis was filtered.
CRF_KERNEL(gather_from_box, const Channels* box, const int64* box_index, int64 num_voxels, const Real* scale, const Real* channel_weight,
           Channels* sum, int adds) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    put_weighted(sum, n, box[box_index ? box_index[n] : n], scale ? scale[n] : Real(1.0), channel_weight, adds);
}

}  // namespace crf
