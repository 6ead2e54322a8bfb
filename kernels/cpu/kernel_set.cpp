// Builds the kernels of a model on an image, and normalizes them.
#include "cpu/kernel_set.h"

#include "cpu/filter.h"
#include "cpu/simd.h"

namespace crf {
namespace {
Buffer<float> filled(int64_t num_voxels, float value, ThreadPool& pool) {
    Buffer<float> values(num_voxels);
    pool.run(num_voxel_blocks(num_voxels), [&](int64_t block, int) {
        std::fill(values.get() + block * kVoxelBlock,
                  values.get() + std::min((block + 1) * kVoxelBlock, num_voxels), value);
    });
    return values;
}

// The kinds of kernels: a kernel whose bandwidths of position are along the axes of the box.
Kernel make_kernel(const KernelSpec& own, const Voxels& voxels,
                   const std::vector<const float*>& intensity, const KernelSetSpec& spec,
                   ThreadPool& pool, Workspace& workspace) {
    Kernel kernel;
    const Normalization normalization = parse_normalization(spec.normalization);
    if (own.kind == "spatial") {
        kernel.filter = make_spatial_filter(voxels, own.theta_position, pool);
        normalize_spatial_kernel(kernel, voxels, own.theta_position, normalization, pool,
                                 workspace);
        return kernel;
    }
    if (own.kind == "bilateral") {
        const FeatureOrigin* const origin = spec.origin ? &*spec.origin : nullptr;
        const BilateralInput input(voxels, own.theta_position, own.theta_intensity, intensity, pool,
                                   origin);
        kernel.filter = make_bilateral_filter(spec.filter, input, spec.calls(), pool);
    } else {
        throw InputError("unknown kind of kernel '" + own.kind + "'");
    }
    normalize_kernel(kernel, voxels, normalization, pool, workspace);
    return kernel;
}
}  // namespace

void normalize_kernel(Kernel& kernel, const Voxels& voxels, Normalization normalization,
                      ThreadPool& pool, Workspace& workspace) {
    const int64_t num_voxels = voxels.num_voxels;
    const float unit = 1;
    const bool symmetric = normalization == Normalization::kSymmetric;
    if (normalization == Normalization::kNone) return;
    Buffer<float> degree = filled(num_voxels, 0.0f, pool);
    kernel.filter->accumulate(filled(num_voxels, 1.0f, pool).get(), 1, nullptr, nullptr, &unit,
                              degree.get(), workspace);
    pool.run(num_voxel_blocks(num_voxels), [&](int64_t block, int) {
        float* d = degree.get() + block * kVoxelBlock;
        const int64_t count = std::min(kVoxelBlock, num_voxels - block * kVoxelBlock);
        for (int64_t i = 0; i < count; ++i) d[i] = d[i] > kTiny ? d[i] : kTiny;
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
    kernel.filter->accumulate(filled(num_voxels, 1.0f, pool).get(), 1, kernel.scale.get(),
                              kernel.scale.get(), &unit, kernel.ones.get(), workspace);
}

std::vector<double> on_box_axes(const Voxels& voxels, const std::vector<double>& per_grid_axis) {
    std::vector<double> values;
    for (int a = 0; a < voxels.num_axes; ++a)
        values.push_back(per_grid_axis[voxels.source_axis[a]]);
    return values;
}

Normalization parse_normalization(const std::string& name) {
    if (name == "symmetric") return Normalization::kSymmetric;
    if (name == "after") return Normalization::kAfter;
    if (name == "none") return Normalization::kNone;
    throw InputError("unknown normalization '" + name + "'");
}

KernelSet::KernelSet(const Voxels& voxels_in, const std::vector<const float*>& image,
                     const KernelSetSpec& spec, ThreadPool& pool, Workspace& workspace,
                     const BuildCallback& callback)
    : voxels(voxels_in) {
    const int num_kernels = static_cast<int>(spec.kernels.size());
    for (int k = 0; k < num_kernels; ++k) {
        if (callback) callback(k, num_kernels);
        KernelSpec own = spec.kernels[k];
        own.theta_position = on_box_axes(voxels, own.theta_position);
        const std::vector<const float*> intensity =
            own.theta_intensity.empty() ? std::vector<const float*>() : image;
        kernels.push_back(make_kernel(own, voxels, intensity, spec, pool, workspace));
        descriptions.push_back(spec.names[k] + ": " + kernels.back().filter->description());
        features.emplace_back(voxels, own.theta_position, own.theta_intensity, intensity);
    }
}
}  // namespace crf
