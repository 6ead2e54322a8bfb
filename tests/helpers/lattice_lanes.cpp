// The shared geometry in the CPU engine's sixteen lanes, for the test that compares it with the GPU's scalars bit by bit.
// CRF_FEATURES: dimensions. features: (feature, voxel), num_voxels a multiple of sixteen. The results have a row of D + 1 a voxel.
#include "cpu/simd.h"
#include "lattice_math.h"

constexpr int kFeatures = CRF_FEATURES;

extern "C" void find_simplices(const float* features, int64_t num_voxels, const float* scale, int32_t* quotient, int32_t* order,
                               int32_t* weight, int32_t* wrapped) {
    for (int64_t first = 0; first < num_voxels; first += crf::kLanes) {
        crf::vfloat scaled[kFeatures], elevated[kFeatures + 1], barycentric[kFeatures + 1];
        crf::vint quotients[kFeatures + 1], sorted[kFeatures + 1], wraps;
        for (int i = 0; i < kFeatures; ++i) scaled[i] = crf::load(features + i * num_voxels + first) * scale[i];
        crf::elevate<kFeatures>(scaled, elevated);
        crf::enclosing_simplex<kFeatures>(elevated, quotients, sorted, wraps);
        crf::barycentric_weights<kFeatures>(sorted, barycentric);
        for (int i = 0; i <= kFeatures; ++i) {
            const crf::vint index = crf::coordinate_index<kFeatures>(sorted[i]);
            const crf::vint rounded = crf::truncate_to_int(barycentric[i] * 65535.0f + 0.5f);
            for (int lane = 0; lane < crf::kLanes; ++lane) {
                const int64_t at = (first + lane) * (kFeatures + 1) + i;
                quotient[at] = quotients[i][lane];
                order[at] = index[lane];
                weight[at] = rounded[lane];
            }
        }
        for (int lane = 0; lane < crf::kLanes; ++lane) wrapped[first + lane] = wraps[lane];
    }
}
