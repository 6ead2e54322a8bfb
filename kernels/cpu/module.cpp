// The Python module: arrays in, arrays out, no rules of the model.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <functional>
#include <mutex>

#include "cpu/kernel_set.h"
#include "cpu/label_map.h"

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

// Ctrl-C is noticed while the engine works, not only when it returns.
void check_signals() {
    nb::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

// Tells Python of each step, and notices Ctrl-C; what the callback raises comes out of the engine.
std::function<void(int, int)> reporter(const nb::object& progress, const char* stage) {
    return [&progress, stage](int step, int num_steps) {
        nb::gil_scoped_acquire gil;
        if (PyErr_CheckSignals() != 0) throw nb::python_error();
        if (!progress.is_none()) progress(stage, step, num_steps);
    };
}

// A list of (theta_alpha, theta_beta), one a bilateral kernel.
std::vector<KernelSpecs::Bilateral> bilateral_specs(const nb::list& bilateral) {
    std::vector<KernelSpecs::Bilateral> specs;
    for (nb::handle item : bilateral) {
        const auto thetas = nb::cast<nb::tuple>(item);
        specs.push_back({nb::cast<std::vector<double>>(thetas[0]), nb::cast<std::vector<double>>(thetas[1])});
    }
    return specs;
}

template <class T>
std::vector<const T*> channel_pointers(const T* data, size_t num_channels, int64_t grid_size) {
    std::vector<const T*> pointers;
    for (size_t m = 0; m < num_channels; ++m) pointers.push_back(data + static_cast<int64_t>(m) * grid_size);
    return pointers;
}

KernelSpecs make_specs(std::vector<KernelSpecs::Bilateral> bilateral, const std::vector<double>& theta_gamma,
                       const std::string& normalization, const std::string& filter, int num_channels, int num_iterations) {
    KernelSpecs specs;
    specs.bilateral = std::move(bilateral);
    specs.theta_gamma = theta_gamma;
    specs.normalization = parse_normalization(normalization);
    specs.filter = filter;
    specs.num_channels = num_channels;
    specs.num_filterings = num_iterations + 2;  // one for each step, and two for the normalization
    return specs;
}

// The kernels of one model on one image, kept between calls; a call at a time. T: float or double.
template <class T>
class Kernels {
   public:
    using Array = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
    using Out = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

    Kernels(const Array& image, const std::optional<MaskArray>& mask, const std::vector<double>& spacing, const nb::list& bilateral,
            const std::vector<double>& theta_gamma, const std::string& normalization, const std::string& filter, int num_labels,
            int num_iterations, const std::vector<int>& user_axis, int threads, const nb::object& progress)
        : image_(image),
          num_labels_(num_labels),
          specs_(make_specs(bilateral_specs(bilateral), theta_gamma, normalization, filter, num_labels - 1, num_iterations)) {
        std::vector<int64_t> shape;
        for (size_t a = 1; a < image.ndim(); ++a) shape.push_back(static_cast<int64_t>(image.shape(a)));
        nb::gil_scoped_release release;
        const BlockCache cache;
        pool_ = std::make_unique<ThreadPool>(threads);
        pool_->poll = check_signals;
        const Rest rest{*pool_};
        voxels_ = std::make_unique<Voxels>(shape, spacing, mask_data(mask), user_axis);
        Workspace workspace;
        set_ = std::make_unique<KernelSet<T>>(*voxels_, channel_pointers(image.data(), image.shape(0), voxels_->grid_size), specs_, *pool_,
                                              workspace, reporter(progress, "build"));
        descriptions_ = set_->descriptions;
    }

    int64_t num_voxels() const { return voxels_->num_voxels; }
    std::vector<std::string> descriptions() const { return descriptions_; }

    // Between calls the pool's workers do not exist.
    struct Rest {
        ThreadPool& pool;
        ~Rest() { pool.rest(); }
    };

    // Runs until the stopping rule is met, and gives the kernels up before the last step's logits are written.
    nb::dict run_last(const Array& logits, const std::vector<std::vector<T>>& weights, const std::vector<T>& compatibility, bool is_potts,
                      double temperature, double damping, int num_iterations, double tolerance, const nb::object& progress,
                      const Out& out) {
        MeanFieldOptions<T> options = make_options(weights, compatibility, is_potts, temperature, damping, num_iterations);
        options.tolerance = tolerance;
        MeanFieldOutcome outcome;
        {
            nb::gil_scoped_release release;
            const std::lock_guard<std::mutex> lock(mutex_);
            const Rest rest{*pool_};
            const BlockCache cache;
            Workspace workspace;
            T* const no_record = nullptr;
            outcome = run_mean_field(*voxels_, set_->kernels, options, logits.data(), out.data(), no_record, *pool_, workspace,
                                     reporter(progress, "mean field"));
            set_->kernels.clear();
        }
        nb::dict result;
        result["num_iterations"] = outcome.num_iterations;
        result["converged"] = outcome.converged;
        result["energy"] = outcome.energy;
        return result;
    }

    // record: (step, channel, voxel), filled in; one channel less than labels where each kernel has one weight for all labels. Returns the
    // length of each step.
    std::vector<double> forward(const Array& logits, const std::vector<std::vector<T>>& weights, const std::vector<T>& compatibility,
                                bool is_potts, double temperature, double damping, const Out& out, const Out& record) {
        const MeanFieldOptions<T> options =
            make_options(weights, compatibility, is_potts, temperature, damping, static_cast<int>(record.shape(0)));
        require(static_cast<int64_t>(record.shape(1)) == options.num_channels() && static_cast<int64_t>(record.shape(2)) == num_voxels(),
                "the record has another shape than (steps, channels, voxels)");
        nb::gil_scoped_release release;
        const std::lock_guard<std::mutex> lock(mutex_);
        const Rest rest{*pool_};
        const BlockCache cache;
        Workspace workspace;
        return run_mean_field(*voxels_, set_->kernels, options, logits.data(), out.data(), record.data(), *pool_, workspace, StepCallback())
            .step;
    }

    nb::dict backward(const Array& logits, const Array& record, const std::vector<double>& step, const Array& gradient,
                      const std::vector<std::vector<T>>& weights, const std::vector<T>& compatibility, bool is_potts, double temperature,
                      double damping, bool wants_theta, const Out& grad_logits, const std::optional<Out>& grad_image) {
        const MeanFieldOptions<T> options =
            make_options(weights, compatibility, is_potts, temperature, damping, static_cast<int>(step.size()));
        require(record.shape(0) == step.size() && static_cast<int64_t>(record.shape(1)) == options.num_channels() &&
                    static_cast<int64_t>(record.shape(2)) == num_voxels(),
                "the record is not the one that the way forth left with these weights");
        MeanFieldGradients gradients;
        {
            nb::gil_scoped_release release;
            const std::lock_guard<std::mutex> lock(mutex_);
            const Rest rest{*pool_};
            const BlockCache cache;
            Workspace workspace;
            const BackwardInput<T> input{logits.data(), record.data(), step, gradient.data(), wants_theta};
            gradients = run_mean_field_backward(*voxels_, set_->kernels, set_->features, options, input, grad_logits.data(),
                                                grad_image ? grad_image->data() : nullptr, *pool_, workspace);
        }
        nb::dict result;
        result["weights"] = gradients.weight;
        result["compatibility"] = gradients.compatibility;
        result["temperature"] = gradients.temperature;
        nb::list theta;
        for (const std::vector<double>& of_kernel : gradients.theta) theta.append(on_grid_axes(of_kernel));
        result["theta"] = theta;
        return result;
    }

   private:
    static void require(bool condition, const char* otherwise) {
        if (!condition) throw std::invalid_argument(otherwise);
    }

    MeanFieldOptions<T> make_options(const std::vector<std::vector<T>>& weights, const std::vector<T>& compatibility, bool is_potts,
                                     double temperature, double damping, int num_iterations) const {
        require(descriptions_.empty() || !set_->kernels.empty(), "these kernels have had their last run; build them anew");
        require(weights.size() == set_->kernels.size(), "expected one list of weights per kernel");
        MeanFieldOptions<T> options;
        options.num_labels = num_labels_;
        options.weight = weights;
        options.compatibility = compatibility;
        options.is_potts = is_potts;
        options.num_iterations = num_iterations;
        options.temperature = static_cast<T>(temperature);
        options.damping = static_cast<T>(damping);
        options.watch_energy = energy_is_lowered(specs_.normalization);
        return options;
    }

    // Intensities first, then all axes of the grid: nothing depends on the bandwidths of those that are one voxel long.
    std::vector<double> on_grid_axes(const std::vector<double>& theta) const {
        const size_t num_modalities = theta.size() - voxels_->num_axes;
        std::vector<double> values(theta.begin(), theta.begin() + static_cast<std::ptrdiff_t>(num_modalities));
        values.resize(num_modalities + image_.ndim() - 1, 0.0);
        for (int a = 0; a < voxels_->num_axes; ++a) values[num_modalities + voxels_->source_axis[a]] = theta[num_modalities + a];
        return values;
    }

    const Array image_;  // the features are read from it
    const int num_labels_;
    const KernelSpecs specs_;
    std::unique_ptr<ThreadPool> pool_;
    std::unique_ptr<Voxels> voxels_;
    std::unique_ptr<KernelSet<T>> set_;
    std::vector<std::string> descriptions_;
    std::mutex mutex_;
};

template <class T>
void define_kernels(nb::module_& m, const char* name) {
    using K = Kernels<T>;
    nb::class_<K>(m, name)
        .def(nb::init<const typename K::Array&, const std::optional<MaskArray>&, const std::vector<double>&, const nb::list&,
                      const std::vector<double>&, const std::string&, const std::string&, int, int, const std::vector<int>&, int,
                      const nb::object&>(),
             "image"_a, "mask"_a.none(), "spacing"_a, "bilateral"_a, "theta_gamma"_a, "normalization"_a, "filter"_a, "num_labels"_a,
             "num_iterations"_a, "user_axis"_a, "threads"_a, "progress"_a.none())
        .def("num_voxels", &K::num_voxels)
        .def("descriptions", &K::descriptions)
        .def("run_last", &K::run_last, "logits"_a, "weights"_a, "compatibility"_a, "is_potts"_a, "temperature"_a, "damping"_a,
             "num_iterations"_a, "tolerance"_a, "progress"_a.none(), "out"_a)
        .def("forward", &K::forward, "logits"_a, "weights"_a, "compatibility"_a, "is_potts"_a, "temperature"_a, "damping"_a, "out"_a,
             "record"_a)
        .def("backward", &K::backward, "logits"_a, "record"_a, "step"_a, "gradient"_a, "weights"_a, "compatibility"_a, "is_potts"_a,
             "temperature"_a, "damping"_a, "wants_theta"_a, "grad_logits"_a, "grad_image"_a.none());
}

// Of the first kernel. `out` comes in as zeros.
std::string message(const FloatArray& values, const FloatArray& image, const std::optional<MaskArray>& mask,
                    const std::vector<double>& spacing, const nb::list& bilateral, const std::vector<double>& theta_gamma,
                    const std::string& normalization, const std::string& filter, int threads, const FloatOut& out) {
    const int num_channels = static_cast<int>(values.shape(0));
    const KernelSpecs specs = make_specs(bilateral_specs(bilateral), theta_gamma, normalization, filter, num_channels, 1);
    nb::gil_scoped_release release;
    ThreadPool pool(threads);
    pool.poll = check_signals;
    const Voxels voxels(grid_shape(values), spacing, mask_data(mask));
    Workspace workspace;
    const KernelSet<float> set(voxels, channel_pointers(image.data(), image.shape(0), voxels.grid_size), specs, pool, workspace,
                               BuildCallback());
    const Kernel<float>& kernel = set.kernels.front();
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
    // Objects may outlive the interpreter, as when a script ends with a graph in a global: nothing to warn of.
    nb::set_leak_warnings(false);
    m.doc() = "The CPU engine of crfrefine; use it through crfrefine.engines.cpu.";
    m.def("message", &crf::message, "values"_a, "image"_a, "mask"_a.none(), "spacing"_a, "bilateral"_a, "theta_gamma"_a, "normalization"_a,
          "filter"_a, "threads"_a, "out"_a);
    crf::define_kernels<float>(m, "Kernels32");
    crf::define_kernels<double>(m, "Kernels64");
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
