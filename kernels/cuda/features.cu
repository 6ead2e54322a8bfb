// Features of the compact voxels, intensity over theta_beta first, position over theta_alpha last: exactly the numbers of cpu/features.cpp,
// because the lattice's integers follow from them. Compiled without fused multiply-adds.
#include "cuda/launch.h"

namespace crf {

// One thread per voxel.
//
// image: (modality, *grid). grid_index, box_index: (voxel) linear indices in the whole grid and in the mask's bounding box.
// zero, intensity_scale: (modality). box_shape, position_scale, position_row, first: (axis); the row of positions of an axis, and the box's
// first voxel from the feature origin.
// features: (modality + axis, voxel).
CRF_KERNEL(gather_features, const Real* image, int64 grid_size, const int64* grid_index, const int64* box_index, int64 num_voxels,
           int num_modalities, const Real* zero, const Real* intensity_scale, int num_axes, const int64* box_shape,
           const double* position_scale, const int64* position_row, const int64* first, Real* features) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    for (int m = 0; m < num_modalities; ++m)
        features[m * num_voxels + n] = (image[m * grid_size + grid_index[n]] - zero[m]) * intensity_scale[m];
    int64 rest = box_index[n];
    for (int a = num_axes - 1; a >= 0; --a) {
        const int64 coordinate = rest % box_shape[a];
        rest /= box_shape[a];
        features[(num_modalities + position_row[a]) * num_voxels + n] =
            static_cast<Real>(static_cast<double>(first[a] + coordinate) * position_scale[a]);
    }
}

}  // namespace crf
