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
    const uint8_t* mask;               // (*grid) nonzero = inside; nullptr: everywhere
    std::vector<int64_t> active;       // flat numbers of the active tiles, ascending
    std::vector<int64_t> first_entry;  // (active tile), and the number of entries
    std::vector<int32_t> label;        // (entry) ascending in a tile
    std::vector<int32_t> settled;      // (tile) the only label; -1: none, or the tile is active
    std::vector<int64_t> index;        // (tile) number among the active ones, or -1

    int64_t num_active() const { return static_cast<int64_t>(active.size()); }
    int64_t num_entries() const { return static_cast<int64_t>(label.size()); }
    bool is_inside(int64_t voxel) const { return !mask || mask[voxel]; }
    // Whether a label takes part in a tile.
    bool has(int64_t tile, int32_t wanted) const {
        if (index[tile] < 0) return settled[tile] == wanted;
        return std::binary_search(label.begin() + first_entry[index[tile]],
                                  label.begin() + first_entry[index[tile] + 1], wanted);
    }
    // Which voxels of a row are inside the mask and the grid.
    LaneMask lanes_inside(const TileRow& row) const {
        if (!mask) return first_lanes_mask(row.length);
        uint32_t inside = 0;
        for (int64_t i = 0; i < row.length; ++i)
            inside |= static_cast<uint32_t>(mask[row.grid + i] != 0) << i;
        return static_cast<LaneMask>(inside);
    }
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

// (entry, row of the tile) the voxels within reach of a tile where the entry's label takes no part
// although it might matter there; empty: none.
typedef std::vector<std::vector<LaneMask>> Borders;

// may_matter: (label, tile). reach: voxels along each axis after which every kernel ends.
Borders find_borders(const TileSet& set, const uint8_t* may_matter, const Extents& reach,
                     ThreadPool& pool);
}  // namespace crf
