// The Python module: arrays in, arrays out, no rules of the model.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>

#include "cpu/cost_model.h"
#include "cpu/label_map.h"
#include "cpu/mean_field.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace crf {
namespace {

using FloatArray = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using FloatOut = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using MaskArray = nb::ndarray<const bool, nb::c_contig, nb::device::cpu>;

std::vector<int64_t> grid_shape(const FloatArray& channels) {
    std::vector<int64_t> shape;
    for (size_t a = 1; a < channels.ndim(); ++a) shape.push_back(static_cast<int64_t>(channels.shape(a)));
    return shape;
}

const uint8_t* mask_data(const std::optional<MaskArray>& mask) { return mask ? reinterpret_cast<const uint8_t*>(mask->data()) : nullptr; }

std::vector<double> box_axes(const Voxels& voxels, const std::vector<double>& per_grid_axis) {
    std::vector<double> values;
    for (int a = 0; a < voxels.num_axes; ++a) values.push_back(per_grid_axis[voxels.source_axis[a]]);
    return values;
}

BilateralInput bilateral_input(const Voxels& voxels, const FloatArray& image, const std::vector<double>& theta_alpha,
                               const std::vector<double>& theta_beta, ThreadPool& pool) {
    std::vector<const float*> intensity;
    for (size_t m = 0; m < image.shape(0); ++m) intensity.push_back(image.data() + m * voxels.grid_size);
    return BilateralInput(voxels, box_axes(voxels, theta_alpha), theta_beta, intensity, pool);
}

Normalization parse_normalization(const std::string& name) {
    if (name == "symmetric") return Normalization::kSymmetric;
    if (name == "after") return Normalization::kAfter;
    if (name == "none") return Normalization::kNone;
    throw std::invalid_argument("unknown normalization '" + name + "'");
}

// Ctrl-C is noticed while the engine works, not only when it returns.
void check_signals() {
    nb::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

class Stopwatch {
   public:
    double lap() {
        const auto now = std::chrono::steady_clock::now();
        const double seconds = std::chrono::duration<double>(now - last_).count();
        last_ = now;
        return seconds;
    }

   private:
    std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

// bilateral: list of (weight, theta_alpha, theta_beta); spatial: None or (weight, theta_gamma). progress(stage, step, num_steps).
nb::dict mean_field(const FloatArray& logits, const FloatArray& image, const std::optional<MaskArray>& mask,
                    const std::vector<double>& spacing, const nb::list& bilateral, const nb::object& spatial,
                    const std::vector<float>& compatibility, bool is_potts, int num_iterations, double tolerance, float temperature,
                    const std::string& normalization_name, float damping, const std::string& filter, int threads,
                    const nb::object& progress, const FloatOut& out) {
    struct Bilateral {
        std::vector<float> weight;
        std::vector<double> theta_alpha, theta_beta;
    };
    std::vector<Bilateral> appearance;
    for (nb::handle item : bilateral) {
        const auto kernel = nb::cast<nb::tuple>(item);
        appearance.push_back(
            {nb::cast<std::vector<float>>(kernel[0]), nb::cast<std::vector<double>>(kernel[1]), nb::cast<std::vector<double>>(kernel[2])});
    }
    std::vector<float> spatial_weight;
    std::vector<double> theta_gamma;
    if (!spatial.is_none()) {
        const auto kernel = nb::cast<nb::tuple>(spatial);
        spatial_weight = nb::cast<std::vector<float>>(kernel[0]);
        theta_gamma = nb::cast<std::vector<double>>(kernel[1]);
    }
    MeanFieldOptions options;
    options.num_labels = static_cast<int>(logits.shape(0));
    options.compatibility = compatibility;
    options.is_potts = is_potts;
    options.num_iterations = num_iterations;
    options.tolerance = tolerance;
    options.temperature = temperature;
    options.damping = damping;
    const Normalization normalization = parse_normalization(normalization_name);
    // With D^-1 K the kernel is not symmetric, and the iteration does not lower this energy: it may rise without anything being wrong.
    options.watch_energy = normalization != Normalization::kAfter;
    const bool has_progress = !progress.is_none();
    auto report = [&](const char* stage, int step, int num_steps) {
        nb::gil_scoped_acquire gil;
        if (PyErr_CheckSignals() != 0) throw nb::python_error();
        if (has_progress) progress(stage, step, num_steps);
    };

    MeanFieldOutcome outcome;
    std::vector<std::string> descriptions;
    double build_seconds = 0, steps_seconds = 0;
    {
        nb::gil_scoped_release release;
        const BlockCache cache;
        Stopwatch watch;
        ThreadPool pool(threads);
        pool.poll = check_signals;
        const Voxels voxels(grid_shape(logits), spacing, mask_data(mask));
        std::vector<Kernel> kernels;
        Workspace workspace;
        const int num_filterings = num_iterations + 2;
        auto add = [&](std::unique_ptr<Filter> built, const std::vector<float>& weight, const std::string& name) {
            Kernel kernel;
            kernel.filter = std::move(built);
            kernel.weight = weight;
            normalize_kernel(kernel, voxels, normalization, pool, workspace);
            descriptions.push_back(name + ": " + kernel.filter->description());
            kernels.push_back(std::move(kernel));
        };
        for (size_t k = 0; k < appearance.size(); ++k) {
            report("build", static_cast<int>(k), static_cast<int>(appearance.size()));
            const BilateralInput input = bilateral_input(voxels, image, appearance[k].theta_alpha, appearance[k].theta_beta, pool);
            add(make_bilateral_filter(filter, input, options.num_labels - 1, num_filterings, pool), appearance[k].weight,
                "bilateral." + std::to_string(k));
        }
        if (!theta_gamma.empty()) add(make_spatial_filter(voxels, box_axes(voxels, theta_gamma), pool), spatial_weight, "spatial");
        build_seconds = watch.lap();
        outcome = run_mean_field(voxels, std::move(kernels), options, logits.data(), out.data(), pool, std::move(workspace),
                                 [&](int step, int num_steps) { report("mean field", step, num_steps); });
        steps_seconds = watch.lap();
    }
    nb::dict result;
    result["num_iterations"] = outcome.num_iterations;
    result["converged"] = outcome.converged;
    result["energy"] = outcome.energy;
    result["filters"] = descriptions;
    result["build_seconds"] = build_seconds;
    result["steps_seconds"] = steps_seconds;
    return result;
}

// theta_beta empty: the spatial kernel of theta_alpha. `out` comes in as zeros.
std::string message(const FloatArray& values, const FloatArray& image, const std::optional<MaskArray>& mask,
                    const std::vector<double>& spacing, const std::vector<double>& theta_alpha, const std::vector<double>& theta_beta,
                    const std::string& normalization_name, const std::string& filter, int threads, const FloatOut& out) {
    nb::gil_scoped_release release;
    ThreadPool pool(threads);
    pool.poll = check_signals;
    const Voxels voxels(grid_shape(values), spacing, mask_data(mask));
    const int num_channels = static_cast<int>(values.shape(0));
    Kernel kernel;
    kernel.filter = theta_beta.empty() ? make_spatial_filter(voxels, box_axes(voxels, theta_alpha), pool)
                                       : make_bilateral_filter(filter, bilateral_input(voxels, image, theta_alpha, theta_beta, pool),
                                                               num_channels, 3, pool);
    Workspace workspace;
    normalize_kernel(kernel, voxels, parse_normalization(normalization_name), pool, workspace);
    Buffer<float> sent(num_channels * voxels.num_voxels), received(num_channels * voxels.num_voxels);
    std::fill(received.get(), received.get() + received.size, 0.0f);
    for (const Run& run : voxels.runs)
        for (int c = 0; c < num_channels; ++c) {
            const float* from = values.data() + c * voxels.grid_size + run.grid;
            std::copy(from, from + run.length, sent.get() + c * voxels.num_voxels + run.voxel);
        }
    const std::vector<float> weight(num_channels, 1.0f);
    kernel.filter->accumulate(sent.get(), num_channels, kernel.scales_sent ? kernel.scale.get() : nullptr, kernel.scale.get(),
                              weight.data(), received.get(), workspace);
    for (const Run& run : voxels.runs)
        for (int c = 0; c < num_channels; ++c) {
            const float* from = received.get() + c * voxels.num_voxels + run.voxel;
            std::copy(from, from + run.length, out.data() + c * voxels.grid_size + run.grid);
        }
    return kernel.filter->description();
}

}  // namespace
}  // namespace crf

NB_MODULE(CRFREFINE_MODULE, m) {
    m.doc() = "The CPU engine of crfrefine; use it through crfrefine.backends.cpu.";
    m.def("mean_field", &crf::mean_field, "logits"_a, "image"_a, "mask"_a.none(), "spacing"_a, "bilateral"_a, "spatial"_a.none(),
          "compatibility"_a, "is_potts"_a, "num_iterations"_a, "tolerance"_a, "temperature"_a, "normalization"_a, "damping"_a, "filter"_a,
          "threads"_a, "progress"_a.none(), "out"_a);
    m.def("message", &crf::message, "values"_a, "image"_a, "mask"_a.none(), "spacing"_a, "theta_alpha"_a, "theta_beta"_a, "normalization"_a,
          "filter"_a, "threads"_a, "out"_a);
    m.def("label_map", &crf::label_map, "logits"_a, "threads"_a, "out"_a);
    m.def("softmax", &crf::softmax, "logits"_a, "threads"_a, "out"_a);
    m.def("channel_ranges", &crf::channel_ranges, "channels"_a, "threads"_a);
#if defined(__x86_64__)
    // The highest level of instructions that this processor and operating system run: what the modules beside this one need.
    m.def("cpu_level", [] {
        __builtin_cpu_init();
        if (__builtin_cpu_supports("x86-64-v4")) return "avx512";
        if (__builtin_cpu_supports("x86-64-v3")) return "avx2";
        return "baseline";
    });
#else
    m.def("cpu_level", [] { return "baseline"; });
#endif
}
