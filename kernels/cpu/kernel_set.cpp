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
                     const KernelSpecs& specs, ThreadPool& pool, Workspace& workspace,
                     const BuildCallback& callback)
    : voxels(voxels_in) {
    const int num_kernels =
        static_cast<int>(specs.bilateral.size() + (specs.theta_gamma.empty() ? 0 : 1));
    const FeatureOrigin* const origin = specs.origin ? &*specs.origin : nullptr;
    const auto add = [&](Kernel kernel, const std::string& name) {
        descriptions.push_back(name + ": " + kernel.filter->description());
        kernels.push_back(std::move(kernel));
    };
    for (size_t k = 0; k < specs.bilateral.size(); ++k) {
        if (callback) callback(static_cast<int>(k), num_kernels);
        const std::vector<double> theta_position = on_box_axes(voxels, specs.bilateral[k].first);
        const std::vector<double>& theta_beta = specs.bilateral[k].second;
        const BilateralInput input(voxels, theta_position, theta_beta, image, pool, origin);
        Kernel kernel;
        kernel.filter = make_bilateral_filter(specs.filter, input, specs.calls, pool);
        normalize_kernel(kernel, voxels, specs.normalization, pool, workspace);
        add(std::move(kernel), "bilateral." + std::to_string(k));
        features.emplace_back(voxels, theta_position, theta_beta, image);
    }
    if (!specs.theta_gamma.empty()) {
        const std::vector<double> theta_gamma = on_box_axes(voxels, specs.theta_gamma);
        Kernel kernel;
        kernel.filter = make_spatial_filter(voxels, theta_gamma, pool);
        normalize_spatial_kernel(kernel, voxels, theta_gamma, specs.normalization, pool, workspace);
        add(std::move(kernel), "spatial");
        features.emplace_back(voxels, theta_gamma, std::vector<double>(),
                              std::vector<const float*>());
    }
}
}  // namespace crf
