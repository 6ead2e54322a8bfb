#include "cpu/module_tiles.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "cpu/errors.h"
#include "cpu/module_arguments.h"
#include "cpu/module_kernels.h"
#include "cpu/module_tile_arguments.h"
#include "cpu/tile_labels.h"
#include "cpu/tile_mean_field.h"
#include "cpu/tiles.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace crf {

namespace {

template <class Array>
bool is_half(const Array& values) {
    return values.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && values.dtype().bits == 16;
}

// Calls body with a pointer of the stored type.
template <class Body>
void with_stored(const StoredBox& values, Body&& body) {
    if (is_half(values)) return body(static_cast<const Half*>(values.data()));
    if (values.dtype() == nb::dtype<float>()) return body(static_cast<const float*>(values.data()));
    throw InputError("expected float32 or float16");
}

// Calls body with the channel: (plane, y, x), whose rows are contiguous, or (tiles, voxels of a tile), all of it contiguous.
template <class Body>
void with_channel(const StoredBox& values, Body&& body) {
    require(values.ndim() >= 2, "expected a channel of three axes, or the voxels of tiles");
    const size_t last = values.ndim() - 1;
    require(values.shape(last) <= 1 || values.stride(last) == 1, "expected contiguous rows");
    const bool is_grid = values.ndim() == 3;
    require(is_grid || values.shape(0) <= 1 || values.stride(0) == static_cast<int64_t>(values.shape(1)),
            "expected tiles one after the other");
    with_stored(values, [&]<class T>(const T* data) { body(Channel<T>{data, values.stride(last - 1), is_grid ? values.stride(0) : 0}); });
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
        : tiling_(checked_tiling(shape, tile)), threads_(threads) {}

    void survey(const StoredBox& values, int64_t first_plane, int label, bool is_probability, float bias, float inverse_temperature,
                const std::optional<MaskArray>& mask, const Out<float>& log_sum, const Out<float>& best, const Out<uint16_t>& labels,
                const Out<bool>& is_equal, const std::optional<Out<float>>& best_biased, const Out<float>& tile_margin) const {
        const int64_t num_planes = checked_planes(values, tiling_);
        require(num_planes > 0 && first_plane >= 0 && first_plane <= tiling_.shape[0] - num_planes, "expected planes of the grid");
        require(label >= 0 && label < kMostLabels, "expected a label from 0 to 65535");
        for (const Out<float>* array : {&log_sum, &best}) require_grid(*array, tiling_);
        require_grid(labels, tiling_);
        require_grid(is_equal, tiling_);
        require_grid(mask, tiling_);
        if (best_biased) require_grid(*best_biased, tiling_);
        require_size(tile_margin, tiling_.num_tiles(), "expected room for one margin per tile");
        float* const biased = best_biased ? best_biased->data() : nullptr;
        const Survey state{log_sum.data(), best.data(), labels.data(), is_equal.data(), biased, inverse_temperature, bias};
        with_channel(values, [&](const auto& channel) {
            run_pool(threads_, [&](ThreadPool& pool) {
                survey_channel(tiling_, channel, first_plane, num_planes, label, {is_probability}, mask_data(mask), state,
                               tile_margin.data(), pool);
            });
        });
    }

    void margins(const StoredBox& values, bool is_whole_grid, const TileList& tiles, bool is_probability, float bias,
                 float inverse_temperature, const std::optional<MaskArray>& mask, const Out<float>& log_sum, const Out<float>& lowest_sum,
                 float threshold, const Out<float>& margin) const {
        require_source(values, is_whole_grid, tiles);
        require_grid(mask, tiling_);
        require_grid(log_sum, tiling_);
        require_size(lowest_sum, tiling_.num_tiles(), "expected one sum per tile");
        require_size(margin, static_cast<int64_t>(tiles.size()), "expected room for one margin per tile");
        const Survey state{log_sum.data(), nullptr, nullptr, nullptr, nullptr, inverse_temperature, bias};
        with_channel(values, [&](const auto& channel) {
            run_pool(threads_, [&](ThreadPool& pool) {
                tile_margins(tiling_, source(channel, is_whole_grid, tiles), {is_probability}, mask_data(mask), state, lowest_sum.data(),
                             threshold, margin.data(), pool);
            });
        });
    }

    void gather(const Stored& values, const TileList& tiles, const Writable& out) const {
        require_source(values, true, tiles);
        require_size(out, static_cast<int64_t>(tiles.size()) * tiling_.tile_voxels(), "expected room for the voxels of the tiles");
        require(out.dtype() == values.dtype() && (is_half(values) || values.dtype() == nb::dtype<float>()),
                "expected float32 or float16, and room for the same type");
        run_pool(threads_, [&](ThreadPool& pool) {
            const int64_t count = static_cast<int64_t>(tiles.shape(0));
            if (is_half(values)) {
                gather_tiles(tiling_, static_cast<const uint16_t*>(values.data()), tiles.data(), count, static_cast<uint16_t*>(out.data()),
                             pool);
            } else {
                gather_tiles(tiling_, static_cast<const float*>(values.data()), tiles.data(), count, static_cast<float*>(out.data()), pool);
            }
        });
    }

    void fill_entries(const StoredBox& values, bool is_whole_grid, const TileList& tiles, bool is_probability, const TileList& entries,
                      const FloatOut& out) const {
        require_source(values, is_whole_grid, tiles);
        require_entries(tiles, entries, out, tiling_);
        with_channel(values, [&](const auto& channel) {
            run_pool(threads_, [&](ThreadPool& pool) {
                crf::fill_entries(tiling_, source(channel, is_whole_grid, tiles), {is_probability}, entries.data(), out.data(), pool);
            });
        });
    }

    void mark_near(const Stored& label_map, const std::array<int64_t, 3>& reach, const Out<uint8_t>& near) const {
        require_grid(label_map, tiling_);
        require_reach(reach);
        const int64_t num_labels = static_cast<int64_t>(near.size()) / tiling_.num_tiles();
        require_size(near, num_labels * tiling_.num_tiles(), "expected room for one mark per label and tile");
        with_labels(label_map, [&](const auto* data) {
            run_pool(threads_, [&](ThreadPool& pool) {
                mark_tiles_near_labels(tiling_, data, {reach[0], reach[1], reach[2]}, num_labels, near.data(), pool);
            });
        });
    }

    // logits: of the label at its own voxels, near them, and elsewhere.
    void fill_labels(const Stored& label_map, int64_t first_plane, int label, const std::array<int64_t, 3>& reach,
                     const std::array<float, 3>& logits, const TileList& tiles, const TileList& entries, const FloatOut& out) const {
        const int64_t num_planes = checked_planes(label_map, tiling_);
        require(first_plane >= 0 && first_plane <= num_planes - tiling_.shape[0], "expected a label map with the planes of the grid");
        require_reach(reach);
        int64_t size = 1;
        for (int a = 0; a < 3; ++a) {
            require(reach[a] <= (kLargestNeighborhood / size - tiling_.tile[a]) / 2, "expected a shorter reach");
            size *= tiling_.tile[a] + 2 * reach[a];
        }
        require_entries(tiles, entries, out, tiling_);
        with_labels(label_map, [&]<class Label>(const Label* data) {
            const LabelPlanes<Label> map{data, num_planes, first_plane};
            run_pool(threads_, [&](ThreadPool& pool) {
                fill_label_entries(tiling_, map, label, {reach[0], reach[1], reach[2]}, {logits[0], logits[1], logits[2]}, tiles.data(),
                                   static_cast<int64_t>(tiles.shape(0)), entries.data(), out.data(), pool);
            });
        });
    }

   private:
    // The whole grid, or the voxels of the tiles one after the other.
    template <class Array>
    void require_source(const Array& values, bool is_whole_grid, const TileList& tiles) const {
        require_tiles(tiles, tiling_);
        const int64_t size = is_whole_grid ? tiling_.num_voxels() : static_cast<int64_t>(tiles.size()) * tiling_.tile_voxels();
        require_size(values, size, "expected the voxels of the grid, or those of the tiles");
        if (is_whole_grid) checked_planes(values, tiling_);
    }

    template <class T>
    static TileSource<T> source(const Channel<T>& channel, bool is_whole_grid, const TileList& tiles) {
        return {channel, is_whole_grid, tiles.data(), static_cast<int64_t>(tiles.shape(0))};
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
          set_{checked_tiling(shape, tile),
               mask_data(mask),
               static_cast<int64_t>(active.shape(0)),
               active.data(),
               first_entry.data(),
               label.data(),
               settled.data(),
               {}},
          threads_(threads) {
        require_sets();
        set_.index.assign(set_.tiling.num_tiles(), -1);
        for (int64_t i = 0; i < set_.num_active; ++i) set_.index[set_.active[i]] = i;
    }

    // kernels: an object of Kernels32 whose filters are used, with the channel of each entry and of each settled tile; or None: direct
    // sums. bilateral: (standard deviation in voxels along each axis, theta_beta of each modality) per kernel. spatial: the same without
    // theta_beta, or empty. exceeds: (entry) set to 1 where a label was above `threshold`, after any step, within `reach` of a tile where
    // it takes no part although `may_matter` (label, tile) says that it might; None: no such check.
    nb::dict run(const nb::object& kernels32, int num_channels, const Labels& of_entry, const Labels& of_settled, const FloatArray& image,
                 const BilateralArgument& bilateral, const std::vector<double>& spatial, const std::string& normalization,
                 const std::vector<std::vector<float>>& weights, const std::vector<float>& compatibility, bool is_potts, double temperature,
                 int num_iterations, double tolerance, const nb::ndarray<const LaneMask, nb::c_contig, nb::device::cpu>& open,
                 int64_t num_voxels, const nb::object& progress, const FloatArray& logits, const FloatOut& out,
                 const std::optional<MaskArray>& may_matter, const std::array<int64_t, 3>& reach, double threshold,
                 const Out<uint8_t>& exceeds, double unsent, bool has_room) const {
        KernelSet* const built = kernels32.is_none() ? nullptr : &kernel_set_of(kernels32);
        require_model(built ? built->kernels.size() : bilateral.size() + (spatial.empty() ? 0 : 1), weights, compatibility, is_potts);
        require_images(image, bilateral, spatial);
        if (built) require_channels(grid_of(kernels32), num_channels, of_entry, of_settled);
        require(num_voxels > 0, "expected voxels");
        require_open(open);
        require_values(logits);
        require_values(out);
        require_reach(reach);
        if (may_matter) require_borders(*may_matter, exceeds);
        MeanFieldOptions options = checked_options(static_cast<int>(weights.front().size()), weights, compatibility, is_potts, temperature,
                                                   num_iterations, tolerance);
        const Normalization kind = parse_normalization(normalization);
        options.has_symmetric_pairs = kind != Normalization::kAfter && options.last_is_implied() && options.has_symmetric_penalties();
        MeanFieldOutcome outcome;
        const TileChannels channels{num_channels, of_entry.data(), of_settled.data()};
        run_pool(threads_, [&](ThreadPool& pool) {
            pool.subnormals_are_zeros = true;
            const BlockCache cache;
            std::vector<DirectKernel> kernels;
            for (const auto& [sigma, theta_beta] : bilateral)
                kernels.push_back({sigma, channel_pointers(image.data(), image.shape(0), set_.tiling.num_voxels()), theta_beta});
            if (!spatial.empty()) kernels.push_back({spatial, {}, {}});
            std::vector<std::unique_ptr<TileFilter>> filters;
            if (built) {
                for (Kernel& kernel : built->kernels)
                    filters.push_back(make_channel_tile_filter(set_, channels, built->voxels, open.data(), kernel, pool));
                kernels.clear();
            }
            for (const DirectKernel& kernel : kernels) {
                Reporter{progress, "build"}(static_cast<int>(filters.size()), static_cast<int>(kernels.size()));
                filters.push_back(make_direct_tile_filter(set_, open.data(), kernel, kind, has_room, pool));
            }
            std::optional<Borders> borders;
            const int64_t extents[3] = {reach[0], reach[1], reach[2]};
            if (may_matter) borders.emplace(set_, may_matter->data(), extents, pool);
            const BorderCheck check{borders ? &*borders : nullptr, static_cast<float>(threshold), exceeds.data()};
            outcome = run_tile_mean_field(set_, filters, options, open.data(), num_voxels, static_cast<float>(unsent), logits.data(),
                                          out.data(), borders ? &check : nullptr, pool, Reporter{progress, "mean field"});
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
        require_values(values);
        require_borders(may_matter, flags);
        require_reach(reach);
        run_pool(threads_, [&](ThreadPool& pool) {
            check_entries(set_, values.data(), may_matter.data(), {reach[0], reach[1], reach[2]}, threshold, flags.data(), pool);
        });
    }

    void open_voxels(const FloatArray& logits, float temperature, float settled, bool whole_rows, const Out<LaneMask>& open) const {
        require_values(logits);
        require_size(open, num_rows(), "expected room for the voxels of one row of an active tile each");
        run_pool(threads_,
                 [&](ThreadPool& pool) { find_open_voxels(set_, logits.data(), temperature, settled, whole_rows, open.data(), pool); });
    }

    void decode(const FloatArray& values, const Writable& label_map) const {
        require_values(values);
        require_grid(label_map, set_.tiling);
        const bool is_short = label_map.dtype() == nb::dtype<uint8_t>();
        require((is_short && most_ < 256) || label_map.dtype() == nb::dtype<uint16_t>(), "expected uint8 or uint16, and all labels to fit");
        run_pool(threads_, [&](ThreadPool& pool) {
            if (is_short) {
                decode_entries(set_, values.data(), static_cast<uint8_t*>(label_map.data()), pool);
            } else {
                decode_entries(set_, values.data(), static_cast<uint16_t*>(label_map.data()), pool);
            }
        });
    }

   private:
    int64_t num_rows() const { return set_.num_active * (set_.tiling.tile_voxels() / kLanes); }

    // Numbers of tiles and of entries ascend, and each tile has one label or more. Notes the largest label.
    void require_sets() {
        const Tiling& tiling = set_.tiling;
        require_grid(mask_, tiling);
        require_tiles(active_, tiling);
        require_size(settled_, tiling.num_tiles(), "expected one settled label per tile, -1 where there is none");
        require_size(first_entry_, set_.num_active + 1, "expected the first entry of each active tile, and the number of entries");
        require(set_.first_entry[0] == 0 && set_.num_entries() == static_cast<int64_t>(label_.size()), "expected one label per entry");
        for (int64_t i = 0; i < set_.num_active; ++i)
            require(set_.first_entry[i] < set_.first_entry[i + 1] && (i == 0 || set_.active[i - 1] < set_.active[i]),
                    "expected ascending tiles, each with entries");
        for (int64_t e = 0; e < set_.num_entries(); ++e) {
            require(set_.label[e] >= 0 && set_.label[e] < kMostLabels, "expected labels from 0 to 65535");
            most_ = std::max(most_, set_.label[e]);
        }
        const int32_t* const settled = set_.settled;
        require(std::all_of(settled, settled + tiling.num_tiles(), [](int32_t label) { return label >= -1 && label < kMostLabels; }),
                "expected settled labels from -1 to 65535");
    }

    void require_values(const auto& values) const {
        require_size(values, set_.num_entries() * set_.tiling.tile_voxels(), "expected one value per entry and voxel of a tile");
    }

    void require_borders(const MaskArray& may_matter, const Out<uint8_t>& flags) const {
        require(static_cast<int64_t>(may_matter.size()) >= (most_ + 1) * set_.tiling.num_tiles(), "expected one mark per label and tile");
        require_size(flags, set_.num_entries(), "expected room for one flag per entry");
    }

    void require_model(size_t num_kernels, const std::vector<std::vector<float>>& weights, const std::vector<float>& compatibility,
                       bool is_potts) const {
        require(!weights.empty() && weights.size() == num_kernels, "expected one list of weights per kernel, and a kernel");
        const size_t num_labels = weights.front().size();
        require(num_labels > static_cast<size_t>(most_) &&
                    std::all_of(weights.begin(), weights.end(), [&](const auto& own) { return own.size() == num_labels; }),
                "expected one weight per label");
        require(fits_labels(compatibility, is_potts, num_labels), "expected one penalty per pair of labels, for Potts none");
    }

    void require_images(const FloatArray& image, const BilateralArgument& bilateral, const std::vector<double>& spatial) const {
        require(image.ndim() > 0, "expected an image (modality, *grid)");
        require_size(image, static_cast<int64_t>(image.shape(0)) * set_.tiling.num_voxels(), "expected an image (modality, *grid)");
        require_bandwidths(bilateral, spatial, {3, image.shape(0)});
    }

    void require_channels(std::vector<int64_t> grid, int num_channels, const Labels& of_entry, const Labels& of_settled) const {
        grid.insert(grid.begin(), grid.size() < 3 ? 3 - grid.size() : 0, 1);
        require(std::equal(grid.begin(), grid.end(), set_.tiling.shape, set_.tiling.shape + 3),
                "expected kernels of the grid of the tiles");
        require(num_channels >= 1 && num_channels <= kMostLabels, "expected a channel");
        require_size(of_entry, set_.num_entries(), "expected one channel per entry");
        require_size(of_settled, set_.tiling.num_tiles(), "expected one channel per tile, -1 where it is not settled");
    }

    // Voxels beyond the end of the grid are never open.
    void require_open(const nb::ndarray<const LaneMask, nb::c_contig, nb::device::cpu>& open) const {
        require_size(open, num_rows(), "expected the open voxels of one row of an active tile each");
        const TileSet whole{set_.tiling, nullptr, 0, nullptr, nullptr, nullptr, nullptr, {}};
        const int64_t rows = set_.tiling.tile_voxels() / kLanes;
        for (int64_t i = 0; i < num_rows(); ++i)
            require((open.data()[i] & ~lanes_inside(whole, set_.active[i / rows], i % rows)) == 0, "expected open voxels of the grid");
    }

    const std::optional<MaskArray> mask_;
    const Index active_, first_entry_;
    const Labels label_, settled_;
    TileSet set_;
    int threads_;
    int32_t most_ = 0;  // the largest label
};

}  // namespace

void define_tiles(nb::module_& m) {
    nb::class_<LabelSets>(m, "LabelSets")
        .def(nb::init<const std::array<int64_t, 3>&, const std::array<int64_t, 3>&, const std::optional<MaskArray>&,
                      const LabelSets::Index&, const LabelSets::Index&, const LabelSets::Labels&, const LabelSets::Labels&, int>(),
             "shape"_a, "tile"_a, "mask"_a.none(), "active"_a, "first_entry"_a, "label"_a, "settled"_a, "threads"_a)
        .def("run", &LabelSets::run, "kernels"_a.none(), "num_channels"_a, "of_entry"_a, "of_settled"_a, "image"_a, "bilateral"_a,
             "spatial"_a, "normalization"_a, "weights"_a, "compatibility"_a, "is_potts"_a, "temperature"_a, "num_iterations"_a,
             "tolerance"_a, "open"_a, "num_voxels"_a, "progress"_a.none(), "logits"_a, "out"_a.noconvert(), "may_matter"_a.none(),
             "reach"_a, "threshold"_a, "exceeds"_a.noconvert(), "unsent"_a, "has_room"_a)
        .def("check", &LabelSets::check, "values"_a, "may_matter"_a, "reach"_a, "threshold"_a, "flags"_a.noconvert())
        .def("open_voxels", &LabelSets::open_voxels, "logits"_a, "temperature"_a, "settled"_a, "whole_rows"_a, "open"_a.noconvert())
        .def("decode", &LabelSets::decode, "values"_a, "label_map"_a.noconvert());
    nb::class_<Tiles>(m, "Tiles")
        .def(nb::init<const std::array<int64_t, 3>&, const std::array<int64_t, 3>&, int>(), "shape"_a, "tile"_a, "threads"_a)
        .def("survey", &Tiles::survey, "values"_a, "first_plane"_a, "label"_a, "is_probability"_a, "bias"_a, "inverse_temperature"_a,
             "mask"_a.none(), "log_sum"_a.noconvert(), "best"_a.noconvert(), "labels"_a.noconvert(), "is_equal"_a.noconvert(),
             "best_biased"_a.noconvert().none(), "tile_margin"_a.noconvert())
        .def("margins", &Tiles::margins, "values"_a, "is_whole_grid"_a, "tiles"_a, "is_probability"_a, "bias"_a, "inverse_temperature"_a,
             "mask"_a.none(), "log_sum"_a, "lowest_sum"_a, "threshold"_a, "margin"_a.noconvert())
        .def("gather", &Tiles::gather, "values"_a, "tiles"_a, "out"_a.noconvert())
        .def("fill_entries", &Tiles::fill_entries, "values"_a, "is_whole_grid"_a, "tiles"_a, "is_probability"_a, "entries"_a,
             "out"_a.noconvert())
        .def("mark_near", &Tiles::mark_near, "label_map"_a, "reach"_a, "near"_a.noconvert())
        .def("fill_labels", &Tiles::fill_labels, "label_map"_a, "first_plane"_a, "label"_a, "reach"_a, "logits"_a, "tiles"_a, "entries"_a,
             "out"_a.noconvert());
}

}  // namespace crf
