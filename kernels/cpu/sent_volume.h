// What voxels send, in a volume per label: direct sums read it without copies of a tile's surroundings.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/simd.h"
#include "cpu/tile_set.h"

namespace crf {

// Rows are padded such that no voxel is within reach of another row along it. Zero wherever `sends` is.
struct SentVolume {
    int64_t row, plane, size, before;
    std::unique_ptr<float, void (*)(void*)> values;  // pages that no voxel of a label touches take no memory
    std::vector<LaneMask> sends;                     // (row of the grid, tile along it)
    SentVolume(const Tiling& tiling, const Neighborhood& around, int64_t num_labels)
        : row((tiling.shape[2] + around.halo[2] + kLanes - 1) / kLanes * kLanes),
          plane(tiling.shape[1] * row),
          size(tiling.shape[0] * plane),
          before(around.halo[2]),
          values(static_cast<float*>(std::calloc(num_labels * size + before + around.halo[2] + 2 * kLanes, sizeof(float))), std::free),
          sends(tiling.shape[0] * tiling.shape[1] * tiling.count[2]) {
        if (!values) throw std::bad_alloc();
    }
    float* at(int64_t label, int64_t z, int64_t y, int64_t x) const {
        return values.get() + before + label * size + z * plane + y * row + x;
    }
};

}  // namespace crf
