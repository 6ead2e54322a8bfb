#include "cpu/features.h"

#include <algorithm>

namespace crf {

void piece_features(const BilateralInput& input, int64_t grid, const int32_t* coordinate, int64_t length, float* features, int64_t stride) {
    const Voxels& voxels = *input.voxels;
    const int num_modalities = static_cast<int>(input.intensity.size());
    const int num_axes = voxels.num_axes;
    const int64_t origin = voxels.runs.front().grid;
    for (int m = 0; m < num_modalities; ++m) {
        const float* intensity = input.intensity[m];
        const float zero = intensity[origin];
        const float scale = static_cast<float>(1.0 / input.theta_beta[m]);
        for (int64_t i = 0; i < length; ++i) features[m * stride + i] = (intensity[grid + i] - zero) * scale;
    }
    for (int a = 0; a < num_axes; ++a) {
        const double scale = voxels.spacing[a] / input.theta_alpha[a];
        float* row = features + (num_modalities + a) * stride;
        if (a < num_axes - 1) {
            std::fill(row, row + length, static_cast<float>(coordinate[a] * scale));
        } else {
            for (int64_t i = 0; i < length; ++i) row[i] = static_cast<float>((coordinate[a] + i) * scale);
        }
    }
}

void gather_features(const BilateralInput& input, int64_t first, int64_t count, float* features, int64_t stride) {
    input.voxels->for_pieces(first, first + count, [&](int64_t voxel, int64_t grid, int64_t box, int64_t length) {
        int64_t place[kMaxAxes];
        input.voxels->coordinates(box, place);
        const std::vector<int32_t> coordinate(place, place + input.voxels->num_axes);
        piece_features(input, grid, coordinate.data(), length, features + (voxel - first), stride);
    });
}

}  // namespace crf
