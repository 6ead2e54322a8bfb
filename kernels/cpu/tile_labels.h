// A label map as logits on tiles (docs/reference/math.md): a label takes part at the voxels that have it within reach.
#pragma once

#include <cstdint>

#include "cpu/thread_pool.h"
#include "cpu/tiles.h"

namespace crf {

// A label map (plane, *plane of the tiling), of which the tiling covers the planes from `first_plane` on; those before and after count as
// neighbors. Label: uint8_t or uint16_t.
template <class Label>
struct LabelPlanes {
    const Label* values;
    int64_t num_planes, first_plane;
};

// The logits of a label: at a voxel that has it, at others within reach of such a voxel, and elsewhere.
struct LabelLogits {
    float own, near, absent;
};

// near: (label, tile), for labels below num_labels, set to 1 for the tiles that reach a label: those with a voxel in the box of the label's
// voxels of some tile, widened by `reach`. It is set wherever a voxel has the label within reach, and in few other tiles.
template <class Label>
void mark_tiles_near_labels(const Tiling& tiling, const Label* label_map, const int64_t (&reach)[3], int64_t num_labels, uint8_t* near,
                            ThreadPool& pool);

// Writes the logits of a label in some tiles, one tile after the other at the places of their entries, as `fill_entries` does. A voxel is
// near a label if the label occurs up to `reach` voxels away along each axis.
template <class Label>
void fill_label_entries(const Tiling& tiling, const LabelPlanes<Label>& map, int label, const int64_t (&reach)[3],
                        const LabelLogits& logits, const int64_t* tiles, int64_t num_tiles, const int64_t* entry, float* out,
                        ThreadPool& pool);

}  // namespace crf
