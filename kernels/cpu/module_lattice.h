// The results of each pass of building a lattice, as Python lists: for tests, which compare them with
// crfrefine/engines/reference/lattice.py.
#pragma once

#include <nanobind/nanobind.h>

namespace crf {

void define_lattice_passes(nanobind::module_& m);

}  // namespace crf
