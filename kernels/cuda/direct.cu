// The bilateral kernel summed directly: over all pairs of voxels (`exact`) or over those of a window (`truncated`). Weights are computed
// where they are used; every voxel gathers its own sum, in a fixed order. Here each thread reads its own data, which works for
// any window and any mask; exact_tiles.cu and window_tiles.cu compute the same sums in tiles.
//
// CRF_WIDTH: channels that are filtered together. CRF_FEATURES: features of all pairs, or modalities inside a window.
#include "cuda/launch.h"

namespace crf {

using Channels = Row<CRF_WIDTH>;
using Intensities = Features<CRF_FEATURES>;
constexpr int kFeatures = CRF_FEATURES;
constexpr int kPartial = 512;  // senders that are summed separately before the total: limits rounding

// One thread per voxel n: sum += channel_weight * scale[n] * sum over m of 2^-|f_n - f_m|^2 * scale[m] * values[m].
//
// features: (feature, voxel), scaled so that the exponent's base is 2. sent_scale, received_scale: (voxel) or nullptr.
CRF_KERNEL(filter_all_pairs, const Real* features, int64 num_voxels, const Channels* values, const Real* sent_scale,
           const Real* received_scale, const Real* channel_weight, Channels* sum, int adds) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    Real own[kFeatures];
    CRF_UNROLL
    for (int f = 0; f < kFeatures; ++f) own[f] = features[f * num_voxels + n];
    Channels total = zero_row<CRF_WIDTH>();
    for (int64 begin = 0; begin < num_voxels; begin += kPartial) {
        const int64 end = begin + kPartial < num_voxels ? begin + kPartial : num_voxels;
        Channels partial = zero_row<CRF_WIDTH>();
        for (int64 m = begin; m < end; ++m) {
            Real squared = Real(0.0);
            CRF_UNROLL
            for (int f = 0; f < kFeatures; ++f) {
                const Real difference = own[f] - features[f * num_voxels + m];
                squared += difference * difference;
            }
            const Real weight = power_of_two(-squared);
            add_scaled(partial, values[m], sent_scale ? weight * sent_scale[m] : weight);
        }
        add_scaled(total, partial, Real(1.0));
    }
    const Real factor = received_scale ? received_scale[n] : Real(1.0);
    put_weighted(sum, n, total, factor, channel_weight, adds);
}

// One thread per voxel: its intensities to its place in a box.
CRF_KERNEL(place_intensities, const Real* features, int64 num_voxels, const int64* index, Real factor, Intensities* box) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    Intensities row{};
    CRF_UNROLL
    for (int f = 0; f < kFeatures; ++f) row.value[f] = features[f * num_voxels + n] * factor;
    box[index[n]] = row;
}

// One thread per voxel: its values to its place in a box, whose other places stay zero.
CRF_KERNEL(place_values, const Channels* values, const Real* scale, int64 num_voxels, const int64* index, Channels* box) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    Channels row = zero_row<CRF_WIDTH>();
    add_scaled(row, values[n], scale ? scale[n] : Real(1.0));
    box[index[n]] = row;
}

// One thread per voxel: like filter_all_pairs, over the voxels at the given linear distances in the padded box. Places without a voxel
// send zeros.
//
// offset, distance: (offset) in the box; minus log2 of the spatial part of the weight. intensity, padded: (padded box).
CRF_KERNEL(filter_window, const Intensities* intensity, const int64* padded_index, int64 num_voxels, const int64* offset,
           const Real* distance, int64 num_offsets, const Channels* padded, const Real* received_scale, const Real* channel_weight,
           Channels* sum, int adds) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const int64 place = padded_index[n];
    const Intensities own = intensity[place];
    Channels total = zero_row<CRF_WIDTH>();
    for (int64 begin = 0; begin < num_offsets; begin += kPartial) {
        const int64 end = begin + kPartial < num_offsets ? begin + kPartial : num_offsets;
        Channels partial = zero_row<CRF_WIDTH>();
        for (int64 i = begin; i < end; ++i) {
            const int64 other = place + offset[i];
            add_scaled(partial, padded[other], weight_of<kFeatures>(distance[i], own, intensity[other]));
        }
        add_scaled(total, partial, Real(1.0));
    }
    const Real factor = received_scale ? received_scale[n] : Real(1.0);
    put_weighted(sum, n, total, factor, channel_weight, adds);
}

}  // namespace crf
