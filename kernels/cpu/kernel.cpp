#include "cpu/kernel.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace crf {

template <class T>
void normalize_kernel(Kernel<T>& kernel, const Voxels& voxels, Normalization normalization, ThreadPool& pool, Workspace& workspace) {
    const int64_t num_voxels = voxels.num_voxels;
    const T unit = 1, tiny = std::numeric_limits<T>::min();  // the smallest normal number keeps the factor of a vanished row sum finite
    auto fill = [&](Buffer<T>& b, T value) {
        b = Buffer<T>(num_voxels);
        pool.run(num_voxel_blocks(num_voxels), [&](int64_t block, int) {
            std::fill(b.get() + block * kVoxelBlock, b.get() + std::min((block + 1) * kVoxelBlock, num_voxels), value);
        });
    };
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
    Buffer<T> ones, degree;
    fill(ones, 1);
    fill(degree, 0);
    kernel.filter->accumulate(ones.get(), 1, nullptr, nullptr, &unit, degree.get(), workspace);
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
    if (!symmetric) return;  // D^-1 K 1 = 1
    fill(kernel.ones, 0);
    kernel.filter->accumulate(ones.get(), 1, kernel.scale.get(), kernel.scale.get(), &unit, kernel.ones.get(), workspace);
}

template void normalize_kernel(Kernel<float>&, const Voxels&, Normalization, ThreadPool&, Workspace&);
template void normalize_kernel(Kernel<double>&, const Voxels&, Normalization, ThreadPool&, Workspace&);

}  // namespace crf
