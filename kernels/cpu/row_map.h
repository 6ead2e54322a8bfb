// Marks on the rows of tiles.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/tiles.h"

namespace crf {

// Rows of the grid as they are cut by tiles along the last axis.
class RowMap {
   public:
    explicit RowMap(const Tiling& tiling) : tiling_(tiling), marks_(tiling.shape[0] * tiling.shape[1] * tiling.count[2]) {}

    // Marks rows of a tile.
    void mark(int64_t tile, const uint8_t* rows) {
        for_rows(tile, [&](int64_t row, int64_t place) { marks_[place] |= rows[row]; });
    }

    // Marks what is within reach of a marked row: along the last axis in whole tiles.
    void widen(const int64_t (&reach)[3]) {
        const int64_t across = (reach[2] + tiling_.tile[2] - 1) / tiling_.tile[2];
        widen_axis(tiling_.count[2], 1, across);
        widen_axis(tiling_.shape[1], tiling_.count[2], reach[1]);
        widen_axis(tiling_.shape[0], tiling_.shape[1] * tiling_.count[2], reach[0]);
    }

    // row: of the grid; column: of tiles.
    bool is_marked(int64_t row, int64_t column) const { return marks_[row * tiling_.count[2] + column] != 0; }

    // The marks of a tile's rows.
    std::vector<uint8_t> rows(int64_t tile) const {
        std::vector<uint8_t> found(tiling_.tile[0] * tiling_.tile[1]);
        for_rows(tile, [&](int64_t row, int64_t place) { found[row] = marks_[place]; });
        return found;
    }

   private:
    template <class Body>
    void for_rows(int64_t tile, Body&& body) const {
        int64_t at[3];
        tiling_.place(tile, at);
        for (int64_t z = tiling_.begin(0, at[0]); z < tiling_.end(0, at[0]); ++z)
            for (int64_t y = tiling_.begin(1, at[1]); y < tiling_.end(1, at[1]); ++y)
                body((z - tiling_.begin(0, at[0])) * tiling_.tile[1] + y - tiling_.begin(1, at[1]),
                     (z * tiling_.shape[1] + y) * tiling_.count[2] + at[2]);
    }

    void widen_axis(int64_t length, int64_t stride, int64_t reach) {
        const int64_t size = static_cast<int64_t>(marks_.size());
        for (int64_t line = 0; line < size / length; ++line) {
            uint8_t* const first = marks_.data() + line / stride * stride * length + line % stride;
            // The distance to the last mark, forwards and then backwards; new marks do not count.
            std::vector<uint8_t> near(length);
            for (int pass = 0; pass < 2; ++pass) {
                int64_t since = reach + 1;
                for (int64_t k = 0; k < length; ++k) {
                    const int64_t i = pass == 0 ? k : length - 1 - k;
                    since = first[i * stride] ? 0 : since + 1;
                    near[i] |= since <= reach;
                }
            }
            for (int64_t i = 0; i < length; ++i) first[i * stride] = near[i];
        }
    }

    const Tiling& tiling_;
    std::vector<uint8_t> marks_;  // (z, y, tile along the last axis)
};

}  // namespace crf
