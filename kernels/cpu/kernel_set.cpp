// Builds the kernels of a model on an image, and normalizes them.
#include "cpu/kernel_set.h"

#include "cpu/voxel_rows.h"

namespace crf {
namespace {
// The kinds of kernels.
Kernel make_kernel(const KernelSpec& own, const KernelInput& input, const KernelSetSpec& spec,
                   ThreadPool& pool, Workspace& workspace) {
    Kernel kernel;
    const Normalization normalization = parse_normalization(spec.normalization);
    if (own.kind == "spatial") {
        kernel.filter = make_spatial_filter(*input.voxels, input.theta_position, pool);
        normalize_spatial_kernel(kernel, *input.voxels, input.theta_position, normalization, pool,
                                 workspace);
        return kernel;
    }
    if (own.kind != "bilateral") throw InputError("unknown kind of kernel '" + own.kind + "'");
    input.require_span();
    kernel.filter = make_bilateral_filter(spec.filter, input, spec.calls(), pool);
    normalize_kernel(kernel, *input.voxels, normalization, pool, workspace);
    return kernel;
}
}  // namespace

void normalize_kernel(Kernel& kernel, const Voxels& voxels, Normalization normalization,
                      ThreadPool& pool, Workspace& workspace) {
    const int64_t num_voxels = voxels.num_voxels;
    const bool symmetric = normalization == Normalization::kSymmetric;
    if (normalization == Normalization::kNone) return;
    Buffer<float> degree = filled(num_voxels, 0.0f, pool);
    const Buffer<float> ones = filled(num_voxels, 1.0f, pool);
    kernel.filter->accumulate({ones.get(), 1, degree.get()}, workspace);
    pool.run_blocks(num_voxels, kVoxelBlock, [&](int64_t begin, int64_t end, int) {
        float* const d = degree.get();
        for (int64_t i = begin; i < end; ++i) d[i] = d[i] > kTiny ? d[i] : kTiny;
        if (symmetric)
            for (int64_t i = begin; i < end; ++i) d[i] = std::sqrt(d[i]);
        for (int64_t i = begin; i < end; ++i) d[i] = 1 / d[i];
    });
    kernel.scale = std::move(degree);
    kernel.scales_sent = symmetric;
}

void find_ones(Kernel& kernel, int64_t num_voxels, ThreadPool& pool, Workspace& workspace) {
    if (kernel.ones || !kernel.scales_sent) return;  // D^-1 K 1 = 1
    kernel.ones = filled(num_voxels, 0.0f, pool);
    const Buffer<float> ones = filled(num_voxels, 1.0f, pool);
    kernel.accumulate(ones.get(), 1, nullptr, kernel.ones.get(), workspace);
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
        const KernelSpec& own = spec.kernels[k];
        inputs.emplace_back(voxels, on_box_axes(voxels, own.theta_position), own.theta_intensity,
                            own.theta_intensity.empty() ? std::vector<const float*>() : image, pool,
                            spec.origin && own.kind != "spatial" ? &*spec.origin : nullptr);
        kernels.push_back(make_kernel(own, inputs.back(), spec, pool, workspace));
        descriptions.push_back(spec.names[k] + ": " + kernels.back().filter->description());
    }
}
}  // namespace crf
