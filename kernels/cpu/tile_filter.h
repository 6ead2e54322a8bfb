// Messages between the voxels of tiles with label sets.
#pragma once

#include <memory>
#include <vector>

#include "cpu/kernel.h"
#include "cpu/tile_set.h"

namespace crf {

// A normalized kernel on a set of tiles.
class TileFilter {
   public:
    virtual ~TileFilter() = default;

    // message[e][n] += label_weight[label of e] * (the normalized kernel applied to the marginals of that label)[n]
    //
    // marginals, message: (entry, voxel of a tile); voxels outside the mask or the grid have marginal 0.
    //
    // is_open: (active tile, row of the tile), 0 where no message is needed and none may be written.
    virtual void accumulate(const float* marginals, const uint8_t* is_open, const float* label_weight, float* message) = 0;

    // Whether rows that are not open get no message.
    virtual bool skips_rows() const { return false; }
};

// A Gaussian of position and intensity, summed over the voxels within reach; intensities: none for a kernel of position alone.
struct DirectKernel {
    std::vector<double> sigma;            // voxels, one per axis of the tiling
    std::vector<const float*> intensity;  // (*grid), one per modality
    std::vector<double> theta_beta;       // one per modality
};

// The sum over a window of three standard deviations, as the truncated filter computes it (window.h), or, without intensities, the
// separable sum of the spatial filter (spatial_taps.h). Nothing is stored per voxel but the normalization near active tiles.
//
// is_open: (active tile, row of the tile), as for `accumulate`.
std::unique_ptr<TileFilter> make_direct_tile_filter(const TileSet& set, const uint8_t* is_open, const DirectKernel& kernel,
                                                    Normalization normalization, ThreadPool& pool);

// Channels that labels share where their tiles do not overlap.
struct TileChannels {
    int num_channels;
    const int32_t* of_entry;    // (entry)
    const int32_t* of_settled;  // (tile) of a settled tile's label
};

// Any filter of a volume, with its normalization. voxels: those inside the mask of the filter, which may leave out settled tiles that are
// far from all active ones. All arguments must outlive the filter.
std::unique_ptr<TileFilter> make_channel_tile_filter(const TileSet& set, const TileChannels& channels, const Voxels& voxels,
                                                     Kernel<float>& kernel, ThreadPool& pool);

}  // namespace crf
