#include "cpu/tile_set.h"

namespace crf {
template <class Label>
void decode_entries(const TileSet& set, const float* values, Label* label_map, ThreadPool& pool) {
    const int64_t voxels = set.tiling.tile_voxels();
    pool.run(set.num_active(), [&](int64_t item, int) {
        set.tiling.for_rows(set.active[item], [&](const TileRow& row) {
            for (int64_t i = 0; i < row.length; ++i) {
                if (!set.is_inside(row.grid + i)) continue;
                const float* const of_voxel = values + row.place + i;
                int64_t best = set.first_entry[item];
                for (int64_t e = best + 1; e < set.first_entry[item + 1]; ++e)
                    if (of_voxel[e * voxels] > of_voxel[best * voxels]) best = e;
                label_map[row.grid + i] = static_cast<Label>(set.label[best]);
            }
        });
    });
}

void find_open_voxels(const TileSet& set, const float* logits, float temperature, float settled,
                      bool whole_rows, LaneMask* open, ThreadPool& pool) {
    const int64_t voxels = set.tiling.tile_voxels(), num_rows = set.tiling.tile_rows();
    const float scale = 1 / temperature;
    pool.run(set.num_active(), [&](int64_t item, int) {
        const int64_t first = set.first_entry[item], end = set.first_entry[item + 1];
        LaneMask* const of_tile = open + item * num_rows;
        std::fill_n(of_tile, num_rows, LaneMask{0});
        set.tiling.for_rows(set.active[item], [&](const TileRow& row) {
            const LaneMask inside = set.lanes_inside(row);
            if (!inside) return;
            const float* const of_row = logits + row.place;
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
            of_tile[row.number] = found && whole_rows ? inside : found;
        });
    });
}

Borders find_borders(const TileSet& set, const uint8_t* may_matter, const Extents& reach,
                     ThreadPool& pool) {
    const Tiling& tiling = set.tiling;
    Borders borders(set.num_entries());
    // Marks the voxels of a tile that are within reach of another one.
    const auto mark = [&](int64_t tile, int64_t other, std::vector<LaneMask>& marks) {
        const Extents begin = tiling.begin(other), end = tiling.end(other);
        marks.resize(tiling.tile_rows());
        tiling.for_rows(tile, [&](const TileRow& row) {
            if (row.z < begin[0] - reach[0] || row.z >= end[0] + reach[0] ||
                row.y < begin[1] - reach[1] || row.y >= end[1] + reach[1])
                return;
            const int64_t first = std::max<int64_t>(0, begin[2] - reach[2] - row.x);
            const int64_t last = std::max<int64_t>(0, end[2] + reach[2] - row.x);
            marks[row.number] |= first_lanes_mask(last) & ~first_lanes_mask(first);
        });
    };
    pool.run(set.num_active(), [&](int64_t item, int) {
        const int64_t tile = set.active[item];
        Extents first = tiling.begin(tile), end = tiling.end(tile);
        for (int a = 0; a < 3; ++a) {
            first[a] -= reach[a];
            end[a] += reach[a];
        }
        for (int64_t e = set.first_entry[item]; e < set.first_entry[item + 1]; ++e)
            tiling.for_tiles(first, end, [&](int64_t other) {
                if (may_matter[set.label[e] * tiling.num_tiles() + other] &&
                    !set.has(other, set.label[e]))
                    mark(tile, other, borders[e]);
            });
    });
    return borders;
}

template void decode_entries(const TileSet&, const float*, uint8_t*, ThreadPool&);
template void decode_entries(const TileSet&, const float*, uint16_t*, ThreadPool&);
}  // namespace crf
