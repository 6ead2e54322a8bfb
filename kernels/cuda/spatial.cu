// The spatial kernel, axis by axis on the mask's bounding box: a product of one-dimensional
// Gaussians. CRF_WIDTH: channels that are filtered together.
#include "cuda/launch.h"

namespace crf {
using Channels = Row<CRF_WIDTH>;

// One thread per place of the box: the Gaussian along one axis. The first axis is filtered from the
// voxels' values, the last one to their sums: sum += channel_weight * received * the Gaussian; see
// put_weighted. number: (place) number of the voxel, -1: none; nullptr: all places are voxels, in
// order. values: (voxel), with the factors `sent`, or nullptr: `from` is filtered, (place). stride,
// extent: of the axis in the box. taps: (radius + 1) weights at distance 0, 1, ... sum: (voxel), or
// nullptr: the result goes to `to`, (place). sent, received: (voxel) or nullptr for ones.
CRF_KERNEL(filter_axis, const int* number, int64 box_size, const Channels* values, const Real* sent,
           const Channels* from, int64 stride, int64 extent, const Real* taps, int64 radius,
           Channels* to, const Real* received, const Real* channel_weight, Channels* sum,
           int adds) {
    const int64 i = thread_number();
    if (i >= box_size) return;
    const int64 own = number ? number[i] : i;
    if (sum && own < 0) return;
    const int64 x = i / stride % extent;
    const int64 first = x < radius ? -x : -radius,
                last = extent - 1 - x < radius ? extent - 1 - x : radius;
    Channels total = zero_row<CRF_WIDTH>();
    for (int64 k = first; k <= last; ++k) {
        const int64 place = i + k * stride;
        const Real tap = taps[k < 0 ? -k : k];
        if (values) {
            const int64 n = number ? number[place] : place;
            if (n >= 0) add_scaled(total, values[n], sent ? tap * sent[n] : tap);
        } else {
            add_scaled(total, from[place], tap);
        }
    }
    if (sum)
        put_weighted(sum, own, total, received ? received[own] : Real(1.0), channel_weight, adds);
    else
        to[i] = total;
}

// One thread per voxel of a box without gaps: the products over the axes of two factors of its
// coordinates. extent: (axis). factors: (2, sum of the extents), those of the first axis first.
// second: nullptr if it is not wanted.
CRF_KERNEL(multiply_axes, const int64* extent, int num_axes, const Real* factors, int64 num_factors,
           int64 box_size, Real* first, Real* second) {
    const int64 i = thread_number();
    if (i >= box_size) return;
    Real first_product = Real(1.0), second_product = Real(1.0);
    int64 rest = i, end = num_factors;
    for (int a = num_axes - 1; a >= 0; --a) {
        const int64 place = end - extent[a] + rest % extent[a];
        first_product *= factors[place];
        second_product *= factors[num_factors + place];
        rest /= extent[a];
        end -= extent[a];
    }
    first[i] = first_product;
    if (second) second[i] = second_product;
}
}  // namespace crf
