// Marks on the voxels of a grid, by rows of its tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/lane_mask.h"
#include "cpu/tiles.h"

namespace crf {

// Of a window around a voxel: the voxels of one row, up to `reach` away along it.
struct WindowRow {
    int64_t z, y, reach;
};

// One bit per voxel. Tiles are kLanes voxels wide.
class RowMap {
   public:
    explicit RowMap(const Tiling& tiling) : tiling_(tiling), marks_(tiling.shape[0] * tiling.shape[1] * tiling.count[2]) {}

    // Marks voxels of a tile. lanes: (row of the tile).
    void mark(int64_t tile, const LaneMask* lanes) {
        for_rows(tile, [&](int64_t row, int64_t place) { marks_[place] |= lanes[row]; });
    }

    // Marks the voxels that have a marked one in their window, which is symmetric.
    void widen(const std::vector<WindowRow>& window) {
        const int64_t plane = tiling_.shape[1] * tiling_.count[2];
        std::vector<LaneMask> wider(marks_.size()), along = marks_;
        int64_t reach = 0;  // of `along`
        std::vector<WindowRow> ordered = window;
        std::stable_sort(ordered.begin(), ordered.end(), [](const WindowRow& a, const WindowRow& b) { return a.reach < b.reach; });
        for (const WindowRow& part : ordered) {
            while (reach < part.reach) add_away(++reach, along);
            const int64_t begin = std::max<int64_t>(0, -part.y), end = tiling_.shape[1] - std::max<int64_t>(0, part.y);
            for (int64_t z = std::max<int64_t>(0, -part.z); z < tiling_.shape[0] - std::max<int64_t>(0, part.z); ++z) {
                const LaneMask* const from = along.data() + z * plane + begin * tiling_.count[2];
                LaneMask* const to = wider.data() + (z + part.z) * plane + (begin + part.y) * tiling_.count[2];
                for (int64_t i = 0; i < (end - begin) * tiling_.count[2]; ++i) to[i] |= from[i];
            }
        }
        marks_.swap(wider);
    }

    // row: of the grid; column: of tiles.
    LaneMask lanes(int64_t row, int64_t column) const { return marks_[row * tiling_.count[2] + column]; }

    // The marks of a tile's rows.
    std::vector<LaneMask> rows(int64_t tile) const {
        std::vector<LaneMask> found(tiling_.tile[0] * tiling_.tile[1]);
        for_rows(tile, [&](int64_t row, int64_t place) { found[row] = marks_[place]; });
        return found;
    }

   private:
    template <class Body>
    void for_rows(int64_t tile, Body&& body) const {
        tiling_.for_rows(
            tile, [&](const TileRow& row) { body(row.number, (row.z * tiling_.shape[1] + row.y) * tiling_.count[2] + row.x / kLanes); });
    }

    // Adds the voxels that are exactly `away` voxels from a marked one along the last axis.
    void add_away(int64_t away, std::vector<LaneMask>& to) const {
        const int64_t count = tiling_.count[2], columns = away / kLanes, bits = away % kLanes;
        const auto part = [&](const LaneMask* row, int64_t i) { return i >= 0 && i < count ? uint32_t{row[i]} : 0u; };
        for (size_t first = 0; first < marks_.size(); first += count) {
            const LaneMask* const row = marks_.data() + first;
            if (!any_marked(row, count)) continue;
            for (int64_t i = 0; i < count; ++i) {
                const uint32_t before = part(row, i - columns - 1) | part(row, i - columns) << kLanes;
                const uint32_t after = part(row, i + columns) | part(row, i + columns + 1) << kLanes;
                to[first + i] |= static_cast<LaneMask>(before >> (kLanes - bits) | after >> bits);
            }
        }
    }

    const Tiling& tiling_;
    std::vector<LaneMask> marks_;  // (z, y, tile along the last axis)
};

}  // namespace crf
