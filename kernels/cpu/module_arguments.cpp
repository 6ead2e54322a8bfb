#include "cpu/module_arguments.h"

#include <algorithm>
#include <cmath>

namespace nb = nanobind;

namespace crf {

namespace {

// Far beyond any volume, and far from the end of 64 bits.
constexpr int64_t kFarthestOrigin = int64_t{1} << 40;

}  // namespace

void require_positive(const std::vector<double>& values, size_t count, const char* otherwise) {
    require(values.size() == count && std::all_of(values.begin(), values.end(), [](double v) { return std::isfinite(v) && v > 0; }),
            otherwise);
}

void require_bandwidths(const BilateralArgument& bilateral, const std::vector<double>& theta_gamma, const ImageSize& image) {
    for (const auto& [theta_alpha, theta_beta] : bilateral) {
        require_positive(theta_alpha, image.num_axes, "expected one theta_alpha per axis of the grid, finite and above 0");
        require_positive(theta_beta, image.num_modalities, "expected one theta_beta per modality, finite and above 0");
    }
    if (!theta_gamma.empty())
        require_positive(theta_gamma, image.num_axes, "expected one theta_gamma per axis of the grid, finite and above 0, or none");
}

KernelSpecs make_specs(const ImageSize& image, const BilateralArgument& bilateral, const std::vector<double>& theta_gamma,
                       const std::string& normalization, const std::string& filter, int num_channels, int num_iterations,
                       const std::optional<OriginArgument>& origin) {
    require_bandwidths(bilateral, theta_gamma, image);
    require(num_channels >= 1 && num_channels <= kMostLabels, "expected from 2 to 65536 labels");
    require(num_iterations >= 0, "expected 0 iterations or more");
    if (origin) {
        const auto& [position, intensity] = *origin;
        require(
            position.size() == image.num_axes && intensity.size() == image.num_modalities &&
                std::all_of(position.begin(), position.end(), [](int64_t p) { return p >= -kFarthestOrigin && p <= kFarthestOrigin; }) &&
                std::all_of(intensity.begin(), intensity.end(), [](double v) { return std::isfinite(v); }),
            "expected an origin with one position per axis of the grid and one intensity per modality, finite");
    }
    KernelSpecs specs;
    for (const auto& [theta_alpha, theta_beta] : bilateral) specs.bilateral.push_back({theta_alpha, theta_beta});
    specs.theta_gamma = theta_gamma;
    specs.normalization = parse_normalization(normalization);
    specs.filter = filter;
    specs.num_channels = num_channels;
    specs.num_filterings = num_iterations;
    if (origin) specs.origin = FeatureOrigin{origin->first, origin->second};
    return specs;
}

void check_signals() {
    const nb::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

void Reporter::operator()(int step, int num_steps) const {
    check_signals();
    const nb::gil_scoped_acquire gil;
    if (!progress.is_none()) progress(stage, step, num_steps);
}

}  // namespace crf
