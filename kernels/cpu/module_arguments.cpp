#include "cpu/module_arguments.h"

#include <nanobind/stl/vector.h>

namespace nb = nanobind;

namespace crf {

std::vector<KernelSpecs::Bilateral> bilateral_specs(const nb::list& bilateral) {
    std::vector<KernelSpecs::Bilateral> specs;
    for (nb::handle item : bilateral) {
        const auto thetas = nb::cast<nb::tuple>(item);
        specs.push_back({nb::cast<std::vector<double>>(thetas[0]), nb::cast<std::vector<double>>(thetas[1])});
    }
    return specs;
}

KernelSpecs make_specs(std::vector<KernelSpecs::Bilateral> bilateral, const std::vector<double>& theta_gamma,
                       const std::string& normalization, const std::string& filter, int num_channels, int num_iterations,
                       const std::optional<OriginArgument>& origin) {
    KernelSpecs specs;
    specs.bilateral = std::move(bilateral);
    specs.theta_gamma = theta_gamma;
    specs.normalization = parse_normalization(normalization);
    specs.filter = filter;
    specs.num_channels = num_channels;
    specs.num_filterings = num_iterations;
    if (origin) specs.origin = FeatureOrigin{origin->first, origin->second};
    return specs;
}

void check_signals() {
    nb::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

std::function<void(int, int)> reporter(const nb::object& progress, const char* stage) {
    return [&progress, stage](int step, int num_steps) {
        nb::gil_scoped_acquire gil;
        if (PyErr_CheckSignals() != 0) throw nb::python_error();
        if (!progress.is_none()) progress(stage, step, num_steps);
    };
}

}  // namespace crf
