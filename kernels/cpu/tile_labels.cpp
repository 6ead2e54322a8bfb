#include "cpu/tile_labels.h"

#include <algorithm>
#include <vector>

#include "cpu/errors.h"
#include "cpu/tile_set.h"

namespace crf {

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

// Where the label occurs in a tile's neighborhood, and what becomes of it axis by axis; 0 or 1.
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

// Writes to `near` (voxel of the tile) whether `here` (voxel of the neighborhood) is 1 anywhere within reach.
void widen(const Tiling& tiling, const Neighborhood& around, Occurrence& found) {
    const int64_t rows = around.shape[1], width = around.shape[2], plane = rows * width;
    const int64_t depth = tiling.tile[0], height = tiling.tile[1], length = tiling.tile[2];
    found.along_z.resize(depth * plane);
    found.along_y.resize(depth * height * width);
    found.near.resize(depth * height * length);
    for (int64_t z = 0; z < depth; ++z)
        gather_any(found.here.data() + z * plane, plane, 2 * around.halo[0] + 1, plane, found.along_z.data() + z * plane);
    for (int64_t z = 0; z < depth; ++z)
        gather_any(found.along_z.data() + z * plane, width, 2 * around.halo[1] + 1, height * width,
                   found.along_y.data() + z * height * width);
    for (int64_t row = 0; row < depth * height; ++row)
        gather_any(found.along_y.data() + row * width, 1, 2 * around.halo[2] + 1, length, found.near.data() + row * length);
}

}  // namespace

template <class Label>
void mark_tiles_near_labels(const Tiling& tiling, const Label* label_map, const int64_t (&reach)[3], int64_t num_labels, uint8_t* near,
                            ThreadPool& pool) {
    const int64_t num_tiles = tiling.num_tiles();
    pool.run(num_tiles, [&](int64_t tile, int) {
        std::vector<LabelBox<Label>> boxes;
        tiling.for_rows(tile, [&](const TileRow& row) {
            const Label* const labels = label_map + row.grid;
            for (int64_t i = 0; i < row.length;) {
                const Label label = labels[i];
                const int64_t first = row.x + i;
                while (i < row.length && labels[i] == label) ++i;
                auto box = std::find_if(boxes.begin(), boxes.end(), [&](const auto& other) { return other.label == label; });
                if (box == boxes.end()) box = boxes.insert(box, {label, {row.z, row.y, first}, {row.z, row.y, first}});
                box->add(row.z, row.y, first, row.x + i - 1);
            }
        });
        for (const LabelBox<Label>& box : boxes) {
            if (box.label >= num_labels) throw InputError("a label map holds a label that has no channel");
            int64_t low[3], high[3];
            for (int a = 0; a < 3; ++a) {
                low[a] = std::max<int64_t>(0, box.low[a] - reach[a]) / tiling.tile[a];
                high[a] = std::min(tiling.shape[a] - 1, box.high[a] + reach[a]) / tiling.tile[a];
            }
            for (int64_t z = low[0]; z <= high[0]; ++z)
                for (int64_t y = low[1]; y <= high[1]; ++y)
                    for (int64_t x = low[2]; x <= high[2]; ++x)  // other threads may set the same flag
                        __atomic_store_n(near + box.label * num_tiles + (z * tiling.count[1] + y) * tiling.count[2] + x, uint8_t{1},
                                         __ATOMIC_RELAXED);
        }
    });
}

template <class Label>
void fill_label_entries(const Tiling& tiling, const LabelPlanes<Label>& map, int label, const int64_t (&reach)[3],
                        const LabelLogits& logits, const int64_t* tiles, int64_t num_tiles, const int64_t* entry, float* out,
                        ThreadPool& pool) {
    const Neighborhood around(tiling, reach);
    const int64_t whole[3] = {map.num_planes, tiling.shape[1], tiling.shape[2]};
    std::vector<Occurrence> scratch(pool.num_threads());
    pool.run(num_tiles, [&](int64_t item, int thread) {
        Occurrence& found = scratch[thread];
        int64_t at[3], corner[3], begin[3], end[3];  // corner: of the neighborhood; begin, end: what lies in the label map
        tiling.place(tiles[item], at);
        for (int a = 0; a < 3; ++a) {
            corner[a] = tiling.begin(a, at[a]) - reach[a] + (a == 0 ? map.first_plane : 0);
            begin[a] = std::max<int64_t>(0, corner[a]);
            end[a] = std::min(whole[a], corner[a] + around.shape[a]);
        }
        found.here.assign(around.size, 0);
        for (int64_t z = begin[0]; z < end[0]; ++z)
            for (int64_t y = begin[1]; y < end[1]; ++y) {
                const Label* row = map.values + (z * whole[1] + y) * whole[2] + begin[2];
                uint8_t* to =
                    found.here.data() + ((z - corner[0]) * around.shape[1] + y - corner[1]) * around.shape[2] + begin[2] - corner[2];
                for (int64_t i = 0; i < end[2] - begin[2]; ++i) to[i] = row[i] == label;
            }
        widen(tiling, around, found);
        float* const tile = out + entry[item] * tiling.tile_voxels();
        std::fill(tile, tile + tiling.tile_voxels(), 0.0f);
        tiling.for_rows(tiles[item], [&](const TileRow& row) {
            const uint8_t* const here = found.here.data() + around.own_row(row.number / tiling.tile[1], row.number % tiling.tile[1]);
            const uint8_t* const near = found.near.data() + row.place;
            for (int64_t i = 0; i < row.length; ++i) tile[row.place + i] = here[i] ? logits.own : near[i] ? logits.near : logits.absent;
        });
    });
}

template void mark_tiles_near_labels(const Tiling&, const uint8_t*, const int64_t (&)[3], int64_t, uint8_t*, ThreadPool&);
template void mark_tiles_near_labels(const Tiling&, const uint16_t*, const int64_t (&)[3], int64_t, uint8_t*, ThreadPool&);
template void fill_label_entries(const Tiling&, const LabelPlanes<uint8_t>&, int, const int64_t (&)[3], const LabelLogits&, const int64_t*,
                                 int64_t, const int64_t*, float*, ThreadPool&);
template void fill_label_entries(const Tiling&, const LabelPlanes<uint16_t>&, int, const int64_t (&)[3], const LabelLogits&, const int64_t*,
                                 int64_t, const int64_t*, float*, ThreadPool&);

}  // namespace crf
