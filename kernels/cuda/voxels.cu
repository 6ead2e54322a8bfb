// The features of the voxels that take part, and factors of normalization. CRF_THREADS: per block.
#include "cuda/launch.h"

namespace crf {
// Blocks of a modality, `num_blocks`, share its voxels: the smallest and the largest value that
// each has met. image: (modality, *grid). grid_index: (voxel), or nullptr: every place is a voxel.
// lowest, highest: (modality, block).
CRF_BLOCK_KERNEL(find_ranges, const Real* image, int64 grid_size, const int64* grid_index,
                 int64 num_voxels, int64 num_blocks, Real* lowest, Real* highest) {
    CRF_SHARED(Real, low, CRF_THREADS);
    CRF_SHARED(Real, high, CRF_THREADS);
    const Real* modality = image + block_number() / num_blocks * grid_size;
    CRF_PHASE(thread) {
        Real smallest = -kLowest, largest = kLowest;
        const int64 first = block_number() % num_blocks * CRF_THREADS + thread;
        for (int64 n = first; n < num_voxels; n += num_blocks * CRF_THREADS) {
            const Real value = modality[grid_index ? grid_index[n] : n];
            smallest = -larger(-smallest, -value);
            largest = larger(largest, value);
        }
        low[thread] = smallest;
        high[thread] = largest;
    }
    for (int half = CRF_THREADS / 2; half > 0; half /= 2) {
        CRF_PHASE(thread) {
            if (thread >= half) continue;
            const Real own_low = low[thread], other_low = low[thread + half];
            const Real own_high = high[thread], other_high = high[thread + half];
            low[thread] = -larger(-own_low, -other_low);
            high[thread] = larger(own_high, other_high);
        }
    }
    CRF_PHASE(thread) {
        if (thread > 0) continue;
        const Real smallest = low[0], largest = high[0];
        lowest[block_number()] = smallest;
        highest[block_number()] = largest;
    }
}

// An axis of the box.
struct Axis {
    int64 stride, extent;  // in the grid
    int64 first;           // coordinate of the box's first voxel
    int64 feature;         // number of the axis's feature among those of position
};

// One thread per voxel: its features over their bandwidths, intensities first. The operations are
// those of cpu/features.cpp, one by one: a lattice's integers depend on how features are rounded.
// image: (modality, *grid). lowest, inverse_theta: (modality). axes: (axis), whose `step` is the
// distance of neighbors over the bandwidth. features: (feature, voxel).
CRF_KERNEL(find_features, const Real* image, int64 grid_size, const int64* grid_index,
           int64 num_voxels, int num_modalities, const Real* lowest, const Real* inverse_theta,
           int num_axes, const int64* axes, const double* step, Real* features) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const int64 place = grid_index[n];
    for (int m = 0; m < num_modalities; ++m) {
        const Real intensity = image[m * grid_size + place] - lowest[m];
        features[m * num_voxels + n] = intensity * inverse_theta[m];
    }
    for (int a = 0; a < num_axes; ++a) {
        const Axis axis{axes[4 * a], axes[4 * a + 1], axes[4 * a + 2], axes[4 * a + 3]};
        const int64 coordinate = place / axis.stride % axis.extent - axis.first;
        const double position = static_cast<double>(coordinate) * step[a];
        features[(num_modalities + axis.feature) * num_voxels + n] = static_cast<Real>(position);
    }
}

// One thread per voxel: the factor of normalization from its sum of weights D, 1 / sqrt(D) if it is
// applied on both sides, else 1 / D. scale: (voxel), may be row_sum.
CRF_KERNEL(find_scale, const Real* row_sum, int64 num_voxels, int is_symmetric, Real* scale) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const Real sum = larger(row_sum[n], kTiny);
    scale[n] = Real(1.0) / (is_symmetric ? sqrt(sum) : sum);
}
}  // namespace crf
