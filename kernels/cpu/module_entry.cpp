// The entry of the Python module, compiled for each level; its content is compiled once for all
// of them.
#include <Python.h>

#include <cstdio>  // nanobind uses stderr, which the header of the stable ABI lacks

#include <nanobind/nanobind.h>

namespace crf {
void define_module(nanobind::module_& m);
}

NB_MODULE(CRFREFINE_MODULE, m) { crf::define_module(m); }
