#include "cpu/kernel_set.h"

#include <type_traits>

#include "cpu/cost_model.h"
#include "cpu/double_filters.h"

namespace crf {

namespace {

std::unique_ptr<Filter> make_bilateral(const KernelSpecs& specs, const Voxels& voxels, const std::vector<double>& theta_alpha,
                                       const std::vector<double>& theta_beta, const std::vector<const float*>& image, ThreadPool& pool) {
    const BilateralInput input(voxels, theta_alpha, theta_beta, image, pool, specs.origin ? &*specs.origin : nullptr);
    return make_bilateral_filter(specs.filter, input, specs.num_channels, specs.num_filterings, pool);
}

std::unique_ptr<DoubleFilter> make_bilateral(const KernelSpecs& specs, const Voxels& voxels, const std::vector<double>& theta_alpha,
                                             const std::vector<double>& theta_beta, const std::vector<const double*>& image,
                                             ThreadPool& pool) {
    std::vector<std::vector<float>> rounded;
    std::vector<const float*> rounded_image;
    for (const double* values : image) {
        rounded.emplace_back(values, values + voxels.grid_size);
        rounded_image.push_back(rounded.back().data());
    }
    const BilateralInput input(voxels, theta_alpha, theta_beta, rounded_image, pool, specs.origin ? &*specs.origin : nullptr);
    return make_double_bilateral_filter(specs.filter, input, image, specs.num_channels, specs.num_filterings, pool);
}

template <class T>
std::unique_ptr<BasicFilter<T>> make_spatial(const KernelSpecs& specs, const Voxels& voxels, const std::vector<double>& theta_gamma,
                                             ThreadPool& pool) {
    if constexpr (std::is_same_v<T, float>) {
        return make_spatial_filter(voxels, theta_gamma, specs.filter == "exact", specs.origin ? &*specs.origin : nullptr, pool);
    } else {
        return make_double_spatial_filter(voxels, theta_gamma, pool);
    }
}

}  // namespace

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

template <class T>
KernelSet<T>::KernelSet(const Voxels& voxels_in, const std::vector<const T*>& image, const KernelSpecs& specs, ThreadPool& pool,
                        Workspace& workspace, const BuildCallback& callback)
    : voxels(voxels_in) {
    const int num_kernels = static_cast<int>(specs.bilateral.size() + (specs.theta_gamma.empty() ? 0 : 1));
    const auto add = [&](std::unique_ptr<BasicFilter<T>> filter, const std::string& name) {
        Kernel<T> kernel;
        kernel.filter = std::move(filter);
        normalize_kernel(kernel, voxels, specs.normalization, pool, workspace);
        descriptions.push_back(name + ": " + kernel.filter->description());
        kernels.push_back(std::move(kernel));
    };
    for (size_t k = 0; k < specs.bilateral.size(); ++k) {
        if (callback) callback(static_cast<int>(k), num_kernels);
        const std::vector<double> theta_alpha = on_box_axes(voxels, specs.bilateral[k].theta_alpha);
        const std::vector<double>& theta_beta = specs.bilateral[k].theta_beta;
        add(make_bilateral(specs, voxels, theta_alpha, theta_beta, image, pool), "bilateral." + std::to_string(k));
        features.emplace_back(voxels, theta_alpha, theta_beta, image);
    }
    if (!specs.theta_gamma.empty()) {
        const std::vector<double> theta_gamma = on_box_axes(voxels, specs.theta_gamma);
        add(make_spatial<T>(specs, voxels, theta_gamma, pool), "spatial");
        features.emplace_back(voxels, theta_gamma, std::vector<double>(), std::vector<const T*>());
    }
}

template struct KernelSet<float>;
template struct KernelSet<double>;

}  // namespace crf
