// The labels of each tile, and values of a label at the voxels of its tiles
// (docs/reference/math.md).
#pragma once

#include "cpu/buffer.h"
#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace crf {
// Some of the sixteen voxels of a row of a tile, one bit each: the lowest is the first.
typedef uint16_t LaneMask;
constexpr LaneMask kAllLanes = 0xffff;
static_assert(kLanes == 16);

// The lanes that are marked, as a comparison gives them.
inline vint lanes_of(LaneMask mask) {
    const vint bit = {1,      1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                      1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    return (splat_lanes(static_cast<int32_t>(mask)) & bit) != 0;
}

// The lanes where a comparison is true.
template <class V>
inline LaneMask mask_of(V condition) {
    if constexpr (std::is_class_v<V>) {
        return static_cast<LaneMask>(mask_of(condition.low) | mask_of(condition.high) << V::kHalf);
    } else {
#if defined(__AVX512DQ__)
        return _mm512_movepi32_mask((__m512i)condition);
#elif defined(__AVX2__) && !defined(__clang__)
        return static_cast<LaneMask>(_mm256_movemask_ps((__m256)condition));
#elif defined(__SSE2__) && !defined(__clang__)
        return static_cast<LaneMask>(_mm_movemask_ps((__m128)condition));
#else
        uint32_t mask = 0;
        for (size_t lane = 0; lane < sizeof condition / 4; ++lane)
            mask |= static_cast<uint32_t>(condition[lane] & 1) << lane;
        return static_cast<LaneMask>(mask);
#endif
    }
}

inline LaneMask first_lanes_mask(int64_t count) {
    return count >= kLanes ? kAllLanes : static_cast<LaneMask>((1u << count) - 1);
}

inline bool any_marked(const LaneMask* rows, int64_t count) {
    return std::any_of(rows, rows + count, [](LaneMask mask) { return mask != 0; });
}

// The labels that take part in each tile. An *active* tile has two or more; each (active tile,
// label) is an entry with one value per voxel of a whole tile. A *settled* tile has one, whose
// marginal is 1.
struct TileSet {
    Tiling tiling;
    const uint8_t* mask;  // (*grid) nonzero = inside; nullptr: everywhere
    int64_t num_active;
    const int64_t* active;       // flat numbers of the active tiles, ascending
    const int64_t* first_entry;  // (num_active + 1)
    const int32_t* label;        // (entry) ascending in a tile
    const int32_t* settled;      // (tile) the only label; -1: none, or the tile is active
    std::vector<int64_t> index;  // (tile) number among the active ones, or -1

    int64_t num_entries() const { return first_entry[num_active]; }
    bool is_inside(int64_t voxel) const { return !mask || mask[voxel]; }
    // The entry of a label in an active tile, or -1.
    int64_t find_entry(int64_t active_tile, int32_t wanted) const;
};

// label_map: (*grid) the (lowest) label of the largest value at voxels of active tiles inside the
// mask. values: (entry, voxel of a tile).
template <class Label>
void decode_entries(const TileSet& set, const float* values, Label* label_map, ThreadPool& pool);

// open: (active tile, row of the tile), the voxels inside the mask that have a label, other than
// their most probable one, whose probability in the network's output exceeds exp(settled);
// whole_rows: and the others of their rows. logits: (entry, voxel of a tile).
void find_open_voxels(const TileSet& set, const float* logits, float temperature, float settled,
                      bool whole_rows, LaneMask* open, ThreadPool& pool);

// Which voxels of a row of a tile are inside the mask and the grid.
LaneMask lanes_inside(const TileSet& set, int64_t tile, int64_t row);

// The voxels of each entry within reach of a tile where its label takes no part although it might
// matter there.
class Borders {
   public:
    // may_matter: (label, tile). reach: voxels along each axis after which every kernel ends.
    Borders(const TileSet& set, const uint8_t* may_matter, const int64_t (&reach)[3],
            ThreadPool& pool);

    // Calls body(place among the tile's voxels) for such voxels of an entry until it returns true;
    // returns whether it did.
    template <class Body>
    bool any(int64_t entry, Body&& body) const {
        if (first_[entry] < 0) return false;
        for (int64_t w = 0; w < num_words_; ++w)
            for (uint64_t left = bits_[first_[entry] + w]; left; left &= left - 1)
                if (body(w * 64 + std::countr_zero(left))) return true;
        return false;
    }

   private:
    int64_t num_words_;
    std::vector<int64_t> first_;  // (entry) its first word, or -1
    std::vector<uint64_t> bits_;  // one bit per voxel of the tile
};

// A tile and what lies within `halo` voxels of it, as one array; rows along the last axis.
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

    // A row of a tile, or the part of it inside the grid.
    struct Piece {
        int64_t tile, tile_row,
            tile_place;      // its number among the tile's rows, its first place in the tile
        int64_t grid;        // index of its first voxel
        int64_t row, place;  // its row and first place in the array
        int64_t column;      // of tiles: -1: left of the tile, 0: the tile's, 1: right
        int64_t length;
    };

    // Calls body(piece) for each row of each tile that the neighborhood of a tile overlaps. Along
    // the rows, the halo must be whole tiles.
    template <class Body>
    void for_rows(const Tiling& tiling, int64_t number, Body&& body) const {
        int64_t at[3], begin[3], end[3], first[3], last[3];
        tiling.place(number, at);
        for (int a = 0; a < 3; ++a) {
            begin[a] = std::max<int64_t>(0, tiling.begin(a, at[a]) - halo[a]);
            end[a] = std::min(tiling.shape[a], tiling.begin(a, at[a]) + tiling.tile[a] + halo[a]);
            first[a] = begin[a] / tiling.tile[a];
            last[a] = (end[a] - 1) / tiling.tile[a];
        }
        Piece piece;
        for (int64_t tile_z = first[0]; tile_z <= last[0]; ++tile_z)
            for (int64_t tile_y = first[1]; tile_y <= last[1]; ++tile_y)
                for (int64_t tile_x = first[2]; tile_x <= last[2]; ++tile_x) {
                    const int64_t x = tiling.begin(2, tile_x);
                    piece.tile = (tile_z * tiling.count[1] + tile_y) * tiling.count[2] + tile_x;
                    piece.length = tiling.end(2, tile_x) - x;
                    piece.column = tile_x < at[2] ? -1 : tile_x > at[2];
                    const int64_t z_begin = std::max(begin[0], tiling.begin(0, tile_z));
                    const int64_t z_end = std::min(end[0], tiling.end(0, tile_z));
                    const int64_t y_begin = std::max(begin[1], tiling.begin(1, tile_y));
                    const int64_t y_end = std::min(end[1], tiling.end(1, tile_y));
                    for (int64_t z = z_begin; z < z_end; ++z)
                        for (int64_t y = y_begin; y < y_end; ++y) {
                            piece.tile_row = (z - tiling.begin(0, tile_z)) * tiling.tile[1] + y -
                                             tiling.begin(1, tile_y);
                            piece.tile_place = piece.tile_row * tiling.tile[2];
                            piece.grid = (z * tiling.shape[1] + y) * tiling.shape[2] + x;
                            piece.row = (z - tiling.begin(0, at[0]) + halo[0]) * shape[1] + y -
                                        tiling.begin(1, at[1]) + halo[1];
                            piece.place =
                                piece.row * shape[2] + x - tiling.begin(2, at[2]) + halo[2];
                            body(piece);
                        }
                }
    }
};

// The voxels of one row of a window around a voxel: those up to `reach` away along it.
struct WindowRow {
    int64_t z, y, reach;
};

// Marks on the voxels of a grid, one bit each, by rows of its tiles. Tiles are kLanes voxels wide.
class RowMap {
   public:
    explicit RowMap(const Tiling& tiling)
        : tiling_(tiling), marks_(tiling.shape[0] * tiling.shape[1] * tiling.count[2]) {}

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
        std::stable_sort(ordered.begin(), ordered.end(),
                         [](const WindowRow& a, const WindowRow& b) { return a.reach < b.reach; });
        for (const WindowRow& part : ordered) {
            while (reach < part.reach) add_away(++reach, along);
            const int64_t begin = std::max<int64_t>(0, -part.y);
            const int64_t end = tiling_.shape[1] - std::max<int64_t>(0, part.y);
            for (int64_t z = std::max<int64_t>(0, -part.z);
                 z < tiling_.shape[0] - std::max<int64_t>(0, part.z); ++z) {
                const LaneMask* const from = along.data() + z * plane + begin * tiling_.count[2];
                LaneMask* const to =
                    wider.data() + (z + part.z) * plane + (begin + part.y) * tiling_.count[2];
                for (int64_t i = 0; i < (end - begin) * tiling_.count[2]; ++i) to[i] |= from[i];
            }
        }
        marks_.swap(wider);
    }

    // row: of the grid; column: of tiles.
    LaneMask lanes(int64_t row, int64_t column) const {
        return marks_[row * tiling_.count[2] + column];
    }

    // The marks of a tile's rows.
    std::vector<LaneMask> rows(int64_t tile) const {
        std::vector<LaneMask> found(tiling_.tile[0] * tiling_.tile[1]);
        for_rows(tile, [&](int64_t row, int64_t place) { found[row] = marks_[place]; });
        return found;
    }

   private:
    template <class Body>
    void for_rows(int64_t tile, Body&& body) const {
        tiling_.for_rows(tile, [&](const TileRow& row) {
            body(row.number,
                 (row.z * tiling_.shape[1] + row.y) * tiling_.count[2] + row.x / kLanes);
        });
    }

    // Adds the voxels that are exactly `away` voxels from a marked one along the last axis.
    void add_away(int64_t away, std::vector<LaneMask>& to) const {
        const int64_t count = tiling_.count[2], columns = away / kLanes, bits = away % kLanes;
        const auto part = [&](const LaneMask* row, int64_t i) {
            return i >= 0 && i < count ? uint32_t{row[i]} : 0u;
        };
        for (size_t first = 0; first < marks_.size(); first += count) {
            const LaneMask* const row = marks_.data() + first;
            if (!any_marked(row, count)) continue;
            for (int64_t i = 0; i < count; ++i) {
                const uint32_t before = part(row, i - columns - 1) | part(row, i - columns)
                                                                         << kLanes;
                const uint32_t after = part(row, i + columns) | part(row, i + columns + 1)
                                                                    << kLanes;
                to[first + i] |= static_cast<LaneMask>(before >> (kLanes - bits) | after >> bits);
            }
        }
    }

    const Tiling& tiling_;
    std::vector<LaneMask> marks_;  // (z, y, tile along the last axis)
};
}  // namespace crf
