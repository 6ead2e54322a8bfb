// Argument types of the Python module, and their checks: what is behind the module trusts sizes, lists and bandwidths.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/errors.h"
#include "cpu/kernel_set.h"

namespace crf {

using FloatArray = nanobind::ndarray<const float, nanobind::c_contig, nanobind::device::cpu>;
using FloatOut = nanobind::ndarray<float, nanobind::c_contig, nanobind::device::cpu>;
using MaskArray = nanobind::ndarray<const bool, nanobind::c_contig, nanobind::device::cpu>;

// Labels are kept in 16 bits where there is one per voxel.
constexpr int64_t kMostLabels = 1 << 16;

inline void require(bool condition, const char* otherwise) {
    if (!condition) throw InputError(otherwise);
}

// `count` finite numbers above 0.
void require_positive(const std::vector<double>& values, size_t count, const char* otherwise);

template <class Array>
std::vector<int64_t> shape_of(const Array& array, size_t first_axis = 0) {
    std::vector<int64_t> shape;
    for (size_t a = first_axis; a < array.ndim(); ++a) shape.push_back(static_cast<int64_t>(array.shape(a)));
    return shape;
}

// The grid shape of (channel, *grid).
template <class Array>
std::vector<int64_t> grid_shape(const Array& channels) {
    return shape_of(channels, 1);
}

// The grid shape of (channel, *grid), once mask and spacing fit it. Reads no voxel.
template <class Array>
std::vector<int64_t> checked_grid(const Array& channels, const std::optional<MaskArray>& mask, const std::vector<double>& spacing) {
    require(channels.ndim() >= 2 && channels.shape(0) > 0, "expected channels on a grid, (channel, *grid), one channel or more");
    const std::vector<int64_t> shape = grid_shape(channels);
    for (int64_t extent : shape) require(extent <= std::numeric_limits<int32_t>::max(), "expected at most 2^31 - 1 voxels along an axis");
    require(!mask || shape_of(*mask) == shape, "expected a mask on the grid of the channels");
    require_positive(spacing, shape.size(), "expected one spacing per axis of the grid, finite and above 0");
    return shape;
}

inline const uint8_t* mask_data(const std::optional<MaskArray>& mask) {
    return mask ? reinterpret_cast<const uint8_t*>(mask->data()) : nullptr;
}

// The start of each channel.
inline std::vector<const float*> channel_pointers(const float* data, size_t num_channels, int64_t grid_size) {
    std::vector<const float*> pointers;
    for (size_t m = 0; m < num_channels; ++m) pointers.push_back(data + static_cast<int64_t>(m) * grid_size);
    return pointers;
}

// Position and intensity of a feature origin.
using OriginArgument = std::pair<std::vector<int64_t>, std::vector<double>>;

// Bandwidths of position and of intensity of each bilateral kernel.
using BilateralArgument = std::vector<std::pair<std::vector<double>, std::vector<double>>>;

// What is known of the image when the kernels' settings are checked.
struct ImageSize {
    size_t num_axes, num_modalities;
};

template <class Array>
ImageSize size_of(const Array& image) {
    return {image.ndim() - 1, image.shape(0)};
}

void require_bandwidths(const BilateralArgument& bilateral, const std::vector<double>& theta_gamma, const ImageSize& image);

KernelSpecs make_specs(const ImageSize& image, const BilateralArgument& bilateral, const std::vector<double>& theta_gamma,
                       const std::string& normalization, const std::string& filter, int num_channels, int num_iterations,
                       const std::optional<OriginArgument>& origin = std::nullopt);

// Whether there is a penalty per pair of labels; Potts needs none.
inline bool fits_labels(const std::vector<float>& compatibility, bool is_potts, size_t num_labels) {
    return is_potts ? compatibility.empty() : compatibility.size() == num_labels * num_labels;
}

// The settings of a mean field that runs of whole grids and of tiles share.
inline MeanFieldOptions checked_options(int num_labels, const std::vector<std::vector<float>>& weights,
                                        const std::vector<float>& compatibility, bool is_potts, double temperature, int num_iterations,
                                        double tolerance) {
    require(std::isfinite(temperature) && static_cast<float>(temperature) > 0, "expected a temperature that is finite and above 0");
    require(num_iterations >= 0 && tolerance >= 0, "expected 0 iterations or more, and a tolerance of 0 or more");
    MeanFieldOptions options;
    options.num_labels = num_labels;
    options.weight = weights;
    options.compatibility = compatibility;
    options.is_potts = is_potts;
    options.num_iterations = num_iterations;
    options.tolerance = tolerance;
    options.temperature = static_cast<float>(temperature);
    return options;
}

// For ThreadPool::poll: Ctrl-C takes effect while the engine works, not only when it returns.
void check_signals();

// Tells Python of each step as progress(stage, step, num_steps), and notices Ctrl-C; what the callback raises comes out of the engine.
struct Reporter {
    const nanobind::object& progress;
    const char* stage;

    void operator()(int step, int num_steps) const;
};

// Calls body(pool), without Python's lock.
template <class Body>
auto run_pool(int threads, Body&& body) {
    nanobind::gil_scoped_release release;
    ThreadPool pool(threads);
    pool.poll = check_signals;
    return body(pool);
}

}  // namespace crf
