// The bilateral kernel summed directly: over all pairs of voxels (`exact`) or over those of a
// window (`truncated`). Weights are computed where they are used; every voxel gathers its own sum,
// in a fixed order. CRF_WIDTH: channels that are filtered together. CRF_FEATURES: features of all
// pairs, or modalities inside a window.
#include "cuda/launch.h"

namespace crf {
using Channels = Row<CRF_WIDTH>;
// senders that are summed separately before the total: limits rounding
constexpr int kPartial = 512;

// A voxel that gathers its sum.
// features: (feature, voxel), scaled so that the exponent's base is 2. sent, received:
// (voxel) or nullptr for ones.
struct Receiver {
    Real own[CRF_FEATURES];
    Channels total = zero_row<CRF_WIDTH>(), partial = zero_row<CRF_WIDTH>();

    CRF_D Receiver(const Real* features, int64 num_voxels, int64 n) {
        CRF_UNROLL
        for (int f = 0; f < CRF_FEATURES; ++f) own[f] = features[f * num_voxels + n];
    }
    // Adds 2^-(distance + |f_n - f_m|^2) * sent[m] * values[m].
    CRF_D void add(const Real* features, int64 num_voxels, const Channels* values, const Real* sent,
                   int64 m, Real distance) {
        CRF_UNROLL
        for (int f = 0; f < CRF_FEATURES; ++f) {
            const Real difference = own[f] - features[f * num_voxels + m];
            distance += difference * difference;
        }
        const Real weight = power_of_two(-distance);
        add_scaled(partial, values[m], sent ? weight * sent[m] : weight);
    }
    CRF_D void end_part() {
        add_scaled(total, partial, Real(1.0));
        partial = zero_row<CRF_WIDTH>();
    }
};

// One thread per voxel n: sum += channel_weight * received[n] * the weighted sum of all
// voxels' values; see put_weighted.
CRF_KERNEL(filter_all_pairs, const Real* features, int64 num_voxels, const Channels* values,
           const Real* sent, const Real* received, const Real* channel_weight, Channels* sum,
           int adds) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    Receiver receiver(features, num_voxels, n);
    for (int64 begin = 0; begin < num_voxels; begin += kPartial) {
        const int64 end = begin + kPartial < num_voxels ? begin + kPartial : num_voxels;
        for (int64 m = begin; m < end; ++m)
            receiver.add(features, num_voxels, values, sent, m, Real(0.0));
        receiver.end_part();
    }
    put_weighted(sum, n, receiver.total, received ? received[n] : Real(1.0), channel_weight, adds);
}

// The same over the voxels at the given linear distances in a padded box.
// number: (place of the box) number of the voxel, -1: none. index: (voxel) place. offset: in the
// box. distance: -log2 of the weight.
CRF_KERNEL(filter_window, const Real* features, int64 num_voxels, const int* number,
           const int64* index, const int64* offset, const Real* distance, int64 num_offsets,
           const Channels* values, const Real* sent, const Real* received,
           const Real* channel_weight, Channels* sum, int adds) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const int64 place = index[n];
    Receiver receiver(features, num_voxels, n);
    for (int64 begin = 0; begin < num_offsets; begin += kPartial) {
        const int64 end = begin + kPartial < num_offsets ? begin + kPartial : num_offsets;
        for (int64 i = begin; i < end; ++i) {
            const int m = number[place + offset[i]];
            if (m >= 0) receiver.add(features, num_voxels, values, sent, m, distance[i]);
        }
        receiver.end_part();
    }
    put_weighted(sum, n, receiver.total, received ? received[n] : Real(1.0), channel_weight, adds);
}
}  // namespace crf
