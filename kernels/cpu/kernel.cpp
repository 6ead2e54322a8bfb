#include "cpu/kernel.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace crf {

namespace {

Buffer<float> filled(int64_t num_voxels, float value, ThreadPool& pool) {
    Buffer<float> values(num_voxels);
    pool.run(num_voxel_blocks(num_voxels), [&](int64_t block, int) {
        std::fill(values.get() + block * kVoxelBlock, values.get() + std::min((block + 1) * kVoxelBlock, num_voxels), value);
    });
    return values;
}

}  // namespace

void normalize_kernel(Kernel& kernel, const Voxels& voxels, Normalization normalization, ThreadPool& pool, Workspace& workspace) {
    const int64_t num_voxels = voxels.num_voxels;
    const float unit = 1,
                tiny = std::numeric_limits<float>::min();  // the smallest normal number keeps the factor of a vanished row sum finite
    const bool symmetric = normalization == Normalization::kSymmetric;
    if (normalization == Normalization::kNone) return;
    kernel.scale = Buffer<float>(num_voxels);
    if (symmetric) kernel.ones = Buffer<float>(num_voxels);
    if (kernel.filter->normalize(symmetric, kernel.scale.get(), kernel.ones.get())) {
        kernel.scales_sent = symmetric;
        return;
    }
    kernel.scale = Buffer<float>();
    kernel.ones = Buffer<float>();
    Buffer<float> degree = filled(num_voxels, 0.0f, pool);
    kernel.filter->accumulate(filled(num_voxels, 1.0f, pool).get(), 1, nullptr, nullptr, &unit, degree.get(), workspace);
    pool.run(num_voxel_blocks(num_voxels), [&](int64_t block, int) {
        float* d = degree.get() + block * kVoxelBlock;
        const int64_t count = std::min(kVoxelBlock, num_voxels - block * kVoxelBlock);
        for (int64_t i = 0; i < count; ++i) d[i] = d[i] > tiny ? d[i] : tiny;
        if (symmetric)
            for (int64_t i = 0; i < count; ++i) d[i] = std::sqrt(d[i]);
        for (int64_t i = 0; i < count; ++i) d[i] = 1 / d[i];
    });
    kernel.scale = std::move(degree);
    kernel.scales_sent = symmetric;
}

void find_ones(Kernel& kernel, int64_t num_voxels, ThreadPool& pool, Workspace& workspace) {
    if (kernel.ones || !kernel.scales_sent) return;  // D^-1 K 1 = 1
    const float unit = 1;
    kernel.ones = filled(num_voxels, 0.0f, pool);
    kernel.filter->accumulate(filled(num_voxels, 1.0f, pool).get(), 1, kernel.scale.get(), kernel.scale.get(), &unit, kernel.ones.get(),
                              workspace);
}

}  // namespace crf
