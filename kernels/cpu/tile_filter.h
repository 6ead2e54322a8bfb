// Messages between the voxels of tiles with label sets.
#pragma once

#include "cpu/filter.h"
#include "cpu/mean_field.h"
#include "cpu/tile_set.h"

namespace crf {
// What the voxels of active tiles send: all that they hold, or what has changed since they sent
// last.
struct SentVoxels {
    const float*
        values;  // (entry, voxel of a tile); 0 at voxels that send nothing, of a row where some do
    // (active tile, row of the tile) those that send; where none of a row does, its values may be
    // anything
    const LaneMask* voxels;
    // (entry, row of the tile) whether a row that sends does so for the label; where not, its
    // values are 0
    const uint8_t* labels;
    bool from_settled;  // whether the voxels of settled tiles send 1 for their label
    // whether the values of a voxel's labels do, as changes of marginals
    bool sums_to_zero = false;
};

// A normalized kernel on a set of tiles.
class TileFilter {
   public:
    virtual ~TileFilter() = default;

    // message[e][n] += label_weight[label of e] * (the normalized kernel applied to what is sent
    // for that label)[n] at open voxels. open: (active tile, row of the tile) voxels that need a
    // message; others may get any finite one. message: (entry, voxel of a tile).
    virtual void accumulate(const SentVoxels& sent, const LaneMask* open, const float* label_weight,
                            float* message) = 0;
};

// A Gaussian of position and intensity, summed over the voxels within reach; intensities: none for
// a kernel of position alone.
struct DirectKernel {
    std::vector<double> sigma;            // voxels, one per axis of the tiling
    std::vector<const float*> intensity;  // (*grid), one per modality
    std::vector<double> theta_beta;       // one per modality
};

// The sum over a window of three standard deviations, as the truncated filter computes it
// (brick_pairs.h), or, without intensities, the separable sum of the spatial filter
// (brick_taps.cpp). Nothing is stored per voxel but the normalization near active tiles. open:
// (active tile, row of the tile), as for `accumulate`.
std::unique_ptr<TileFilter> make_direct_tile_filter(const TileSet& set, const LaneMask* open,
                                                    const DirectKernel& kernel,
                                                    Normalization normalization, ThreadPool& pool);

// Channels that labels share where their tiles do not overlap.
struct TileChannels {
    int num_channels;
    const int32_t* of_entry;    // (entry)
    const int32_t* of_settled;  // (tile) of a settled tile's label
};

// Any filter of a volume, with its normalization. voxels: those inside the mask of the filter,
// which may leave out settled tiles that are far from all open voxels. The kernel then serves those
// alone. All arguments must outlive the filter.
std::unique_ptr<TileFilter> make_channel_tile_filter(const TileSet& set,
                                                     const TileChannels& channels,
                                                     const Voxels& voxels, const LaneMask* open,
                                                     Kernel& kernel, ThreadPool& pool);

// The mean-field loop on label sets per tile: like mean_field.h, for the labels that take part in
// each tile.

struct TileRun {
    const TileSet& set;
    // `num_labels` counts all labels
    const MeanFieldOptions& options;
    // (active tile, row of the tile) the voxels that receive (`find_open_voxels`); the others are
    // settled, too: their marginals stay those of the network
    const LaneMask* open;
    int64_t num_voxels;   // inside the mask; those of settled tiles count for convergence, too
    float unsent;         // the largest unsent change of marginals
    const float* logits;  // (entry, voxel of a tile), not divided by the temperature
    float* out;           // the same shape: the refined logits
    // Marginals there must stay below the threshold in every step; empty: no such check.
    const Borders& borders;
    float threshold;
    uint8_t* exceeds;  // (entry) set to 1 where a marginal was above the threshold after any step
};

// The energy is that of the active tiles.
MeanFieldOutcome run_tile_mean_field(const TileRun& run,
                                     const std::vector<std::unique_ptr<TileFilter>>& kernels,
                                     ThreadPool& pool, const StepCallback& callback);
}  // namespace crf
