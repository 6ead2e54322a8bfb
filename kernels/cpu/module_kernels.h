// The Python classes of kernels that are kept between calls: Kernels32 and Kernels64.
#pragma once

#include <nanobind/nanobind.h>

namespace crf {

void define_kernels(nanobind::module_& m);

}  // namespace crf
