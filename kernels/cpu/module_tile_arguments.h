// Argument types of the functions on tiles, and their checks.
#pragma once

#include <algorithm>
#include <array>

#include "cpu/module_arguments.h"
#include "cpu/tiles.h"

namespace crf {

using Stored = nanobind::ndarray<nanobind::ro, nanobind::c_contig, nanobind::device::cpu>;  // float32 or float16; uint8 or uint16
using StoredBox = nanobind::ndarray<nanobind::ro, nanobind::device::cpu>;                   // the same, or a box of a larger array
using Writable = nanobind::ndarray<nanobind::c_contig, nanobind::device::cpu>;
using TileList = nanobind::ndarray<const int64_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
template <class T>
using Out = nanobind::ndarray<T, nanobind::c_contig, nanobind::device::cpu>;

constexpr int64_t kMostVoxels = int64_t{1} << 48, kMostOfTile = 1 << 16;

// Voxels of a tile and what is within reach of it: more are searched for as a whole grid.
constexpr int64_t kLargestNeighborhood = 1 << 24;

inline Tiling checked_tiling(const std::array<int64_t, 3>& shape, const std::array<int64_t, 3>& tile) {
    int64_t voxels = 1, of_tile = 1;
    for (int a = 0; a < 3; ++a) {
        require(shape[a] > 0 && shape[a] <= kMostVoxels / voxels, "expected a grid with voxels, at most 2^48");
        require(tile[a] > 0 && tile[a] <= kMostOfTile / of_tile, "expected tiles with voxels, at most 65536");
        voxels *= shape[a];
        of_tile *= tile[a];
    }
    require(tile[2] == kLanes, "expected tiles of 16 voxels along the last axis");
    return Tiling({shape[0], shape[1], shape[2]}, {tile[0], tile[1], tile[2]});
}

template <class Array>
void require_size(const Array& array, int64_t size, const char* otherwise) {
    require(static_cast<int64_t>(array.size()) == size, otherwise);
}

template <class Array>
void require_grid(const Array& array, const Tiling& tiling) {
    require_size(array, tiling.num_voxels(), "expected an array with one value per voxel of the grid");
}

inline void require_grid(const std::optional<MaskArray>& mask, const Tiling& tiling) {
    if (mask) require_grid(*mask, tiling);
}

// Places along the axis of an array.
inline void require_places(const TileList& places, int64_t count, const char* otherwise) {
    require(std::all_of(places.data(), places.data() + places.size(), [&](int64_t place) { return place >= 0 && place < count; }),
            otherwise);
}

inline void require_tiles(const TileList& tiles, const Tiling& tiling) {
    require_places(tiles, tiling.num_tiles(), "expected numbers of tiles of the grid");
}

// One entry of `out` per tile.
inline void require_entries(const TileList& tiles, const TileList& entries, const FloatOut& out, const Tiling& tiling) {
    require_tiles(tiles, tiling);
    require_size(entries, static_cast<int64_t>(tiles.size()), "expected one entry per tile");
    require_places(entries, static_cast<int64_t>(out.size()) / tiling.tile_voxels(), "expected entries that there is room for");
}

inline void require_reach(const std::array<int64_t, 3>& reach) {
    for (int64_t extent : reach) require(extent >= 0 && extent <= kMostVoxels, "expected a reach of 0 voxels or more along each axis");
}

// Planes of a label map or channel: (plane, y, x).
template <class Array>
int64_t checked_planes(const Array& planes, const Tiling& tiling) {
    require(planes.ndim() == 3 && static_cast<int64_t>(planes.shape(1)) == tiling.shape[1] &&
                static_cast<int64_t>(planes.shape(2)) == tiling.shape[2],
            "expected planes of the grid");
    return static_cast<int64_t>(planes.shape(0));
}

}  // namespace crf
