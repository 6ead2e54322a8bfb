#include "cpu/tiles.h"

#include "cpu/tile_set.h"

namespace crf {
namespace {
constexpr float kNothing = -std::numeric_limits<float>::infinity();

// e^-17 is lost when it is added to 1 in single precision.
constexpr float kNegligible = -17.0f;

float largest_lane(vfloat v) {
    float largest = v[0];
    for (int lane = 1; lane < kLanes; ++lane) largest = std::max(largest, v[lane]);
    return largest;
}

inline bool any_lane(vint condition) { return !is_zero_vector((vfloat)condition); }

// log(e^a + e^b), where b may be minus infinity.
[[gnu::always_inline]] inline vfloat log_add(vfloat a, vfloat b) {
    const vfloat high = vmax(a, b), low = vmin(a, b);
    return high + log_positive(1.0f + exp_nonpositive(vmax(low - high, splat_lanes(-80.0f))));
}

// Whether there is a byte for each lane, and all are this one.
template <class Byte>
bool all_lanes(const Byte* bytes, int64_t count, Byte byte) {
    Byte expected[kLanes];
    std::fill_n(expected, kLanes, byte);
    return count >= kLanes && std::memcmp(bytes, expected, kLanes) == 0;
}

// Lanes outside the mask, unless it is nullptr, and lanes from `count` on become kNothing.
[[gnu::always_inline]] inline vfloat inside_mask(vfloat margin, const uint8_t* mask,
                                                 int64_t count) {
    if (count >= kLanes && (!mask || all_lanes(mask, count, uint8_t{true}))) return margin;
    float lanes[kLanes];
    store(lanes, margin);
    for (int lane = 0; lane < kLanes; ++lane)
        if (lane >= count || (mask && !mask[lane])) lanes[lane] = kNothing;
    return load(lanes);
}

// Place of the row of a tile in its source.
template <class T>
const T* source_row(const Tiling& tiling, const TileSource<T>& source, int64_t item,
                    const TileRow& row) {
    return source.is_whole_grid ? source.channel.at(row.z, row.y) + row.x
                                : source.channel.values + item * tiling.tile_voxels() + row.place;
}
}  // namespace

template <class T>
void survey_channel(const Tiling& tiling, const Channel<T>& channel, int64_t first_plane,
                    int64_t num_planes, int label, const Decoding& decoding, const uint8_t* mask,
                    const Survey& survey, float* tile_margin, ThreadPool& pool) {
    const int64_t width = tiling.shape[2], first_row = first_plane / tiling.tile[0];
    const int64_t last_row = (first_plane + num_planes - 1) / tiling.tile[0];
    pool.run((last_row - first_row + 1) * tiling.count[1], [&](int64_t item, int) {
        const int64_t tile_z = first_row + item / tiling.count[1], tile_y = item % tiling.count[1];
        // The largest margin of each column of the tiles' rows, padded to whole vectors.
        std::vector<float> column((width + kLanes - 1) / kLanes * kLanes, kNothing);
        const int64_t z_end = std::min(tiling.end(0, tile_z), first_plane + num_planes);
        for (int64_t z = std::max(tiling.begin(0, tile_z), first_plane); z < z_end; ++z)
            for (int64_t y = tiling.begin(1, tile_y); y < tiling.end(1, tile_y); ++y) {
                const T* row = channel.at(z - first_plane, y);
                const int64_t at = (z * tiling.shape[1] + y) * width;
                for (int64_t x = 0; x < width; x += kLanes) {
                    const int64_t left = width - x, n = at + x;
                    const int64_t lanes = std::min<int64_t>(left, kLanes);
                    const vfloat logit = decoding(load_some(row + x, left));
                    const vfloat biased = logit + survey.bias;
                    const vfloat a = biased * survey.inverse_temperature;
                    if (survey.best_biased)
                        store_some(survey.best_biased + n,
                                   label == 0
                                       ? biased
                                       : vmax(biased, load_some(survey.best_biased + n, left)),
                                   left);
                    vfloat sum;
                    if (label == 0) {
                        sum = a;
                        store_some(survey.log_sum + n, a, left);
                        store_some(survey.best + n, logit, left);
                        std::fill(survey.label + n, survey.label + n + lanes, uint16_t{0});
                        std::fill(survey.is_equal + n, survey.is_equal + n + lanes, uint8_t{1});
                    } else {
                        sum = load_some(survey.log_sum + n, left);
                        if (any_lane(a - sum > kNegligible)) {
                            sum = log_add(a, sum);
                            store_some(survey.log_sum + n, sum, left);
                        }
                        const vfloat best = load_some(survey.best + n, left);
                        const vint more = logit > best;
                        if (any_lane(more)) {
                            store_some(survey.best + n, vmax(logit, best), left);
                            for (int64_t i = 0; i < lanes; ++i)
                                if (more[i]) survey.label[n + i] = static_cast<uint16_t>(label);
                        }
                        if (!all_lanes(survey.is_equal + n, left, uint8_t{0})) {
                            const vint differs = logit != best;
                            for (int64_t i = 0; i < lanes; ++i)
                                if (differs[i]) survey.is_equal[n + i] = 0;
                        }
                    }
                    vfloat margin = a - sum;
                    if (mask) margin = inside_mask(margin, mask + n, lanes);
                    store(column.data() + x, vmax(load(column.data() + x), margin));
                }
            }
        for (int64_t tile_x = 0; tile_x < tiling.count[2]; ++tile_x) {
            float& margin =
                tile_margin[(tile_z * tiling.count[1] + tile_y) * tiling.count[2] + tile_x];
            margin = std::max(margin, *std::max_element(column.begin() + tiling.begin(2, tile_x),
                                                        column.begin() + tiling.end(2, tile_x)));
        }
    });
}

template <class T>
void tile_margins(const Tiling& tiling, const TileSource<T>& source, const Decoding& decoding,
                  const uint8_t* mask, const Survey& survey, const float* lowest_sum,
                  float threshold, float* margin, ThreadPool& pool) {
    const auto scaled = [&](vfloat stored) {
        return (decoding(stored) + survey.bias) * survey.inverse_temperature;
    };
    pool.run(source.num_tiles, [&](int64_t item, int) {
        // The largest of value(row, values, begin of the vector in the row, number of its voxels).
        const auto largest = [&](auto&& value) {
            vfloat most = splat_lanes(kNothing);
            tiling.for_rows(source.tiles[item], [&](const TileRow& row) {
                const T* const values = source_row(tiling, source, item, row);
                for (int64_t i = 0; i < row.length; i += kLanes)
                    most = vmax(
                        most, value(row, load_some(values + i, row.length - i), i, row.length - i));
            });
            return largest_lane(most);
        };
        // The rows of the sums lie far apart in memory, and those of a whole channel: other tiles
        // are told from what lies together.
        margin[item] = std::numeric_limits<float>::infinity();
        if (!source.is_whole_grid) {
            const float most = largest([](const TileRow&, vfloat stored, int64_t, int64_t left) {
                return inside_mask(stored, nullptr, left);
            });
            margin[item] = scaled(splat_lanes(most))[0] - lowest_sum[source.tiles[item]];
        }
        if (margin[item] > threshold)
            margin[item] = largest([&](const TileRow& row, vfloat stored, int64_t i, int64_t left) {
                const vfloat m = scaled(stored) - load_some(survey.log_sum + row.grid + i, left);
                return inside_mask(m, mask ? mask + row.grid + i : nullptr, left);
            });
    });
}

template <class T>
void gather_tiles(const Tiling& tiling, const T* values, const int64_t* tiles, int64_t num_tiles,
                  T* out, ThreadPool& pool) {
    pool.run(num_tiles, [&](int64_t item, int) {
        T* tile = out + item * tiling.tile_voxels();
        std::fill(tile, tile + tiling.tile_voxels(), T{});
        tiling.for_rows(tiles[item], [&](const TileRow& row) {
            std::copy_n(values + row.grid, row.length, tile + row.place);
        });
    });
}

template <class T>
void fill_entries(const Tiling& tiling, const TileSource<T>& source, const Decoding& decoding,
                  const int64_t* entry, float* out, ThreadPool& pool) {
    pool.run(source.num_tiles, [&](int64_t item, int) {
        float* const to = out + entry[item] * tiling.tile_voxels();
        std::fill(to, to + tiling.tile_voxels(), 0.0f);
        tiling.for_rows(source.tiles[item], [&](const TileRow& row) {
            const T* const values = source_row(tiling, source, item, row);
            for (int64_t i = 0; i < row.length; i += kLanes)
                store_some(to + row.place + i, decoding(load_some(values + i, row.length - i)),
                           row.length - i);
        });
    });
}

template void survey_channel(const Tiling&, const Channel<float>&, int64_t, int64_t, int,
                             const Decoding&, const uint8_t*, const Survey&, float*, ThreadPool&);
template void survey_channel(const Tiling&, const Channel<Half>&, int64_t, int64_t, int,
                             const Decoding&, const uint8_t*, const Survey&, float*, ThreadPool&);
template void tile_margins(const Tiling&, const TileSource<float>&, const Decoding&, const uint8_t*,
                           const Survey&, const float*, float, float*, ThreadPool&);
template void tile_margins(const Tiling&, const TileSource<Half>&, const Decoding&, const uint8_t*,
                           const Survey&, const float*, float, float*, ThreadPool&);
template void gather_tiles(const Tiling&, const float*, const int64_t*, int64_t, float*,
                           ThreadPool&);
template void gather_tiles(const Tiling&, const Half*, const int64_t*, int64_t, Half*, ThreadPool&);
template void fill_entries(const Tiling&, const TileSource<float>&, const Decoding&, const int64_t*,
                           float*, ThreadPool&);
template void fill_entries(const Tiling&, const TileSource<Half>&, const Decoding&, const int64_t*,
                           float*, ThreadPool&);

namespace {
// The voxels of a label in a tile.
template <class Label>
struct LabelBox {
    Label label;
    int64_t low[3], high[3];  // first and last voxel

    void add(int64_t z, int64_t y, int64_t x, int64_t last_x) {
        const int64_t from[3] = {z, y, x}, to[3] = {z, y, last_x};
        for (int a = 0; a < 3; ++a) {
            low[a] = std::min(low[a], from[a]);
            high[a] = std::max(high[a], to[a]);
        }
    }
};

// A tile and the voxels within `halo` of it, as one array; rows along the last axis.
struct Neighborhood {
    int64_t halo[3], shape[3], size;  // shape of the array, and its number of voxels
    int64_t own_row(int64_t z, int64_t y) const {
        return ((z + halo[0]) * shape[1] + y + halo[1]) * shape[2] + halo[2];
    }

    Neighborhood(const Tiling& tiling, const int64_t (&reach)[3]) : size(1) {
        for (int a = 0; a < 3; ++a) {
            halo[a] = reach[a];
            shape[a] = tiling.tile[a] + 2 * reach[a];
            size *= shape[a];
        }
    }
};

// Places of the label in a tile's neighborhood, changed axis by axis; 0 or 1.
struct Occurrence {
    std::vector<uint8_t> here, along_z, along_y, near;
};

// to[i] = from[i] | from[i + stride] | ... of `count` items, for i < length.
void gather_any(const uint8_t* from, int64_t stride, int64_t count, int64_t length, uint8_t* to) {
    std::copy(from, from + length, to);
    for (int64_t k = 1; k < count; ++k) {
        const uint8_t* other = from + k * stride;
        for (int64_t i = 0; i < length; ++i) to[i] |= other[i];
    }
}

// Writes to `near` (voxel of the tile) whether `here` (voxel of the neighborhood) is 1 anywhere
// within reach.
void widen(const Tiling& tiling, const Neighborhood& around, Occurrence& found) {
    const int64_t rows = around.shape[1], width = around.shape[2], plane = rows * width;
    const int64_t depth = tiling.tile[0], height = tiling.tile[1], length = tiling.tile[2];
    found.along_z.resize(depth * plane);
    found.along_y.resize(depth * height * width);
    found.near.resize(depth * height * length);
    for (int64_t z = 0; z < depth; ++z)
        gather_any(found.here.data() + z * plane, plane, 2 * around.halo[0] + 1, plane,
                   found.along_z.data() + z * plane);
    for (int64_t z = 0; z < depth; ++z)
        gather_any(found.along_z.data() + z * plane, width, 2 * around.halo[1] + 1, height * width,
                   found.along_y.data() + z * height * width);
    for (int64_t row = 0; row < depth * height; ++row)
        gather_any(found.along_y.data() + row * width, 1, 2 * around.halo[2] + 1, length,
                   found.near.data() + row * length);
}
}  // namespace

template <class Label>
void mark_tiles_near_labels(const Tiling& tiling, const Label* label_map, const int64_t (&reach)[3],
                            int64_t num_labels, uint8_t* near, ThreadPool& pool) {
    const int64_t num_tiles = tiling.num_tiles();
    pool.run(num_tiles, [&](int64_t tile, int) {
        std::vector<LabelBox<Label>> boxes;
        tiling.for_rows(tile, [&](const TileRow& row) {
            const Label* const labels = label_map + row.grid;
            for (int64_t i = 0; i < row.length;) {
                const Label label = labels[i];
                const int64_t first = row.x + i;
                while (i < row.length && labels[i] == label) ++i;
                auto box = std::find_if(boxes.begin(), boxes.end(),
                                        [&](const auto& other) { return other.label == label; });
                if (box == boxes.end())
                    box = boxes.insert(box, {label, {row.z, row.y, first}, {row.z, row.y, first}});
                box->add(row.z, row.y, first, row.x + i - 1);
            }
        });
        for (const LabelBox<Label>& box : boxes) {
            if (box.label >= num_labels)
                throw InputError("a label map holds a label that has no channel");
            int64_t low[3], high[3];
            for (int a = 0; a < 3; ++a) {
                low[a] = std::max<int64_t>(0, box.low[a] - reach[a]) / tiling.tile[a];
                high[a] = std::min(tiling.shape[a] - 1, box.high[a] + reach[a]) / tiling.tile[a];
            }
            for (int64_t z = low[0]; z <= high[0]; ++z)
                for (int64_t y = low[1]; y <= high[1]; ++y)
                    for (int64_t x = low[2]; x <= high[2];
                         ++x)  // other threads may set the same flag
                        __atomic_store_n(near + box.label * num_tiles +
                                             (z * tiling.count[1] + y) * tiling.count[2] + x,
                                         uint8_t{1}, __ATOMIC_RELAXED);
        }
    });
}

template <class Label>
void fill_label_entries(const Tiling& tiling, const Label* label_map, int label,
                        const int64_t (&reach)[3], const LabelLogits& logits, const int64_t* tiles,
                        int64_t num_tiles, const int64_t* entry, float* out, ThreadPool& pool) {
    const Neighborhood around(tiling, reach);
    std::vector<Occurrence> scratch(pool.num_threads());
    pool.run(num_tiles, [&](int64_t item, int thread) {
        Occurrence& found = scratch[thread];
        int64_t at[3], corner[3], begin[3],
            end[3];  // corner: of the neighborhood; begin, end: what lies in the label map
        tiling.place(tiles[item], at);
        for (int a = 0; a < 3; ++a) {
            corner[a] = tiling.begin(a, at[a]) - reach[a];
            begin[a] = std::max<int64_t>(0, corner[a]);
            end[a] = std::min(tiling.shape[a], corner[a] + around.shape[a]);
        }
        found.here.assign(around.size, 0);
        for (int64_t z = begin[0]; z < end[0]; ++z)
            for (int64_t y = begin[1]; y < end[1]; ++y) {
                const Label* row =
                    label_map + (z * tiling.shape[1] + y) * tiling.shape[2] + begin[2];
                uint8_t* to =
                    found.here.data() +
                    ((z - corner[0]) * around.shape[1] + y - corner[1]) * around.shape[2] +
                    begin[2] - corner[2];
                for (int64_t i = 0; i < end[2] - begin[2]; ++i) to[i] = row[i] == label;
            }
        widen(tiling, around, found);
        float* const tile = out + entry[item] * tiling.tile_voxels();
        std::fill(tile, tile + tiling.tile_voxels(), 0.0f);
        tiling.for_rows(tiles[item], [&](const TileRow& row) {
            const uint8_t* const here =
                found.here.data() +
                around.own_row(row.number / tiling.tile[1], row.number % tiling.tile[1]);
            const uint8_t* const near = found.near.data() + row.place;
            for (int64_t i = 0; i < row.length; ++i)
                tile[row.place + i] = here[i] ? logits.own : near[i] ? logits.near : logits.absent;
        });
    });
}

template void mark_tiles_near_labels(const Tiling&, const uint8_t*, const int64_t (&)[3], int64_t,
                                     uint8_t*, ThreadPool&);
template void mark_tiles_near_labels(const Tiling&, const uint16_t*, const int64_t (&)[3], int64_t,
                                     uint8_t*, ThreadPool&);
template void fill_label_entries(const Tiling&, const uint8_t*, int, const int64_t (&)[3],
                                 const LabelLogits&, const int64_t*, int64_t, const int64_t*,
                                 float*, ThreadPool&);
template void fill_label_entries(const Tiling&, const uint16_t*, int, const int64_t (&)[3],
                                 const LabelLogits&, const int64_t*, int64_t, const int64_t*,
                                 float*, ThreadPool&);
}  // namespace crf
