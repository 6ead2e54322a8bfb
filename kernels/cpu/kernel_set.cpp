#include "cpu/kernel_set.h"

#include "cpu/cost_model.h"

namespace crf {

std::vector<double> on_box_axes(const Voxels& voxels, const std::vector<double>& per_grid_axis) {
    std::vector<double> values;
    for (int a = 0; a < voxels.num_axes; ++a) values.push_back(per_grid_axis[voxels.source_axis[a]]);
    return values;
}

Normalization parse_normalization(const std::string& name) {
    if (name == "symmetric") return Normalization::kSymmetric;
    if (name == "after") return Normalization::kAfter;
    if (name == "none") return Normalization::kNone;
    throw InputError("unknown normalization '" + name + "'");
}

KernelSet::KernelSet(const Voxels& voxels_in, const std::vector<const float*>& image, const KernelSpecs& specs, ThreadPool& pool,
                     Workspace& workspace, const BuildCallback& callback)
    : voxels(voxels_in) {
    const int num_kernels = static_cast<int>(specs.bilateral.size() + (specs.theta_gamma.empty() ? 0 : 1));
    const FeatureOrigin* const origin = specs.origin ? &*specs.origin : nullptr;
    const auto add = [&](std::unique_ptr<Filter> filter, const std::string& name) {
        Kernel kernel;
        kernel.filter = std::move(filter);
        normalize_kernel(kernel, voxels, specs.normalization, pool, workspace);
        descriptions.push_back(name + ": " + kernel.filter->description());
        kernels.push_back(std::move(kernel));
    };
    for (size_t k = 0; k < specs.bilateral.size(); ++k) {
        if (callback) callback(static_cast<int>(k), num_kernels);
        const std::vector<double> theta_alpha = on_box_axes(voxels, specs.bilateral[k].theta_alpha);
        const std::vector<double>& theta_beta = specs.bilateral[k].theta_beta;
        const BilateralInput input(voxels, theta_alpha, theta_beta, image, pool, origin);
        add(make_bilateral_filter(specs.filter, input, specs.num_channels, specs.num_filterings, pool), "bilateral." + std::to_string(k));
        features.emplace_back(voxels, theta_alpha, theta_beta, image);
    }
    if (!specs.theta_gamma.empty()) {
        const std::vector<double> theta_gamma = on_box_axes(voxels, specs.theta_gamma);
        add(make_spatial_filter(voxels, theta_gamma, specs.filter == "exact", origin, pool), "spatial");
        features.emplace_back(voxels, theta_gamma, std::vector<double>(), std::vector<const float*>());
    }
}

}  // namespace crf
