#include "cpu/module_tiles.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>

#include "cpu/errors.h"
#include "cpu/module_arguments.h"
#include "cpu/module_kernels.h"
#include "cpu/tile_labels.h"
#include "cpu/tile_mean_field.h"
#include "cpu/tiles.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace crf {

namespace {

using Stored = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;  // float32 or float16; uint8 or uint16
using Writable = nb::ndarray<nb::c_contig, nb::device::cpu>;
using TileList = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

bool is_half(const Stored& values) {
    return values.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && values.dtype().bits == 16;
}

// Calls body with a pointer of the stored type.
template <class Body>
void with_stored(const Stored& values, Body&& body) {
    if (is_half(values)) return body(static_cast<const Half*>(values.data()));
    if (values.dtype() == nb::dtype<float>()) return body(static_cast<const float*>(values.data()));
    throw InputError("expected float32 or float16");
}

// Calls body with a pointer of the label map's type.
template <class Body>
void with_labels(const Stored& values, Body&& body) {
    if (values.dtype() == nb::dtype<uint8_t>()) return body(static_cast<const uint8_t*>(values.data()));
    if (values.dtype() == nb::dtype<uint16_t>()) return body(static_cast<const uint16_t*>(values.data()));
    throw InputError("expected uint8 or uint16");
}

// A tiling with what is done on it.
class Tiles {
   public:
    Tiles(const std::array<int64_t, 3>& shape, const std::array<int64_t, 3>& tile, int threads)
        : tiling_({shape[0], shape[1], shape[2]}, {tile[0], tile[1], tile[2]}), threads_(threads) {}

    void survey(const Stored& values, int64_t first_plane, int label, bool is_probability, float bias, float inverse_temperature,
                const std::optional<MaskArray>& mask, const Out<float>& log_sum, const Out<float>& best, const Out<uint16_t>& labels,
                const Out<bool>& is_equal, const std::optional<Out<float>>& best_biased, const Out<float>& tile_margin) const {
        float* const biased = best_biased ? best_biased->data() : nullptr;
        const Survey state{log_sum.data(), best.data(), labels.data(), is_equal.data(), biased, inverse_temperature, bias};
        const int64_t num_planes = static_cast<int64_t>(values.shape(0));
        with_stored(values, [&](const auto* data) {
            run([&](ThreadPool& pool) {
                survey_channel(tiling_, data, first_plane, num_planes, label, {is_probability}, mask_data(mask), state, tile_margin.data(),
                               pool);
            });
        });
    }

    void margins(const Stored& values, bool is_whole_grid, const TileList& tiles, bool is_probability, float bias,
                 float inverse_temperature, const std::optional<MaskArray>& mask, const Out<float>& log_sum,
                 const Out<float>& margin) const {
        const Survey state{log_sum.data(), nullptr, nullptr, nullptr, nullptr, inverse_temperature, bias};
        with_stored(values, [&](const auto* data) {
            run([&](ThreadPool& pool) {
                tile_margins(tiling_, source(data, is_whole_grid, tiles), {is_probability}, mask_data(mask), state, margin.data(), pool);
            });
        });
    }

    void gather(const Stored& values, const TileList& tiles, const Writable& out) const {
        run([&](ThreadPool& pool) {
            const int64_t count = static_cast<int64_t>(tiles.shape(0));
            if (is_half(values)) {
                gather_tiles(tiling_, static_cast<const uint16_t*>(values.data()), tiles.data(), count, static_cast<uint16_t*>(out.data()),
                             pool);
            } else {
                gather_tiles(tiling_, static_cast<const float*>(values.data()), tiles.data(), count, static_cast<float*>(out.data()), pool);
            }
        });
    }

    void fill_entries(const Stored& values, bool is_whole_grid, const TileList& tiles, bool is_probability, const TileList& entries,
                      const FloatOut& out) const {
        with_stored(values, [&](const auto* data) {
            run([&](ThreadPool& pool) {
                crf::fill_entries(tiling_, source(data, is_whole_grid, tiles), {is_probability}, entries.data(), out.data(), pool);
            });
        });
    }

    void mark_near(const Stored& label_map, const std::array<int64_t, 3>& reach, const Out<uint8_t>& near) const {
        with_labels(label_map, [&](const auto* data) {
            run([&](ThreadPool& pool) { mark_tiles_near_labels(tiling_, data, {reach[0], reach[1], reach[2]}, near.data(), pool); });
        });
    }

    // logits: of the label at its own voxels, near them, and elsewhere.
    void fill_labels(const Stored& label_map, int64_t first_plane, int label, const std::array<int64_t, 3>& reach,
                     const std::array<float, 3>& logits, const TileList& tiles, const TileList& entries, const FloatOut& out) const {
        with_labels(label_map, [&]<class Label>(const Label* data) {
            const LabelPlanes<Label> map{data, static_cast<int64_t>(label_map.shape(0)), first_plane};
            run([&](ThreadPool& pool) {
                fill_label_entries(tiling_, map, label, {reach[0], reach[1], reach[2]}, {logits[0], logits[1], logits[2]}, tiles.data(),
                                   static_cast<int64_t>(tiles.shape(0)), entries.data(), out.data(), pool);
            });
        });
    }

   private:
    template <class T>
    static TileSource<T> source(const T* values, bool is_whole_grid, const TileList& tiles) {
        return {values, is_whole_grid, tiles.data(), static_cast<int64_t>(tiles.shape(0))};
    }

    template <class Body>
    void run(Body&& body) const {
        nb::gil_scoped_release release;
        ThreadPool pool(threads_);
        pool.poll = check_signals;
        body(pool);
    }

    Tiling tiling_;
    int threads_;
};

// The labels of the tiles of a grid, for runs of the mean field on them. Keeps the arrays that it is made of.
class LabelSets {
   public:
    using Index = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
    using Labels = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;

    LabelSets(const std::array<int64_t, 3>& shape, const std::array<int64_t, 3>& tile, const std::optional<MaskArray>& mask,
              const Index& active, const Index& first_entry, const Labels& label, const Labels& settled, int threads)
        : mask_(mask),
          active_(active),
          first_entry_(first_entry),
          label_(label),
          settled_(settled),
          set_{Tiling({shape[0], shape[1], shape[2]}, {tile[0], tile[1], tile[2]}),
               mask_data(mask),
               static_cast<int64_t>(active.shape(0)),
               active.data(),
               first_entry.data(),
               label.data(),
               settled.data(),
               {}},
          threads_(threads) {
        set_.index.assign(set_.tiling.num_tiles(), -1);
        for (int64_t i = 0; i < set_.num_active; ++i) set_.index[set_.active[i]] = i;
    }

    // kernels: an object of Kernels32 whose filters are used, with the channel of each entry and of each settled tile; or None: direct
    // sums. bilateral: (standard deviation in voxels along each axis, theta_beta of each modality) per kernel. spatial: the same without
    // theta_beta, or empty. exceeds: (entry) set to 1 where a label was above `threshold`, after any step, within `reach` of a tile where
    // it takes no part although `may_matter` (label, tile) says that it might; None: no such check.
    nb::dict run(const nb::object& kernels32, int num_channels, const Labels& of_entry, const Labels& of_settled, const FloatArray& image,
                 const std::vector<std::pair<std::vector<double>, std::vector<double>>>& bilateral, const std::vector<double>& spatial,
                 const std::string& normalization, const std::vector<std::vector<float>>& weights, const std::vector<float>& compatibility,
                 bool is_potts, double temperature, double damping, int num_iterations, double tolerance,
                 const nb::ndarray<const LaneMask, nb::c_contig, nb::device::cpu>& open, int64_t num_voxels, const nb::object& progress,
                 const FloatArray& logits, const FloatOut& out, const std::optional<MaskArray>& may_matter,
                 const std::array<int64_t, 3>& reach, double threshold, const Out<uint8_t>& exceeds, double unsent, bool has_room) const {
        MeanFieldOptions<float> options;
        options.num_labels = static_cast<int>(weights.front().size());
        options.weight = weights;
        options.compatibility = compatibility;
        options.is_potts = is_potts;
        options.num_iterations = num_iterations;
        options.tolerance = tolerance;
        options.temperature = static_cast<float>(temperature);
        options.damping = static_cast<float>(damping);
        const Normalization kind = parse_normalization(normalization);
        // Where labels take part only where they occur (no `may_matter`), the energy lacks pairs of voxels in different tiles; with one
        // weight for all labels of a Potts model, steps do not raise it anyway (docs/reference/math.md).
        options.watch_energy = energy_is_lowered(kind) && (may_matter || !(options.is_potts && options.last_is_implied()));
        const std::function<void(int, int)> report_build = reporter(progress, "build"), report_step = reporter(progress, "mean field");
        MeanFieldOutcome outcome;
        KernelSet<float>* const built = kernels32.is_none() ? nullptr : &kernel_set_of(kernels32);
        const TileChannels channels{num_channels, of_entry.data(), of_settled.data()};
        run_pool([&](ThreadPool& pool) {
            const BlockCache cache;
            std::vector<DirectKernel> kernels;
            for (const auto& [sigma, theta_beta] : bilateral)
                kernels.push_back({sigma, channel_pointers(image.data(), image.shape(0), set_.tiling.num_voxels()), theta_beta});
            if (!spatial.empty()) kernels.push_back({spatial, {}, {}});
            std::vector<std::unique_ptr<TileFilter>> filters;
            if (built) {
                for (Kernel<float>& kernel : built->kernels)
                    filters.push_back(make_channel_tile_filter(set_, channels, built->voxels, open.data(), kernel, pool));
                kernels.clear();
            }
            for (const DirectKernel& kernel : kernels) {
                if (report_build) report_build(static_cast<int>(filters.size()), static_cast<int>(kernels.size()));
                filters.push_back(make_direct_tile_filter(set_, open.data(), kernel, kind, has_room, pool));
            }
            std::optional<Borders> borders;
            const int64_t extents[3] = {reach[0], reach[1], reach[2]};
            if (may_matter) borders.emplace(set_, may_matter->data(), extents, pool);
            const BorderCheck check{borders ? &*borders : nullptr, static_cast<float>(threshold), exceeds.data()};
            outcome = run_tile_mean_field(set_, filters, options, open.data(), num_voxels, static_cast<float>(unsent), logits.data(),
                                          out.data(), borders ? &check : nullptr, pool, report_step);
        });
        nb::dict result;
        result["num_iterations"] = outcome.num_iterations;
        result["converged"] = outcome.converged;
        result["energy"] = outcome.energy;
        return result;
    }

    // flags: (entry) set to 1 where a label's marginal may exceed `threshold` within `reach` of a tile where it takes no part although
    // `may_matter` (label, tile) says that it might. values: (entry, voxel of a tile), refined logits.
    void check(const FloatArray& values, const MaskArray& may_matter, const std::array<int64_t, 3>& reach, double threshold,
               const Out<uint8_t>& flags) const {
        run_pool([&](ThreadPool& pool) {
            check_entries(set_, values.data(), may_matter.data(), {reach[0], reach[1], reach[2]}, threshold, flags.data(), pool);
        });
    }

    void open_voxels(const FloatArray& logits, float temperature, float settled, bool whole_rows, const Out<LaneMask>& open) const {
        run_pool([&](ThreadPool& pool) { find_open_voxels(set_, logits.data(), temperature, settled, whole_rows, open.data(), pool); });
    }

    void decode(const FloatArray& values, const Writable& label_map) const {
        run_pool([&](ThreadPool& pool) {
            if (label_map.dtype() == nb::dtype<uint8_t>()) {
                decode_entries(set_, values.data(), static_cast<uint8_t*>(label_map.data()), pool);
            } else {
                decode_entries(set_, values.data(), static_cast<uint16_t*>(label_map.data()), pool);
            }
        });
    }

   private:
    template <class Body>
    void run_pool(Body&& body) const {
        nb::gil_scoped_release release;
        ThreadPool pool(threads_);
        pool.poll = check_signals;
        body(pool);
    }

    const std::optional<MaskArray> mask_;
    const Index active_, first_entry_;
    const Labels label_, settled_;
    TileSet set_;
    int threads_;
};

}  // namespace

void define_tiles(nb::module_& m) {
    nb::class_<LabelSets>(m, "LabelSets")
        .def(nb::init<const std::array<int64_t, 3>&, const std::array<int64_t, 3>&, const std::optional<MaskArray>&,
                      const LabelSets::Index&, const LabelSets::Index&, const LabelSets::Labels&, const LabelSets::Labels&, int>(),
             "shape"_a, "tile"_a, "mask"_a.none(), "active"_a, "first_entry"_a, "label"_a, "settled"_a, "threads"_a)
        .def("run", &LabelSets::run, "kernels"_a.none(), "num_channels"_a, "of_entry"_a, "of_settled"_a, "image"_a, "bilateral"_a,
             "spatial"_a, "normalization"_a, "weights"_a, "compatibility"_a, "is_potts"_a, "temperature"_a, "damping"_a, "num_iterations"_a,
             "tolerance"_a, "open"_a, "num_voxels"_a, "progress"_a.none(), "logits"_a, "out"_a, "may_matter"_a.none(), "reach"_a,
             "threshold"_a, "exceeds"_a, "unsent"_a, "has_room"_a)
        .def("check", &LabelSets::check, "values"_a, "may_matter"_a, "reach"_a, "threshold"_a, "flags"_a)
        .def("open_voxels", &LabelSets::open_voxels, "logits"_a, "temperature"_a, "settled"_a, "whole_rows"_a, "open"_a)
        .def("decode", &LabelSets::decode, "values"_a, "label_map"_a);
    nb::class_<Tiles>(m, "Tiles")
        .def(nb::init<const std::array<int64_t, 3>&, const std::array<int64_t, 3>&, int>(), "shape"_a, "tile"_a, "threads"_a)
        .def("survey", &Tiles::survey, "values"_a, "first_plane"_a, "label"_a, "is_probability"_a, "bias"_a, "inverse_temperature"_a,
             "mask"_a.none(), "log_sum"_a, "best"_a, "labels"_a, "is_equal"_a, "best_biased"_a.none(), "tile_margin"_a)
        .def("margins", &Tiles::margins, "values"_a, "is_whole_grid"_a, "tiles"_a, "is_probability"_a, "bias"_a, "inverse_temperature"_a,
             "mask"_a.none(), "log_sum"_a, "margin"_a)
        .def("gather", &Tiles::gather, "values"_a, "tiles"_a, "out"_a)
        .def("fill_entries", &Tiles::fill_entries, "values"_a, "is_whole_grid"_a, "tiles"_a, "is_probability"_a, "entries"_a, "out"_a)
        .def("mark_near", &Tiles::mark_near, "label_map"_a, "reach"_a, "near"_a)
        .def("fill_labels", &Tiles::fill_labels, "label_map"_a, "first_plane"_a, "label"_a, "reach"_a, "logits"_a, "tiles"_a, "entries"_a,
             "out"_a);
}

}  // namespace crf
