// The Python module's arguments and their checks. They guard memory: sizes, strides, and places.
// Python checks the rest.
#pragma once

#include <Python.h>

#include <cstdio>  // nanobind uses stderr, which the header of the stable ABI lacks

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <mutex>
#include <thread>

#include "cpu/kernel_set.h"
#include "cpu/mean_field_backward.h"
#include "cpu/tiles.h"

namespace crf {
template <class T, class... Options>
using Contiguous = nanobind::ndarray<T, nanobind::c_contig, nanobind::device::cpu, Options...>;
using FloatArray = Contiguous<const float>;
using FloatOut = Contiguous<float>;
using MaskArray = Contiguous<const bool>;

// Position and intensity of a feature origin.
using Origin = std::pair<std::vector<int64_t>, std::vector<double>>;

// Labels are kept in 16 bits where there is one per voxel.
constexpr int64_t kMaxLabels = 1 << 16;

inline void require(bool condition, const char* otherwise) {
    if (!condition) throw InputError(otherwise);
}

template <class Array>
void require_size(const Array& array, int64_t size, const char* otherwise) {
    require(static_cast<int64_t>(array.size()) == size, otherwise);
}

inline void require_labels(int64_t count) {
    require(count >= 1 && count <= kMaxLabels, "expected from 2 to 65536 labels");
}

template <class Array>
std::vector<int64_t> shape_of(const Array& array) {
    std::vector<int64_t> shape;
    for (size_t a = 0; a < array.ndim(); ++a) shape.push_back(static_cast<int64_t>(array.shape(a)));
    return shape;
}

// The grid shape of (channel, *grid).
template <class Array>
std::vector<int64_t> grid_shape(const Array& channels) {
    require(channels.ndim() >= 2, "expected channels on a grid, (channel, *grid)");
    std::vector<int64_t> shape = shape_of(channels);
    shape.erase(shape.begin());
    return shape;
}

inline const uint8_t* mask_data(const std::optional<MaskArray>& mask) {
    return mask ? reinterpret_cast<const uint8_t*>(mask->data()) : nullptr;
}

// The start of each channel.
inline std::vector<const float*> channel_pointers(const FloatArray& channels, int64_t grid_size) {
    std::vector<const float*> pointers;
    for (size_t m = 0; m < channels.shape(0); ++m)
        pointers.push_back(channels.data() + static_cast<int64_t>(m) * grid_size);
    return pointers;
}

// Raises an error unless the bandwidths of a kernel fit an image.
void require_bandwidths(const std::vector<double>& position, const std::vector<double>& intensity,
                        size_t num_axes, size_t num_modalities);

// Raises an error unless the mask, the spacing and the kernels' settings fit the image.
void require_kernels(const FloatArray& image, const std::optional<MaskArray>& mask,
                     const std::vector<double>& spacing, const KernelSetSpec& spec);

// Raises an error unless the values of a model fit its number of labels, and the number of kernels.
void require_model(const MeanFieldOptions& model, size_t num_kernels);

nanobind::dict as_dict(const MeanFieldOutcome& outcome);

// For ThreadPool::poll: Ctrl-C takes effect while the engine works, not only when it returns.
void check_signals();

// Tells Python of each step as progress(stage, step, num_steps), and notices Ctrl-C; an exception
// of the callback comes out of the engine.
struct Reporter {
    const nanobind::object& progress;
    const char* stage;

    void operator()(int step, int num_steps) const;
};

// Calls body(pool), without Python's lock.
template <bool kSubnormalsAreZeros = false, class Body>
auto run_pool(int threads, Body&& body) {
    nanobind::gil_scoped_release release;
    ThreadPool pool(threads, check_signals, kSubnormalsAreZeros);
    return body(pool);
}

// The pool has no workers between calls.
struct Rest {
    ThreadPool& pool;
    ~Rest() { pool.rest(); }
};

// Lets an object that is kept between calls serve one at a time. Calls of other threads wait; one
// of the thread at work comes from its progress callback and would wait for itself, so it throws.
// To be locked without Python's lock, which the call at work may need.
class OneCall {
   public:
    void lock() {
        require(thread_.load() != std::this_thread::get_id(),
                "these kernels are at work: a progress callback must not use the kernels of the "
                "run that called it; build others for it");
        mutex_.lock();
        thread_.store(std::this_thread::get_id());
    }

    void unlock() {
        thread_.store(std::thread::id());
        mutex_.unlock();
    }

   private:
    std::mutex mutex_;
    std::atomic<std::thread::id> thread_{};  // the one at work
};

// Held while an object that is kept between calls works, one call at a time.
struct EngineCall {
    EngineCall(OneCall& mutex, ThreadPool& pool) : lock(mutex), rest{pool} {}

    nanobind::gil_scoped_release release;
    const std::lock_guard<OneCall> lock;
    const Rest rest;
    const BlockCache cache;
    Workspace workspace;
};

// The kernels that an object of the class Kernels has built, for runs on tiles. The set and the
// pool are used while `one_call` is locked; the set has no kernels after their last run.
struct BuiltKernels {
    OneCall& one_call;
    KernelSet& set;
    ThreadPool& pool;
    const std::vector<int64_t>& grid;
};

// The error of a call after the last run.
constexpr const char* kSpent = "these kernels have had their last run; build them anew";

BuiltKernels kernels_in(const nanobind::handle& kernels);

void define_kernels(nanobind::module_& m);
void define_points(nanobind::module_& m);
void define_tiles(nanobind::module_& m);

// Read a field of a model from a value of Python; false if it is of another type. None is an empty
// list.
template <class T>
bool read_field(const nanobind::handle& value, T& field) {
    return nanobind::try_cast(value, field);
}

inline bool read_field(const nanobind::handle& value, std::vector<float>& field) {
    FloatArray array;
    if (value.is_none()) return true;
    if (!nanobind::try_cast(value, array)) return false;
    field.assign(array.data(), array.data() + array.size());
    return true;
}

inline bool read_field(const nanobind::handle& value, std::vector<std::vector<float>>& field) {
    FloatArray array;
    if (!nanobind::try_cast(value, array) || array.ndim() != 2) return false;
    const size_t size = array.shape(1);
    for (size_t row = 0; row < array.shape(0); ++row)
        field.emplace_back(array.data() + row * size, array.data() + (row + 1) * size);
    return true;
}
}  // namespace crf

namespace nanobind::detail {
// A model in Python is any object with the fields that `read_model` asks for, by name.
template <class Model>
struct ModelCaster {
    NB_TYPE_CASTER(Model, const_name("object"))

    bool from_python(handle model, uint32_t, cleanup_list*) noexcept {
        bool fits = true;
        value.read_model([&](const char* name, auto& field) {
            const object own = getattr(model, name, object());
            fits = fits && own.is_valid() && crf::read_field(own, field);
        });
        return fits;
    }
};

template <>
struct type_caster<crf::MeanFieldOptions> : ModelCaster<crf::MeanFieldOptions> {};
template <>
struct type_caster<crf::KernelSpec> : ModelCaster<crf::KernelSpec> {};
template <>
struct type_caster<crf::KernelSetSpec> : ModelCaster<crf::KernelSetSpec> {};
}  // namespace nanobind::detail
