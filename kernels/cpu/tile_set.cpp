#include "cpu/tile_set.h"

namespace crf {
int64_t TileSet::find_entry(int64_t active_tile, int32_t wanted) const {
    const int32_t* const begin = label + first_entry[active_tile];
    const int32_t* const end = label + first_entry[active_tile + 1];
    const int32_t* const found = std::lower_bound(begin, end, wanted);
    return found != end && *found == wanted ? found - label : -1;
}

namespace {
// Calls body(grid index, place among the tile's voxels, z, y, x) for the voxels of a tile inside
// the grid and the mask.
template <class Body>
void for_voxels(const TileSet& set, int64_t number, Body&& body) {
    set.tiling.for_rows(number, [&](const TileRow& row) {
        for (int64_t i = 0; i < row.length; ++i)
            if (set.is_inside(row.grid + i))
                body(row.grid + i, row.place + i, row.z, row.y, row.x + i);
    });
}

// A box of voxels.
struct Span {
    int64_t begin[3], end[3];
    bool holds(int64_t z, int64_t y, int64_t x) const {
        return z >= begin[0] && z < end[0] && y >= begin[1] && y < end[1] && x >= begin[2] &&
               x < end[2];
    }
};
}  // namespace

template <class Label>
void decode_entries(const TileSet& set, const float* values, Label* label_map, ThreadPool& pool) {
    const int64_t voxels = set.tiling.tile_voxels();
    pool.run(set.num_active, [&](int64_t item, int) {
        for_voxels(set, set.active[item],
                   [&](int64_t voxel, int64_t place, int64_t, int64_t, int64_t) {
                       int64_t best = set.first_entry[item];
                       for (int64_t e = best + 1; e < set.first_entry[item + 1]; ++e)
                           if (values[e * voxels + place] > values[best * voxels + place]) best = e;
                       label_map[voxel] = static_cast<Label>(set.label[best]);
                   });
    });
}

LaneMask lanes_inside(const TileSet& set, int64_t tile, int64_t row) {
    const Tiling& tiling = set.tiling;
    int64_t at[3];
    tiling.place(tile, at);
    const int64_t z = tiling.begin(0, at[0]) + row / tiling.tile[1];
    const int64_t y = tiling.begin(1, at[1]) + row % tiling.tile[1];
    if (z >= tiling.shape[0] || y >= tiling.shape[1]) return 0;
    const int64_t x = tiling.begin(2, at[2]);
    const int64_t length = tiling.end(2, at[2]) - x;
    const int64_t grid = (z * tiling.shape[1] + y) * tiling.shape[2] + x;
    if (!set.mask) return first_lanes_mask(length);
    uint32_t inside = 0;
    for (int64_t i = 0; i < length; ++i)
        inside |= static_cast<uint32_t>(set.mask[grid + i] != 0) << i;
    return static_cast<LaneMask>(inside);
}

void find_open_voxels(const TileSet& set, const float* logits, float temperature, float settled,
                      bool whole_rows, LaneMask* open, ThreadPool& pool) {
    const int64_t voxels = set.tiling.tile_voxels(), num_rows = voxels / kLanes;
    const float scale = 1 / temperature;
    pool.run(set.num_active, [&](int64_t item, int) {
        const int64_t first = set.first_entry[item], end = set.first_entry[item + 1];
        for (int64_t row = 0; row < num_rows; ++row) {
            const LaneMask inside = lanes_inside(set, set.active[item], row);
            open[item * num_rows + row] = 0;
            if (!inside) continue;
            const float* const of_row = logits + row * kLanes;
            vfloat largest = load(of_row + first * voxels);
            vfloat second = splat_lanes(std::numeric_limits<float>::lowest());
            for (int64_t e = first + 1; e < end; ++e) {
                const vfloat v = load(of_row + e * voxels);
                second = vmax(vmin(v, largest), second);
                largest = vmax(v, largest);
            }
            vfloat sum{};
            for (int64_t e = first; e < end; ++e)
                sum += exp_nonpositive((load(of_row + e * voxels) - largest) * scale);
            const LaneMask found =
                mask_of((second - largest) * scale > log_positive(sum) + settled) & inside;
            open[item * num_rows + row] = found && whole_rows ? inside : found;
        }
    });
}

Borders::Borders(const TileSet& set, const uint8_t* may_matter, const int64_t (&reach)[3],
                 ThreadPool& pool)
    : num_words_((set.tiling.tile_voxels() + 63) / 64), first_(set.num_entries(), -1) {
    const Tiling& tiling = set.tiling;
    const int64_t num_tiles = tiling.num_tiles();
    std::vector<std::vector<uint64_t>> found(set.num_active);
    pool.run(set.num_active, [&](int64_t item, int) {
        const int64_t number = set.active[item];
        int64_t at[3], low[3], high[3];  // the tiles within reach
        tiling.place(number, at);
        for (int a = 0; a < 3; ++a) {
            low[a] = std::max<int64_t>(0, tiling.begin(a, at[a]) - reach[a]) / tiling.tile[a];
            high[a] =
                std::min(tiling.shape[a] - 1, tiling.end(a, at[a]) - 1 + reach[a]) / tiling.tile[a];
        }
        for (int64_t e = set.first_entry[item]; e < set.first_entry[item + 1]; ++e) {
            std::vector<Span> open;  // voxels within reach of the tiles where the label is missing
            for (int64_t z = low[0]; z <= high[0]; ++z)
                for (int64_t y = low[1]; y <= high[1]; ++y)
                    for (int64_t x = low[2]; x <= high[2]; ++x) {
                        const int64_t other = (z * tiling.count[1] + y) * tiling.count[2] + x;
                        if (!may_matter[set.label[e] * num_tiles + other] ||
                            set.settled[other] == set.label[e])
                            continue;
                        if (set.index[other] >= 0 &&
                            set.find_entry(set.index[other], set.label[e]) >= 0)
                            continue;
                        Span span{};
                        const int64_t place[3] = {z, y, x};
                        for (int a = 0; a < 3; ++a) {
                            span.begin[a] = tiling.begin(a, place[a]) - reach[a];
                            span.end[a] = tiling.end(a, place[a]) + reach[a];
                        }
                        open.push_back(span);
                    }
            if (open.empty()) continue;
            first_[e] = static_cast<int64_t>(found[item].size());
            found[item].resize(found[item].size() + num_words_);
            uint64_t* const bits = found[item].data() + first_[e];
            for_voxels(set, number, [&](int64_t, int64_t place, int64_t z, int64_t y, int64_t x) {
                if (std::any_of(open.begin(), open.end(),
                                [&](const Span& span) { return span.holds(z, y, x); }))
                    bits[place / 64] |= uint64_t{1} << (place % 64);
            });
        }
    });
    for (int64_t item = 0; item < set.num_active; ++item) {
        for (int64_t e = set.first_entry[item]; e < set.first_entry[item + 1]; ++e)
            if (first_[e] >= 0) first_[e] += static_cast<int64_t>(bits_.size());
        bits_.insert(bits_.end(), found[item].begin(), found[item].end());
    }
}

template void decode_entries(const TileSet&, const float*, uint8_t*, ThreadPool&);
template void decode_entries(const TileSet&, const float*, uint16_t*, ThreadPool&);
}  // namespace crf
