// Label sets per tile, for Python.
#include "cpu/module.h"
#include "cpu/tile_filter.h"

namespace nb = nanobind;
using namespace nb::literals;

template <>
struct nanobind::detail::dtype_traits<crf::Half> {
    static constexpr dlpack::dtype value{static_cast<uint8_t>(dlpack::dtype_code::Float), 16, 1};
    static constexpr auto name = const_name("float16");
};

namespace crf {
namespace {
// Of each kernel: of position along each axis, and of intensity.
using Bandwidths = std::vector<std::pair<std::vector<double>, std::vector<double>>>;
using Indices = Contiguous<const int64_t, nb::ndim<1>>;
using Labels = Contiguous<const int32_t>;
template <class T>
using StoredBox = nb::ndarray<const T, nb::device::cpu>;  // may be a box of a larger array

constexpr int64_t kMaxVoxels = int64_t{1} << 48, kMaxOfTile = 1 << 16;

// Voxels of a tile and those within reach of it: more are searched for as a whole grid.
constexpr int64_t kMaxNeighborhood = 1 << 24;

Tiling checked_tiling(const Extents& shape, const Extents& tile) {
    int64_t voxels = 1, of_tile = 1;
    for (int a = 0; a < 3; ++a) {
        require(shape[a] > 0 && shape[a] <= kMaxVoxels / voxels,
                "expected a grid with voxels, at most 2^48");
        require(tile[a] > 0 && tile[a] <= kMaxOfTile / of_tile,
                "expected tiles with voxels, at most 65536");
        voxels *= shape[a];
        of_tile *= tile[a];
    }
    require(tile[2] == kLanes, "expected tiles of 16 voxels along the last axis");
    return Tiling(shape, tile);
}

template <class... Arrays>
void require_grid(const Tiling& tiling, const Arrays&... arrays) {
    (require_size(arrays, tiling.num_voxels(),
                  "expected an array with one value per voxel of the grid"),
     ...);
}

// Places along the axis of an array.
template <class Places>
void require_places(const Places& places, int64_t first, int64_t end, const char* otherwise) {
    require(std::all_of(places.data(), places.data() + places.size(),
                        [&](int64_t place) { return place >= first && place < end; }),
            otherwise);
}

void require_tiles(const Indices& tiles, const Tiling& tiling) {
    require_places(tiles, 0, tiling.num_tiles(), "expected numbers of tiles of the grid");
}

// One entry of `out` per tile.
void require_entries(const Indices& tiles, const Indices& entries, const FloatOut& out,
                     const Tiling& tiling) {
    require_tiles(tiles, tiling);
    require_size(entries, static_cast<int64_t>(tiles.size()), "expected one entry per tile");
    require_places(entries, 0, static_cast<int64_t>(out.size()) / tiling.tile_voxels(),
                   "expected entries that there is room for");
}

void require_reach(const Extents& reach) {
    for (int64_t extent : reach)
        require(extent >= 0 && extent <= kMaxVoxels,
                "expected a reach of 0 voxels or more along each axis");
}

// Planes of a label map or channel: (plane, y, x).
template <class Array>
int64_t checked_planes(const Array& planes, const Tiling& tiling) {
    require(planes.ndim() == 3 && static_cast<int64_t>(planes.shape(1)) == tiling.shape[1] &&
                static_cast<int64_t>(planes.shape(2)) == tiling.shape[2],
            "expected planes of the grid");
    return static_cast<int64_t>(planes.shape(0));
}

// A tiling with the work on it. T: float or Half. Label: uint8_t or uint16_t.
class Tiles {
   public:
    Tiles(const Extents& shape, const Extents& tile, int threads)
        : tiling_(checked_tiling(shape, tile)), threads_(threads) {}

    template <class T>
    void survey(const StoredBox<T>& values, int64_t first_plane, int label, bool is_probability,
                float bias, float inverse_temperature, const std::optional<MaskArray>& mask,
                const FloatOut& log_sum, const FloatOut& best, const Contiguous<uint16_t>& labels,
                const Contiguous<bool>& is_equal, const std::optional<FloatOut>& best_biased,
                const FloatOut& tile_margin) const {
        const int64_t num_planes = checked_planes(values, tiling_);
        require(num_planes > 0 && first_plane >= 0 && first_plane <= tiling_.shape[0] - num_planes,
                "expected planes of the grid");
        require(label >= 0 && label < kMaxLabels, "expected a label from 0 to 65535");
        require_grid(tiling_, log_sum, best, labels, is_equal);
        if (best_biased) require_grid(tiling_, *best_biased);
        require_size(tile_margin, tiling_.num_tiles(), "expected room for one margin per tile");
        float* const biased = best_biased ? best_biased->data() : nullptr;
        // As bytes: reading a byte other than 0 and 1 as a bool is undefined.
        uint8_t* const equal = reinterpret_cast<uint8_t*>(is_equal.data());
        const Survey state{log_sum.data(), best.data(),         labels.data(), equal,
                           biased,         inverse_temperature, bias};
        const TileChannel<T> channel = channel_of<T>(values, true, nullptr, is_probability, mask);
        run_pool(threads_, [&](ThreadPool& pool) {
            channel.survey(first_plane, num_planes, label, state, tile_margin.data(), pool);
        });
    }

    template <class T>
    void margins(const StoredBox<T>& values, bool is_whole_grid, const Indices& tiles,
                 bool is_probability, float bias, float inverse_temperature,
                 const std::optional<MaskArray>& mask, const FloatOut& log_sum,
                 const FloatOut& lowest_sum, float threshold, const FloatOut& margin) const {
        const TileChannel<T> channel =
            channel_of<T>(values, is_whole_grid, &tiles, is_probability, mask);
        require_grid(tiling_, log_sum);
        require_size(lowest_sum, tiling_.num_tiles(), "expected one sum per tile");
        require_size(margin, channel.num_tiles, "expected room for one margin per tile");
        const Survey state{log_sum.data(),      nullptr, nullptr, nullptr, nullptr,
                           inverse_temperature, bias};
        run_pool(threads_, [&](ThreadPool& pool) {
            channel.margins(state, lowest_sum.data(), threshold, margin.data(), pool);
        });
    }

    template <class T>
    void gather(const StoredBox<T>& values, const Indices& tiles, const Contiguous<T>& out) const {
        const TileChannel<T> channel = channel_of<T>(values, true, &tiles, false, {});
        require_size(out, channel.num_tiles * tiling_.tile_voxels(),
                     "expected room for the voxels of the tiles");
        run_pool(threads_, [&](ThreadPool& pool) { channel.gather(out.data(), pool); });
    }

    template <class T>
    void fill_entries(const StoredBox<T>& values, bool is_whole_grid, const Indices& tiles,
                      bool is_probability, const Indices& entries, const FloatOut& out) const {
        const TileChannel<T> channel =
            channel_of<T>(values, is_whole_grid, &tiles, is_probability, {});
        require_entries(tiles, entries, out, tiling_);
        run_pool(threads_,
                 [&](ThreadPool& pool) { channel.fill_entries(entries.data(), out.data(), pool); });
    }

    template <class Label>
    void mark_near(const Contiguous<const Label>& label_map, const Extents& reach,
                   const Contiguous<uint8_t>& near) const {
        const TileLabels<Label> labels = labels_of(label_map, reach);
        const int64_t num_labels = static_cast<int64_t>(near.size()) / tiling_.num_tiles();
        require_size(near, num_labels * tiling_.num_tiles(),
                     "expected room for one mark per label and tile");
        run_pool(threads_,
                 [&](ThreadPool& pool) { labels.mark_near(num_labels, near.data(), pool); });
    }

    // logits: of the label at its own voxels, near them, and elsewhere.
    template <class Label>
    void fill_labels(const Contiguous<const Label>& label_map, int label, const Extents& reach,
                     const std::array<float, 3>& logits, const Indices& tiles,
                     const Indices& entries, const FloatOut& out) const {
        const TileLabels<Label> labels = labels_of(label_map, reach);
        int64_t size = 1;
        for (int a = 0; a < 3; ++a) {
            require(reach[a] <= (kMaxNeighborhood / size - tiling_.tile[a]) / 2,
                    "expected a shorter reach");
            size *= tiling_.tile[a] + 2 * reach[a];
        }
        require_entries(tiles, entries, out, tiling_);
        run_pool(threads_, [&](ThreadPool& pool) {
            labels.fill_entries(label, {logits[0], logits[1], logits[2]}, tiles.data(),
                                static_cast<int64_t>(tiles.size()), entries.data(), out.data(),
                                pool);
        });
    }

   private:
    // values: planes (plane, y, x), whose rows are contiguous, all of the grid unless no tiles are
    // given; or the voxels of the tiles, one tile after the other.
    template <class T>
    TileChannel<T> channel_of(const StoredBox<T>& values, bool is_of_grid, const Indices* tiles,
                              bool is_probability, const std::optional<MaskArray>& mask) const {
        if (mask) require_grid(tiling_, *mask);
        TileChannel<T> channel{tiling_,          values.data(),  0, 0, is_of_grid, nullptr, 0,
                               {is_probability}, mask_data(mask)};
        if (tiles) {
            require_tiles(*tiles, tiling_);
            channel.tiles = tiles->data();
            channel.num_tiles = static_cast<int64_t>(tiles->size());
            require_size(
                values,
                is_of_grid ? tiling_.num_voxels() : channel.num_tiles * tiling_.tile_voxels(),
                "expected the voxels of the grid, or those of the tiles");
        }
        require(values.ndim() >= 2, "expected a channel of three axes, or the voxels of tiles");
        const size_t last = values.ndim() - 1;
        require(values.shape(last) <= 1 || values.stride(last) == 1, "expected contiguous rows");
        if (is_of_grid) {
            checked_planes(values, tiling_);
            channel.row = values.stride(1);
            channel.plane = values.stride(0);
        } else {
            require(
                values.ndim() == 2 && (values.shape(0) <= 1 ||
                                       values.stride(0) == static_cast<int64_t>(values.shape(1))),
                "expected tiles one after the other");
        }
        return channel;
    }

    template <class Label>
    TileLabels<Label> labels_of(const Contiguous<const Label>& label_map,
                                const Extents& reach) const {
        require_grid(tiling_, label_map);
        require_reach(reach);
        return {tiling_, label_map.data(), reach};
    }

    Tiling tiling_;
    int threads_;
};

template <class Array>
auto copied(const Array& array) {
    using Number = std::remove_const_t<typename Array::Scalar>;
    return std::vector<Number>(array.data(), array.data() + array.size());
}

// The labels of the tiles of a grid, for runs of the mean field on them. Keeps the mask; of its
// numbers, which are places in other arrays, it has copies: they cannot change after the check.
class LabelSets {
   public:
    LabelSets(const Extents& shape, const Extents& tile, const std::optional<MaskArray>& mask,
              const Indices& active, const Indices& first_entry, const Labels& label,
              const Labels& settled, int threads)
        : mask_(mask),
          set_{checked_tiling(shape, tile), mask_data(mask), copied(active),
               copied(first_entry),         copied(label),   copied(settled),
               std::vector<int64_t>()},
          threads_(threads) {
        // Numbers of tiles and of entries ascend, and each tile has one label or more.
        const Tiling& tiling = set_.tiling;
        if (mask) require_grid(tiling, *mask);
        require_tiles(active, tiling);
        require_size(settled, tiling.num_tiles(),
                     "expected one settled label per tile, -1 where there is none");
        require_size(first_entry, set_.num_active() + 1,
                     "expected the first entry of each active tile, and the number of entries");
        require(set_.first_entry.front() == 0 && set_.first_entry.back() == set_.num_entries(),
                "expected one label per entry");
        for (int64_t i = 0; i < set_.num_active(); ++i)
            require(set_.first_entry[i] < set_.first_entry[i + 1] &&
                        (i == 0 || set_.active[i - 1] < set_.active[i]),
                    "expected ascending tiles, each with entries");
        require_places(label, 0, kMaxLabels, "expected labels from 0 to 65535");
        require_places(settled, -1, kMaxLabels, "expected settled labels from -1 to 65535");
        for (int32_t own : set_.label) largest_ = std::max(largest_, own);
        set_.index.assign(tiling.num_tiles(), -1);
        for (int64_t i = 0; i < set_.num_active(); ++i) set_.index[set_.active[i]] = i;
    }

    // kernels: an object of Kernels whose filters are used, with the channel of each entry and of
    // each settled tile; or None: direct sums. bandwidths: of each kernel, in voxels along each
    // axis, and of each modality, of which a spatial kernel has none. exceeds: (entry) set to 1
    // where a label was above `threshold`, after any step, within `reach` of a tile where it takes
    // no part although `may_matter` (label, tile) says that it might; None: no such check.
    nb::dict run(const nb::object& kernels, int num_channels, const Labels& of_entry,
                 const Labels& of_settled, const FloatArray& image, const Bandwidths& bandwidths,
                 const std::string& normalization, const MeanFieldOptions& model,
                 const Contiguous<const LaneMask>& open, int64_t num_voxels,
                 const nb::object& progress, const FloatArray& logits, const FloatOut& out,
                 const std::optional<MaskArray>& may_matter, const Extents& reach, double threshold,
                 const Contiguous<uint8_t>& exceeds, double unsent) const {
        const Tiling& tiling = set_.tiling;
        std::optional<BuiltKernels> built;
        if (!kernels.is_none()) built.emplace(kernels_in(kernels));
        require(!model.weight.empty() && model.num_labels > largest_,
                "expected a kernel, with one weight per label");
        if (!built) require_model(model, bandwidths.size());
        MeanFieldOptions options = model;
        require(image.ndim() > 0, "expected an image (modality, *grid)");
        require_size(image, static_cast<int64_t>(image.shape(0)) * tiling.num_voxels(),
                     "expected an image (modality, *grid)");
        for (const auto& [sigma, theta_intensity] : bandwidths)
            require_bandwidths(sigma, theta_intensity, 3, image.shape(0));
        if (built) {
            std::vector<int64_t> grid = built->grid;
            grid.insert(grid.begin(), grid.size() < 3 ? 3 - grid.size() : 0, 1);
            require(std::equal(grid.begin(), grid.end(), tiling.shape.begin(), tiling.shape.end()),
                    "expected kernels of the grid of the tiles");
            require_labels(num_channels);
            require_size(of_entry, set_.num_entries(), "expected one channel per entry");
            require_size(of_settled, tiling.num_tiles(),
                         "expected one channel per tile, -1 where it is not settled");
        }
        require_open(open);
        require_values(logits);
        require_values(out);
        require_reach(reach);
        if (may_matter) require_borders(*may_matter, exceeds);
        const Normalization kind = parse_normalization(normalization);
        options.has_symmetric_pairs = kind != Normalization::kAfter && options.last_is_implied() &&
                                      options.has_symmetric_penalties();
        MeanFieldOutcome outcome;
        const TileChannels channels{num_channels, of_entry.data(), of_settled.data()};
        run_pool<true>(threads_, [&](ThreadPool& pool) {
            const BlockCache cache;
            std::unique_lock<OneCall> lock;
            std::optional<Rest> rest;
            std::vector<std::unique_ptr<TileFilter>> filters;
            if (built) {
                KernelSet& set = built->set;
                lock = std::unique_lock(built->one_call);
                rest.emplace(built->pool);
                require(!set.kernels.empty(), kSpent);
                require_model(model, set.kernels.size());
                for (Kernel& kernel : set.kernels)
                    filters.push_back(make_channel_tile_filter(set_, channels, set.voxels,
                                                               open.data(), kernel, pool));
            }
            for (size_t k = 0; !built && k < bandwidths.size(); ++k) {
                const auto& [sigma, theta_intensity] = bandwidths[k];
                Reporter{progress, "build"}(static_cast<int>(k),
                                            static_cast<int>(bandwidths.size()));
                DirectKernel kernel{sigma, {}, theta_intensity};
                if (!theta_intensity.empty())
                    kernel.intensity = channel_pointers(image, tiling.num_voxels());
                filters.push_back(make_direct_tile_filter(set_, open.data(), kernel, kind, pool));
            }
            Borders borders;
            if (may_matter) borders = find_borders(set_, mask_data(may_matter), reach, pool);
            const TileRun run{set_,
                              options,
                              open.data(),
                              num_voxels,
                              static_cast<float>(unsent),
                              logits.data(),
                              out.data(),
                              borders,
                              static_cast<float>(threshold),
                              exceeds.data()};
            outcome = run_tile_mean_field(run, filters, pool, Reporter{progress, "mean field"});
        });
        return as_dict(outcome);
    }

    void open_voxels(const FloatArray& logits, float temperature, float settled, bool whole_rows,
                     const Contiguous<LaneMask>& open) const {
        require_values(logits);
        require_size(open, num_rows(),
                     "expected room for the voxels of one row of an active tile each");
        run_pool(threads_, [&](ThreadPool& pool) {
            find_open_voxels(set_, logits.data(), temperature, settled, whole_rows, open.data(),
                             pool);
        });
    }

    template <class Label>
    void decode(const FloatArray& values, const Contiguous<Label>& label_map) const {
        require_values(values);
        require_grid(set_.tiling, label_map);
        require(largest_ <= std::numeric_limits<Label>::max(),
                "expected a type that holds all labels");
        run_pool(threads_, [&](ThreadPool& pool) {
            decode_entries(set_, values.data(), label_map.data(), pool);
        });
    }

   private:
    int64_t num_rows() const { return set_.num_active() * set_.tiling.tile_rows(); }

    void require_values(const auto& values) const {
        require_size(values, set_.num_entries() * set_.tiling.tile_voxels(),
                     "expected one value per entry and voxel of a tile");
    }

    void require_borders(const MaskArray& may_matter, const Contiguous<uint8_t>& flags) const {
        require(static_cast<int64_t>(may_matter.size()) >= (largest_ + 1) * set_.tiling.num_tiles(),
                "expected one mark per label and tile");
        require_size(flags, set_.num_entries(), "expected room for one flag per entry");
    }

    // Voxels beyond the end of the grid are never open.
    void require_open(const Contiguous<const LaneMask>& open) const {
        require_size(open, num_rows(),
                     "expected the open voxels of one row of an active tile each");
        std::vector<LaneMask> in_grid(set_.tiling.tile_rows());
        for (int64_t item = 0; item < set_.num_active(); ++item) {
            std::fill(in_grid.begin(), in_grid.end(), LaneMask{0});
            set_.tiling.for_rows(set_.active[item], [&](const TileRow& row) {
                in_grid[row.number] = first_lanes_mask(row.length);
            });
            for (size_t row = 0; row < in_grid.size(); ++row)
                require((open.data()[item * in_grid.size() + row] & ~in_grid[row]) == 0,
                        "expected open voxels of the grid");
        }
    }

    const std::optional<MaskArray> mask_;
    TileSet set_;
    int threads_;
    int32_t largest_ = 0;  // of the labels
};
}  // namespace

void define_tiles(nb::module_& m) {
    nb::class_<LabelSets> sets(m, "LabelSets");
    sets.def(nb::init<const Extents&, const Extents&, const std::optional<MaskArray>&,
                      const Indices&, const Indices&, const Labels&, const Labels&, int>(),
             "shape"_a, "tile"_a, "mask"_a.none(), "active"_a, "first_entry"_a, "label"_a,
             "settled"_a, "threads"_a)
        .def("run", &LabelSets::run, "kernels"_a.none(), "num_channels"_a, "of_entry"_a,
             "of_settled"_a, "image"_a, "bandwidths"_a, "normalization"_a, "model"_a, "open"_a,
             "num_voxels"_a, "progress"_a.none(), "logits"_a, "out"_a.noconvert(),
             "may_matter"_a.none(), "reach"_a, "threshold"_a, "exceeds"_a.noconvert(), "unsent"_a)
        .def("open_voxels", &LabelSets::open_voxels, "logits"_a, "temperature"_a, "settled"_a,
             "whole_rows"_a, "open"_a.noconvert());
    nb::class_<Tiles> tiles(m, "Tiles");
    tiles.def(nb::init<const Extents&, const Extents&, int>(), "shape"_a, "tile"_a, "threads"_a);
    const auto define_stored = [&]<class T>(T) {
        tiles
            .def("survey", &Tiles::survey<T>, "values"_a.noconvert(), "first_plane"_a, "label"_a,
                 "is_probability"_a, "bias"_a, "inverse_temperature"_a, "mask"_a.none(),
                 "log_sum"_a.noconvert(), "best"_a.noconvert(), "labels"_a.noconvert(),
                 "is_equal"_a.noconvert(), "best_biased"_a.noconvert().none(),
                 "tile_margin"_a.noconvert())
            .def("margins", &Tiles::margins<T>, "values"_a.noconvert(), "is_whole_grid"_a,
                 "tiles"_a, "is_probability"_a, "bias"_a, "inverse_temperature"_a, "mask"_a.none(),
                 "log_sum"_a, "lowest_sum"_a, "threshold"_a, "margin"_a.noconvert())
            .def("gather", &Tiles::gather<T>, "values"_a.noconvert(), "tiles"_a,
                 "out"_a.noconvert())
            .def("fill_entries", &Tiles::fill_entries<T>, "values"_a.noconvert(), "is_whole_grid"_a,
                 "tiles"_a, "is_probability"_a, "entries"_a, "out"_a.noconvert());
    };
    define_stored(float{});
    define_stored(Half{});
    const auto define_labels = [&]<class Label>(Label) {
        sets.def("decode", &LabelSets::decode<Label>, "values"_a, "label_map"_a.noconvert());
        tiles
            .def("mark_near", &Tiles::mark_near<Label>, "label_map"_a.noconvert(), "reach"_a,
                 "near"_a.noconvert())
            .def("fill_labels", &Tiles::fill_labels<Label>, "label_map"_a.noconvert(), "label"_a,
                 "reach"_a, "logits"_a, "tiles"_a, "entries"_a, "out"_a.noconvert());
    };
    define_labels(uint8_t{});
    define_labels(uint16_t{});
}
}  // namespace crf
