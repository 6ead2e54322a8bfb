// Label sets per tile, for Python.
#pragma once

#include <nanobind/nanobind.h>

namespace crf {

void define_tiles(nanobind::module_& m);

}  // namespace crf
