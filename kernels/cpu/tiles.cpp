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

}  // namespace

template <class T>
void TileChannel<T>::survey(int64_t first_plane, int64_t num_planes, int label,
                            const Survey& survey, float* tile_margin, ThreadPool& pool) const {
    const int64_t width = tiling.shape[2], first_row = first_plane / tiling.tile[0];
    const int64_t last_row = (first_plane + num_planes - 1) / tiling.tile[0];
    pool.run((last_row - first_row + 1) * tiling.count[1], [&](int64_t item, int) {
        const int64_t tile_z = first_row + item / tiling.count[1], tile_y = item % tiling.count[1];
        // The largest margin of each column of the tiles' rows, padded to whole vectors.
        std::vector<float> column(whole_vectors(width), kNothing);
        const int64_t first_tile = (tile_z * tiling.count[1] + tile_y) * tiling.count[2];
        const Extents begin = tiling.begin(first_tile), end = tiling.end(first_tile);
        const int64_t z_end = std::min(end[0], first_plane + num_planes);
        for (int64_t z = std::max(begin[0], first_plane); z < z_end; ++z)
            for (int64_t y = begin[1]; y < end[1]; ++y) {
                const T* const from = values + (z - first_plane) * plane + y * row;
                const int64_t at = (z * tiling.shape[1] + y) * width;
                for (int64_t x = 0; x < width; x += kLanes) {
                    const int64_t left = width - x, n = at + x;
                    const int64_t lanes = std::min<int64_t>(left, kLanes);
                    const vfloat logit = decoding(load_some(from + x, left));
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
                    const vfloat margin = inside_mask(a - sum, mask ? mask + n : nullptr, lanes);
                    store(column.data() + x, vmax(load(column.data() + x), margin));
                }
            }
        for (int64_t tile_x = 0; tile_x < tiling.count[2]; ++tile_x) {
            const auto of_tile = column.begin() + tile_x * tiling.tile[2];
            float& margin = tile_margin[first_tile + tile_x];
            margin = std::max(margin, *std::max_element(of_tile, of_tile + tiling.tile[2]));
        }
    });
}

template <class T>
void TileChannel<T>::margins(const Survey& survey, const float* lowest_sum, float threshold,
                             float* margin, ThreadPool& pool) const {
    const auto scaled = [&](vfloat stored) {
        return (decoding(stored) + survey.bias) * survey.inverse_temperature;
    };
    pool.run(num_tiles, [&](int64_t item, int) {
        // The largest of value(row, values, begin of the vector in the row, number of its voxels).
        const auto largest = [&](auto&& value) {
            vfloat most = splat_lanes(kNothing);
            tiling.for_rows(tiles[item], [&](const TileRow& row) {
                const T* const own = at(item, row);
                for (int64_t i = 0; i < row.length; i += kLanes)
                    most = vmax(most,
                                value(row, load_some(own + i, row.length - i), i, row.length - i));
            });
            return largest_lane(most);
        };
        // The rows of the sums lie far apart in memory, and those of a whole channel: other tiles
        // are told from what lies together.
        margin[item] = std::numeric_limits<float>::infinity();
        if (!is_of_grid) {
            const float most = largest([](const TileRow&, vfloat stored, int64_t, int64_t left) {
                return inside_mask(stored, nullptr, left);
            });
            margin[item] = scaled(splat_lanes(most))[0] - lowest_sum[tiles[item]];
        }
        if (margin[item] > threshold)
            margin[item] = largest([&](const TileRow& row, vfloat stored, int64_t i, int64_t left) {
                const vfloat m = scaled(stored) - load_some(survey.log_sum + row.grid + i, left);
                return inside_mask(m, mask ? mask + row.grid + i : nullptr, left);
            });
    });
}

template <class T>
void TileChannel<T>::gather(T* out, ThreadPool& pool) const {
    pool.run(num_tiles, [&](int64_t item, int) {
        T* const to = out + item * tiling.tile_voxels();
        std::fill(to, to + tiling.tile_voxels(), T{});
        tiling.for_rows(tiles[item], [&](const TileRow& own) {
            std::copy_n(at(item, own), own.length, to + own.place);
        });
    });
}

template <class T>
void TileChannel<T>::fill_entries(const int64_t* entry, float* out, ThreadPool& pool) const {
    pool.run(num_tiles, [&](int64_t item, int) {
        float* const to = out + entry[item] * tiling.tile_voxels();
        std::fill(to, to + tiling.tile_voxels(), 0.0f);
        tiling.for_rows(tiles[item], [&](const TileRow& own) {
            const T* const from = at(item, own);
            for (int64_t i = 0; i < own.length; i += kLanes)
                store_some(to + own.place + i, decoding(load_some(from + i, own.length - i)),
                           own.length - i);
        });
    });
}

template struct TileChannel<float>;
template struct TileChannel<Half>;

namespace {
// The voxels of a label in a tile.
template <class Label>
struct LabelBox {
    Label label;
    Extents low, high;  // first and last voxel

    void add(const TileRow& row, int64_t first, int64_t last) {
        const Extents from = {row.z, row.y, row.x + first}, to = {row.z, row.y, row.x + last};
        for (int a = 0; a < 3; ++a) {
            low[a] = std::min(low[a], from[a]);
            high[a] = std::max(high[a], to[a]);
        }
    }
};

// to[i] = from[i] | from[i + stride] | ... of `count` items, for i < length.
void gather_any(const uint8_t* from, int64_t stride, int64_t count, int64_t length, uint8_t* to) {
    std::copy(from, from + length, to);
    for (int64_t k = 1; k < count; ++k) {
        const uint8_t* other = from + k * stride;
        for (int64_t i = 0; i < length; ++i) to[i] |= other[i];
    }
}
}  // namespace

template <class Label>
void TileLabels<Label>::mark_near(int64_t num_labels, uint8_t* near, ThreadPool& pool) const {
    const int64_t num_tiles = tiling.num_tiles();
    pool.run(num_tiles, [&](int64_t tile, int) {
        std::vector<LabelBox<Label>> boxes;
        tiling.for_rows(tile, [&](const TileRow& row) {
            const Label* const own = labels + row.grid;
            for (int64_t i = 0; i < row.length;) {
                const Label label = own[i];
                const int64_t first = i;
                while (i < row.length && own[i] == label) ++i;
                auto box = std::find_if(boxes.begin(), boxes.end(),
                                        [&](const auto& other) { return other.label == label; });
                if (box == boxes.end()) box = boxes.insert(box, {label, tiling.shape, Extents{}});
                box->add(row, first, i - 1);
            }
        });
        for (const LabelBox<Label>& box : boxes) {
            if (box.label >= num_labels)
                throw InputError("a label map holds a label that has no channel");
            Extents first, end;
            for (int a = 0; a < 3; ++a) {
                first[a] = box.low[a] - reach[a];
                end[a] = box.high[a] + reach[a] + 1;
            }
            tiling.for_tiles(first, end, [&](int64_t other) {  // Other threads may set it, too.
                __atomic_store_n(near + box.label * num_tiles + other, uint8_t{1},
                                 __ATOMIC_RELAXED);
            });
        }
    });
}

template <class Label>
void TileLabels<Label>::fill_entries(int label, const LabelLogits& logits, const int64_t* tiles,
                                     int64_t num_tiles, const int64_t* entry, float* out,
                                     ThreadPool& pool) const {
    typedef std::vector<uint8_t> Marks;
    std::vector<std::pair<Marks, Marks>> scratch(pool.num_threads());
    pool.run(num_tiles, [&](int64_t item, int thread) {
        // The tile and what lies within reach of it: where the label is, 0 or 1.
        auto& [marks, wider] = scratch[thread];
        Extents first = tiling.begin(tiles[item]), shape, begin, end;
        for (int a = 0; a < 3; ++a) {
            first[a] -= reach[a];
            shape[a] = tiling.tile[a] + 2 * reach[a];
            begin[a] = std::max<int64_t>(0, first[a]);
            end[a] = std::min(tiling.shape[a], first[a] + shape[a]);
        }
        int64_t outer = 1, inner = shape[0] * shape[1] * shape[2];
        marks.assign(inner, 0);
        for (int64_t z = begin[0]; z < end[0]; ++z)
            for (int64_t y = begin[1]; y < end[1]; ++y) {
                const Label* const from =
                    labels + (z * tiling.shape[1] + y) * tiling.shape[2] + begin[2];
                uint8_t* const to = marks.data() + begin[2] - first[2] +
                                    ((z - first[0]) * shape[1] + y - first[1]) * shape[2];
                for (int64_t i = 0; i < end[2] - begin[2]; ++i) to[i] = from[i] == label;
            }
        // Axis by axis, whether it is within reach of the voxels of the tile.
        for (int a = 0; a < 3; ++a) {
            inner /= shape[a];
            const int64_t size = tiling.tile[a] * inner;
            wider.resize(outer * size);
            for (int64_t o = 0; o < outer; ++o)
                gather_any(marks.data() + o * shape[a] * inner, inner, 2 * reach[a] + 1, size,
                           wider.data() + o * size);
            outer *= tiling.tile[a];
            marks.swap(wider);
        }
        float* const tile = out + entry[item] * tiling.tile_voxels();
        std::fill(tile, tile + tiling.tile_voxels(), 0.0f);
        tiling.for_rows(tiles[item], [&](const TileRow& row) {
            const Label* const own = labels + row.grid;
            const uint8_t* const near = marks.data() + row.place;
            for (int64_t i = 0; i < row.length; ++i)
                tile[row.place + i] = own[i] == label ? logits.own
                                      : near[i]       ? logits.near
                                                      : logits.absent;
        });
    });
}

template struct TileLabels<uint8_t>;
template struct TileLabels<uint16_t>;
}  // namespace crf
