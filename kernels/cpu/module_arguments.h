// Argument types of the Python module.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernel_set.h"

namespace crf {

using FloatArray = nanobind::ndarray<const float, nanobind::c_contig, nanobind::device::cpu>;
using FloatOut = nanobind::ndarray<float, nanobind::c_contig, nanobind::device::cpu>;
using MaskArray = nanobind::ndarray<const bool, nanobind::c_contig, nanobind::device::cpu>;

// The grid shape of (channel, *grid).
template <class Array>
std::vector<int64_t> grid_shape(const Array& channels) {
    std::vector<int64_t> shape;
    for (size_t a = 1; a < channels.ndim(); ++a) shape.push_back(static_cast<int64_t>(channels.shape(a)));
    return shape;
}

inline const uint8_t* mask_data(const std::optional<MaskArray>& mask) {
    return mask ? reinterpret_cast<const uint8_t*>(mask->data()) : nullptr;
}

// The start of each channel.
template <class T>
std::vector<const T*> channel_pointers(const T* data, size_t num_channels, int64_t grid_size) {
    std::vector<const T*> pointers;
    for (size_t m = 0; m < num_channels; ++m) pointers.push_back(data + static_cast<int64_t>(m) * grid_size);
    return pointers;
}

// Position and intensity of a feature origin.
using OriginArgument = std::pair<std::vector<int64_t>, std::vector<double>>;

// A list of (theta_alpha, theta_beta), one per bilateral kernel.
std::vector<KernelSpecs::Bilateral> bilateral_specs(const nanobind::list& bilateral);

KernelSpecs make_specs(std::vector<KernelSpecs::Bilateral> bilateral, const std::vector<double>& theta_gamma,
                       const std::string& normalization, const std::string& filter, int num_channels, int num_iterations,
                       const std::optional<OriginArgument>& origin = std::nullopt);

// For ThreadPool::poll: Ctrl-C takes effect while the engine works, not only when it returns.
void check_signals();

// Tells Python of each step as progress(stage, step, num_steps), and notices Ctrl-C; what the callback raises comes out of the engine.
// `progress` outlives it.
std::function<void(int, int)> reporter(const nanobind::object& progress, const char* stage);

}  // namespace crf
