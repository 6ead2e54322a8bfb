// What the Python module holds: arrays in, arrays out, no rules of the model.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <new>
#include <stdexcept>

#include "cpu/cost_model.h"
#include "cpu/cpu_level.h"
#include "cpu/grid.h"
#include "cpu/kernel_set.h"
#include "cpu/label_map.h"
#include "cpu/lattice_build.h"
#include "cpu/module_arguments.h"
#include "cpu/module_kernels.h"
#include "cpu/module_tiles.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace crf {
namespace {

// Of the first kernel. `out` comes in as zeros.
std::string message(const FloatArray& values, const FloatArray& image, const std::optional<MaskArray>& mask,
                    const std::vector<double>& spacing, const BilateralArgument& bilateral, const std::vector<double>& theta_gamma,
                    const std::string& normalization, const std::string& filter, int threads, const FloatOut& out) {
    const std::vector<int64_t> grid = checked_grid(values, mask, spacing);
    require(image.ndim() > 0 && grid_shape(image) == grid, "expected an image (modality, *grid) on the grid of the values");
    require(shape_of(out) == shape_of(values), "expected room for the messages in the shape of the values");
    require(!bilateral.empty() || !theta_gamma.empty(), "expected a kernel");
    require(values.shape(0) <= kMostLabels, "expected at most 65536 channels");
    const int num_channels = static_cast<int>(values.shape(0));
    const KernelSpecs specs = make_specs(size_of(image), bilateral, theta_gamma, normalization, filter, num_channels, 1);
    nb::gil_scoped_release release;
    ThreadPool pool(threads);
    pool.poll = check_signals;
    const Voxels voxels(grid, spacing, mask_data(mask));
    Workspace workspace;
    const KernelSet set(voxels, channel_pointers(image.data(), image.shape(0), voxels.grid_size), specs, pool, workspace, BuildCallback());
    const Kernel& kernel = set.kernels.front();
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

BilateralInput bilateral_input(const Voxels& voxels, const FloatArray& image, const std::vector<double>& theta_alpha,
                               const std::vector<double>& theta_beta, ThreadPool& pool) {
    return {voxels, on_box_axes(voxels, theta_alpha), theta_beta, channel_pointers(image.data(), image.shape(0), voxels.grid_size), pool};
}

// For tests: what "auto" reckons with.
double vertices_per_voxel_of(const FloatArray& image, const std::optional<MaskArray>& mask, const std::vector<double>& spacing,
                             const std::vector<double>& theta_alpha, const std::vector<double>& theta_beta) {
    const std::vector<int64_t> grid = checked_grid(image, mask, spacing);
    require_bandwidths({{theta_alpha, theta_beta}}, {}, size_of(image));
    ThreadPool pool(1);
    const Voxels voxels(grid, spacing, mask_data(mask));
    return estimate_vertices_per_voxel(bilateral_input(voxels, image, theta_alpha, theta_beta, pool));
}

// For tests.
nb::dict lattice_passes_of(const FloatArray& image, const std::optional<MaskArray>& mask, const std::vector<double>& spacing,
                           const std::vector<double>& theta_alpha, const std::vector<double>& theta_beta, int threads) {
    const std::vector<int64_t> grid = checked_grid(image, mask, spacing);
    require_bandwidths({{theta_alpha, theta_beta}}, {}, size_of(image));
    ThreadPool pool(threads);
    const Voxels voxels(grid, spacing, mask_data(mask));
    const LatticePasses found = lattice_passes(bilateral_input(voxels, image, theta_alpha, theta_beta, pool), pool);
    nb::dict result;
    result["num_features"] = found.num_features;
    result["tile_voxels"] = found.tile_voxels;
    result["tile_vertices"] = found.tile_vertices;
    result["local"] = found.local;
    result["weight"] = found.weight;
    result["vertices"] = found.vertices;
    result["links"] = found.links;
    return result;
}

// The filter that each appearance kernel would get.
std::vector<std::string> plan_filters(const FloatArray& image, const std::optional<MaskArray>& mask, const std::vector<double>& spacing,
                                      const BilateralArgument& bilateral, const std::string& filter, int num_labels, int num_iterations,
                                      int threads) {
    const std::vector<int64_t> grid = checked_grid(image, mask, spacing);
    require(num_labels >= 2, "expected from 2 to 65536 labels");
    const KernelSpecs specs = make_specs(size_of(image), bilateral, {}, "none", filter, num_labels - 1, num_iterations);
    ThreadPool pool(threads);
    pool.poll = check_signals;
    const Voxels voxels(grid, spacing, mask_data(mask));
    std::vector<std::string> planned;
    for (const KernelSpecs::Bilateral& kernel : specs.bilateral) {
        const BilateralInput input = bilateral_input(voxels, image, kernel.theta_alpha, kernel.theta_beta, pool);
        planned.push_back(choose_filter(specs.filter, input, specs.num_channels, specs.num_filterings, true));
    }
    return planned;
}

// Label maps, softmax and ranges of whole grids, of channels (channel, *grid).
void label_map_of(const FloatArray& logits, int threads, const nb::ndarray<nb::c_contig, nb::device::cpu>& out) {
    require(logits.ndim() > 0 && logits.shape(0) > 0, "expected logits (label, *grid), one label or more");
    require(shape_of(out) == grid_shape(logits), "expected a label map on the grid of the logits");
    require(logits.shape(0) <= (out.dtype() == nb::dtype<uint8_t>() ? 256 : kMostLabels), "expected a type that holds all labels");
    const int num_labels = static_cast<int>(logits.shape(0));
    const int64_t grid_size = static_cast<int64_t>(logits.size()) / num_labels;
    const bool is_byte = out.dtype() == nb::dtype<uint8_t>();
    if (!is_byte && out.dtype() != nb::dtype<uint16_t>()) throw InputError("label maps are uint8 or uint16");
    run_pool(threads, [&](ThreadPool& pool) {
        if (is_byte) {
            label_map(logits.data(), num_labels, grid_size, pool, static_cast<uint8_t*>(out.data()));
        } else {
            label_map(logits.data(), num_labels, grid_size, pool, static_cast<uint16_t*>(out.data()));
        }
    });
}

void softmax_of(const FloatArray& logits, int threads, const FloatOut& out) {
    require(logits.ndim() > 0 && logits.shape(0) > 0 && logits.shape(0) <= kMostLabels,
            "expected logits (label, *grid), one label or more");
    require(shape_of(out) == shape_of(logits), "expected room for the marginals in the shape of the logits");
    const int num_labels = static_cast<int>(logits.shape(0));
    run_pool(threads, [&](ThreadPool& pool) {
        softmax(logits.data(), num_labels, static_cast<int64_t>(logits.size()) / num_labels, pool, out.data());
    });
}

std::vector<float> channel_ranges_of(const FloatArray& channels, int threads) {
    require(channels.ndim() > 0, "expected channels on a grid, (channel, *grid)");
    const int64_t num_channels = static_cast<int64_t>(channels.shape(0));
    const int64_t size = num_channels ? static_cast<int64_t>(channels.size()) / num_channels : 0;
    return run_pool(threads, [&](ThreadPool& pool) { return channel_ranges(channels.data(), num_channels, size, pool); });
}

// The module's own classes for errors of the engine; exceptions of a progress callback pass through unchanged.
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

void define_module(nb::module_& m) {
    // Objects may outlive the interpreter, for example if a script ends with a graph in a global variable; no warning is needed.
    nb::set_leak_warnings(false);
    m.doc() = "The CPU engine of crfrefine; use it through crfrefine.engines.cpu.";
    define_errors(m);
    m.def("message", &message, "values"_a, "image"_a, "mask"_a.none(), "spacing"_a, "bilateral"_a, "theta_gamma"_a, "normalization"_a,
          "filter"_a, "threads"_a, "out"_a.noconvert());
    m.def("_vertices_per_voxel", &vertices_per_voxel_of, "image"_a, "mask"_a.none(), "spacing"_a, "theta_alpha"_a, "theta_beta"_a);
    m.def("plan_filters", &plan_filters, "image"_a, "mask"_a.none(), "spacing"_a, "bilateral"_a, "filter"_a, "num_labels"_a,
          "num_iterations"_a, "threads"_a);
    m.def("_lattice_passes", &lattice_passes_of, "image"_a, "mask"_a.none(), "spacing"_a, "theta_alpha"_a, "theta_beta"_a, "threads"_a);
    define_kernels(m);
    define_tiles(m);
    m.def("label_map", &label_map_of, "logits"_a, "threads"_a, "out"_a.noconvert());
    m.def("softmax", &softmax_of, "logits"_a, "threads"_a, "out"_a.noconvert());
    m.def("channel_ranges", &channel_ranges_of, "channels"_a, "threads"_a);
    m.def("cpu_level", &cpu_level);
}

}  // namespace crf
