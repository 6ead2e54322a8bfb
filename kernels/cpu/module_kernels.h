// The Python classes of kernels that are kept between calls: Kernels32 and Kernels64.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <vector>

#include "cpu/kernel_set.h"

namespace crf {

// The kernels that an object of the class Kernels32 has built.
KernelSet& kernel_set_of(const nanobind::handle& kernels);

// The grid that it has built them for.
std::vector<int64_t> grid_of(const nanobind::handle& kernels);

void define_kernels(nanobind::module_& m);

}  // namespace crf
