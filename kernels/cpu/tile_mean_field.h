// The mean-field loop on label sets per tile: like mean_field.h, for the labels that take part in each tile.
#pragma once

#include "cpu/mean_field.h"
#include "cpu/tile_filter.h"

namespace crf {

// Marginals at the borders of labels' domains, which must stay negligible in every step.
struct BorderCheck {
    const Borders* borders;
    float threshold;
    uint8_t* exceeds;  // (entry) set to 1 where a marginal was above the threshold after any step
};

// logits: (entry, voxel of a tile), not divided by the temperature. out: the same shape, the refined logits. options: `num_labels` counts
// all labels; the voxels of settled tiles do not change, and count for convergence: `num_voxels` are all those inside the mask.
//
// open: (active tile, row of the tile) the voxels that receive (`find_open_voxels`); the others are settled, too: their marginals stay
// those of the network. The energy is that of the active tiles. unsent: the largest change of a voxel's marginals since it sent them last
// that it does not send. check: nullptr: none.
MeanFieldOutcome run_tile_mean_field(const TileSet& set, const std::vector<std::unique_ptr<TileFilter>>& kernels,
                                     const MeanFieldOptions& options, const LaneMask* open, int64_t num_voxels, float unsent,
                                     const float* logits, float* out, const BorderCheck* check, ThreadPool& pool,
                                     const StepCallback& callback);

}  // namespace crf
