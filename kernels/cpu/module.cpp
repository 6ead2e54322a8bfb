// The content of the Python module: arrays in, arrays out, no rules of the model.
#include "cpu/module.h"

#include "cpu/cpu_level.h"

#include <malloc.h>

namespace nb = nanobind;
using namespace nb::literals;

namespace crf {
namespace {
void require_positive(const std::vector<double>& values, size_t count, const char* otherwise) {
    require(
        values.size() == count && std::all_of(values.begin(), values.end(),
                                              [](double v) { return std::isfinite(v) && v > 0; }),
        otherwise);
}

// With the first kernel. `out` comes in as zeros.
std::string message(const FloatArray& values, const FloatArray& image,
                    const std::optional<MaskArray>& mask, const std::vector<double>& spacing,
                    KernelSetSpec spec, int threads, const FloatOut& out) {
    const std::vector<int64_t> grid = grid_shape(values);
    require(grid_shape(image) == grid,
            "expected an image (modality, *grid) on the grid of the values");
    require(shape_of(out) == shape_of(values),
            "expected room for the messages in the shape of the values");
    require(!spec.kernels.empty(), "expected a kernel");
    const int num_channels = static_cast<int>(std::min<int64_t>(values.shape(0), kMaxLabels + 1));
    spec.num_labels = num_channels + 1;
    spec.num_iterations = 1;
    require_kernels(image, mask, spacing, spec);
    return run_pool(threads, [&](ThreadPool& pool) {
        const Voxels voxels(grid, spacing, mask_data(mask));
        Workspace workspace;
        const KernelSet set(voxels, channel_pointers(image, voxels.grid_size), spec, pool,
                            workspace, BuildCallback());
        const Kernel& kernel = set.kernels.front();
        Buffer<float> sent(num_channels * voxels.num_voxels),
            received = filled(num_channels * voxels.num_voxels, 0.0f, pool);
        const auto for_runs = [&](auto&& copy) {
            for (const Run& run : voxels.runs)
                for (int c = 0; c < num_channels; ++c)
                    copy(c * voxels.grid_size + run.grid, c * voxels.num_voxels + run.voxel,
                         run.length);
        };
        for_runs([&](int64_t grid, int64_t voxel, int32_t count) {
            std::copy_n(values.data() + grid, count, sent.get() + voxel);
        });
        kernel.accumulate(sent.get(), num_channels, nullptr, received.get(), workspace);
        for_runs([&](int64_t grid, int64_t voxel, int32_t count) {
            std::copy_n(received.get() + voxel, count, out.data() + grid);
        });
        return kernel.filter->description();
    });
}

// The filter that each appearance kernel would get.
std::vector<std::string> plan_filters(const FloatArray& image, const std::optional<MaskArray>& mask,
                                      const std::vector<double>& spacing, const KernelSetSpec& spec,
                                      int threads) {
    require_kernels(image, mask, spacing, spec);
    return run_pool(threads, [&](ThreadPool& pool) {
        const Voxels voxels(grid_shape(image), spacing, mask_data(mask));
        std::vector<std::string> planned;
        for (const KernelSpec& kernel : spec.kernels) {
            if (kernel.kind != "bilateral") continue;
            const KernelInput input(voxels, on_box_axes(voxels, kernel.theta_position),
                                    kernel.theta_intensity,
                                    channel_pointers(image, voxels.grid_size), pool);
            input.require_span();
            planned.push_back(choose_filter(spec.filter, input, spec.calls()));
        }
        return planned;
    });
}

// Label maps, softmax and ranges of whole grids, of channels (channel, *grid).
template <class Label>
void label_map_of(const FloatArray& logits, int threads, const Contiguous<Label>& out) {
    require(shape_of(out) == grid_shape(logits), "expected a label map on the grid of the logits");
    require(logits.shape(0) - 1 <= std::numeric_limits<Label>::max(),
            "expected a type that holds all labels");
    run_pool(threads, [&](ThreadPool& pool) {
        label_map(logits.data(), static_cast<int>(logits.shape(0)),
                  static_cast<int64_t>(out.size()), pool, out.data());
    });
}

void softmax_of(const FloatArray& logits, int threads, const FloatOut& out) {
    require(logits.ndim() > 0 && logits.shape(0) > 0,
            "expected logits (label, *grid), one label or more");
    require_labels(static_cast<int64_t>(logits.shape(0)));
    require(shape_of(out) == shape_of(logits),
            "expected room for the marginals in the shape of the logits");
    const int num_labels = static_cast<int>(logits.shape(0));
    run_pool(threads, [&](ThreadPool& pool) {
        softmax(logits.data(), num_labels, static_cast<int64_t>(logits.size()) / num_labels, pool,
                out.data());
    });
}

std::vector<float> channel_ranges_of(const FloatArray& channels, int threads) {
    require(channels.ndim() > 0, "expected channels on a grid, (channel, *grid)");
    const int64_t num_channels = static_cast<int64_t>(channels.shape(0));
    const int64_t size = num_channels ? static_cast<int64_t>(channels.size()) / num_channels : 0;
    return run_pool(threads, [&](ThreadPool& pool) {
        return channel_ranges(channels.data(), num_channels, size, pool);
    });
}

// The module's own classes for errors of the engine; exceptions of a progress callback pass through
// unchanged.
void define_errors(nb::module_& m) {
    nb::exception<CapacityError>(m, "EngineCapacityError", PyExc_RuntimeError);
    nb::exception<InputError>(m, "EngineInputError", PyExc_ValueError);
    const nb::exception<std::bad_alloc> memory_error(m, "EngineMemoryError", PyExc_RuntimeError);
    nb::register_exception_translator(
        [](const std::exception_ptr& thrown, void* type) {
            try {
                std::rethrow_exception(thrown);
            } catch (const std::length_error& error) {  // a container larger than any memory
                PyErr_SetString(static_cast<PyObject*>(type), error.what());
            }
        },
        memory_error.ptr());
}
}  // namespace

void require_bandwidths(const std::vector<double>& position, const std::vector<double>& intensity,
                        size_t num_axes, size_t num_modalities) {
    require_positive(position, num_axes,
                     "expected one bandwidth per axis of the grid, finite and above 0");
    if (!intensity.empty())
        require_positive(intensity, num_modalities,
                         "expected one bandwidth per modality, finite and above 0, or none");
}

void require_kernels(const FloatArray& image, const std::optional<MaskArray>& mask,
                     const std::vector<double>& spacing, const KernelSetSpec& spec) {
    constexpr int64_t kFarthest = int64_t{1}
                                  << 40;  // far beyond any volume, and far from the end of 64 bits
    const std::vector<int64_t> grid = grid_shape(image);
    for (int64_t extent : grid)
        require(extent <= std::numeric_limits<int32_t>::max(),
                "expected at most 2^31 - 1 voxels along an axis");
    require(!mask || shape_of(*mask) == grid, "expected a mask on the grid of the channels");
    require_positive(spacing, grid.size(),
                     "expected one spacing per axis of the grid, finite and above 0");
    for (const KernelSpec& kernel : spec.kernels)
        require_bandwidths(kernel.theta_position, kernel.theta_intensity, grid.size(),
                           image.shape(0));
    require(spec.names.size() == spec.kernels.size(), "expected one name per kernel");
    require_labels(spec.calls().num_channels);
    require(spec.num_iterations >= 0, "expected 0 iterations or more");
    if (!spec.origin) return;
    const auto& [position, intensity] = *spec.origin;
    require(position.size() == grid.size() && intensity.size() == image.shape(0) &&
                std::all_of(position.begin(), position.end(),
                            [](int64_t p) { return p >= -kFarthest && p <= kFarthest; }) &&
                std::all_of(intensity.begin(), intensity.end(),
                            [](double v) { return std::isfinite(v); }),
            "expected an origin with one position per axis of the grid and one intensity per "
            "modality, finite");
}

void require_model(const MeanFieldOptions& model, size_t num_kernels) {
    require_labels(model.num_labels);
    const size_t num_labels = static_cast<size_t>(model.num_labels);
    require(model.weight.size() == num_kernels &&
                std::all_of(model.weight.begin(), model.weight.end(),
                            [&](const auto& w) { return w.size() == num_labels; }),
            "expected one list of weights per kernel, with one weight per label");
    require(model.is_potts || model.compatibility.size() == num_labels * num_labels,
            "expected one penalty per pair of labels");
    require(model.bias.empty() || model.bias.size() == num_labels, "expected one bias per label");
    require(model.num_iterations >= 0, "expected 0 iterations or more");
    require(model.volume_slack >= 0, "expected a slack of 0 or more");
}

nb::dict as_dict(const MeanFieldOutcome& outcome) {
    nb::dict result;
    result["num_iterations"] = outcome.num_iterations;
    result["converged"] = outcome.converged;
    result["energy"] = outcome.energy;
    return result;
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

// Blocks below so many bytes come from malloc's arenas, at whose ends so much free memory stays.
// Free memory before a block in use stays in any case, and larger blocks go back to the system when
// they are freed. Malloc's own threshold rises to the largest block that was freed.
void keep_freed_memory([[maybe_unused]] int bytes) {
#if defined(__GLIBC__)
    mallopt(M_MMAP_THRESHOLD, bytes);
    mallopt(M_TRIM_THRESHOLD, bytes);
#endif
}

void define_module(nb::module_& m) {
    // Objects may outlive the interpreter, for example if a script ends with a graph in a global
    // variable; no warning is needed.
    nb::set_leak_warnings(false);
    m.doc() = "The CPU engine of crfrefine; use it through crfrefine.engines.cpu.";
    define_errors(m);
    m.def("message", &message, "values"_a, "image"_a, "mask"_a.none(), "spacing"_a, "spec"_a,
          "threads"_a, "out"_a.noconvert());
    m.def("plan_filters", &plan_filters, "image"_a, "mask"_a.none(), "spacing"_a, "spec"_a,
          "threads"_a);
    define_kernels(m);
    define_points(m);
    define_tiles(m);
    m.def("label_map", &label_map_of<uint8_t>, "logits"_a, "threads"_a, "out"_a.noconvert());
    m.def("label_map", &label_map_of<uint16_t>, "logits"_a, "threads"_a, "out"_a.noconvert());
    m.def("softmax", &softmax_of, "logits"_a, "threads"_a, "out"_a.noconvert());
    m.def("channel_ranges", &channel_ranges_of, "channels"_a, "threads"_a);
    m.def("cpu_level", &cpu_level);
    m.def("keep_freed_memory", &keep_freed_memory, "bytes"_a = 1 << 25);
}
}  // namespace crf
