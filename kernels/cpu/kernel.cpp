#include "cpu/kernel.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace crf {

namespace {

template <class T>
Buffer<T> filled(int64_t num_voxels, T value, ThreadPool& pool) {
    Buffer<T> values(num_voxels);
    pool.run(num_voxel_blocks(num_voxels), [&](int64_t block, int) {
        std::fill(values.get() + block * kVoxelBlock, values.get() + std::min((block + 1) * kVoxelBlock, num_voxels), value);
    });
    return values;
}

}  // namespace

template <class T>
void normalize_kernel(Kernel<T>& kernel, const Voxels& voxels, Normalization normalization, ThreadPool& pool, Workspace& workspace) {
    const int64_t num_voxels = voxels.num_voxels;
    const T unit = 1, tiny = std::numeric_limits<T>::min();  // the smallest normal number keeps the factor of a vanished row sum finite
    const bool symmetric = normalization == Normalization::kSymmetric;
    if (normalization != Normalization::kNone) {
        kernel.scale = Buffer<T>(num_voxels);
        if (symmetric) kernel.ones = Buffer<T>(num_voxels);
        if (kernel.filter->normalize(symmetric, kernel.scale.get(), kernel.ones.get())) {
            kernel.scales_sent = symmetric;
            return;
        }
        kernel.scale = Buffer<T>();
        kernel.ones = Buffer<T>();
    }
    Buffer<T> degree = filled(num_voxels, T{0}, pool);
    kernel.filter->accumulate(filled(num_voxels, T{1}, pool).get(), 1, nullptr, nullptr, &unit, degree.get(), workspace);
    if (normalization == Normalization::kNone) {
        kernel.ones = std::move(degree);
        return;
    }
    pool.run(num_voxel_blocks(num_voxels), [&](int64_t block, int) {
        T* d = degree.get() + block * kVoxelBlock;
        const int64_t count = std::min(kVoxelBlock, num_voxels - block * kVoxelBlock);
        for (int64_t i = 0; i < count; ++i) d[i] = d[i] > tiny ? d[i] : tiny;
        if (symmetric)
            for (int64_t i = 0; i < count; ++i) d[i] = std::sqrt(d[i]);
        for (int64_t i = 0; i < count; ++i) d[i] = 1 / d[i];
    });
    kernel.scale = std::move(degree);
    kernel.scales_sent = symmetric;
}

template <class T>
void find_ones(Kernel<T>& kernel, int64_t num_voxels, ThreadPool& pool, Workspace& workspace) {
    if (kernel.ones || !kernel.scales_sent) return;  // D^-1 K 1 = 1
    const T unit = 1;
    kernel.ones = filled(num_voxels, T{0}, pool);
    kernel.filter->accumulate(filled(num_voxels, T{1}, pool).get(), 1, kernel.scale.get(), kernel.scale.get(), &unit, kernel.ones.get(),
                              workspace);
}

template void normalize_kernel(Kernel<float>&, const Voxels&, Normalization, ThreadPool&, Workspace&);
template void normalize_kernel(Kernel<double>&, const Voxels&, Normalization, ThreadPool&, Workspace&);
template void find_ones(Kernel<float>&, int64_t, ThreadPool&, Workspace&);
template void find_ones(Kernel<double>&, int64_t, ThreadPool&, Workspace&);

}  // namespace crf
