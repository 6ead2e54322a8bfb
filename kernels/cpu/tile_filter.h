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
// (window.h), or, without intensities, the separable sum of the spatial filter (spatial_rows.h).
// Nothing is stored per voxel but the normalization near active tiles. open: (active tile, row of
// the tile), as for `accumulate`. has_room: whether copies of the whole volume may be made for a
// while.
std::unique_ptr<TileFilter> make_direct_tile_filter(const TileSet& set, const LaneMask* open,
                                                    const DirectKernel& kernel,
                                                    Normalization normalization, bool has_room,
                                                    ThreadPool& pool);

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

// Marginals at the borders of labels' domains, which must stay negligible in every step.
struct BorderCheck {
    const Borders* borders;
    float threshold;
    uint8_t* exceeds;  // (entry) set to 1 where a marginal was above the threshold after any step
};

// logits: (entry, voxel of a tile), not divided by the temperature. out: the same shape, the
// refined logits. options: `num_labels` counts all labels; the voxels of settled tiles do not
// change, and count for convergence: `num_voxels` are all those inside the mask. open: (active
// tile, row of the tile) the voxels that receive (`find_open_voxels`); the others are settled, too:
// their marginals stay those of the network. The energy is that of the active tiles. unsent: the
// largest unsent change of marginals.
MeanFieldOutcome run_tile_mean_field(const TileSet& set,
                                     const std::vector<std::unique_ptr<TileFilter>>& kernels,
                                     const MeanFieldOptions& options, const LaneMask* open,
                                     int64_t num_voxels, float unsent, const float* logits,
                                     float* out, const BorderCheck* check, ThreadPool& pool,
                                     const StepCallback& callback);

// Kernels without their normalization on a tile and its surroundings, for direct sums.

// Which voxels of a row of the neighborhood send anything, one bit each, in the order of the row:
// those of the tile to the left, of the tile's own column, of the tile to the right. A halo of
// several tiles counts as one: its bits are all set if any tile of it sends.
typedef uint64_t SentLanes;
constexpr SentLanes kLeft = kAllLanes, kOwn = kLeft << kLanes, kRight = kOwn << kLanes,
                    kEverywhere = kLeft | kOwn | kRight;

// Voxels behind the last one of a neighborhood that vectors over the end of a window may read.
constexpr int64_t kBehind = kLanes / 2;

// Voxels of a row of the neighborhood that send to a row of the tile.
struct SendingRow {
    int64_t number;  // among the rows of the window
    SentLanes lanes;
};

// Labels that are summed together: their sums stay in registers.
constexpr int kMostTogether = 8;

// Scratch of a thread: arrays of a neighborhood. Behind those that vectors read, `intensity` and
// `sent`, there are kBehind more.
struct TileScratch {
    std::vector<float> intensity, scale, sent, received, pass;
    std::vector<const float*> image;  // (modality) intensity of the tile's first voxel
    int64_t image_row = 0, image_plane = 0;
    // (label) what the tile's first voxel sends; rows and planes around it follow at these
    // distances
    std::vector<const float*> sent_of;
    int64_t sent_row = 0, sent_plane = 0;
    // (label in `sent`, row of the neighborhood) where it is not zero
    std::vector<SentLanes> sends_label;
    // (kMostTogether labels of `sent_of`, row of the neighborhood) where one of them is not zero; a
    // row of `sent` where none is may be anything.
    std::vector<SentLanes> sends;
    std::vector<SendingRow> senders;
    // (row of the neighborhood) whether a row that receives is within reach
    std::vector<uint8_t> needed;
};

// A kernel without its normalization: sums over the neighborhood of a tile.
class TileKernel {
   public:
    // Along rows, the surroundings are whole tiles: rows of tiles are copied as they are.
    TileKernel(const Tiling& tiling, const int64_t (&reach)[3])
        : around(tiling, {reach[0], reach[1],
                          (reach[2] + tiling.tile[2] - 1) / tiling.tile[2] * tiling.tile[2]}),
          tiling_(tiling) {}
    virtual ~TileKernel() = default;

    // What is sent is in scratch.sent: (label, voxel of the neighborhood). labels: those to be
    // summed, in this order.
    void read_copies(const std::vector<int64_t>& labels, TileScratch& scratch) const {
        const int64_t num_labels = static_cast<int64_t>(labels.size());
        const int64_t num_rows = num_rows_around();
        const int64_t width = around.shape[2];
        scratch.sent_row = width;
        scratch.sent_plane = around.shape[1] * width;
        scratch.sent_of.clear();
        for (int64_t label : labels)
            scratch.sent_of.push_back(scratch.sent.data() + label * around.size +
                                      around.own_row(0, 0));
        scratch.sends.clear();
        for (int64_t first = 0; first < num_labels; first += kMostTogether)
            for (int64_t row = 0; row < num_rows; ++row) {
                SentLanes any = 0;
                const int64_t end = std::min(first + kMostTogether, num_labels);
                for (int64_t l = first; l < end; ++l)
                    any |= scratch.sends_label[labels[l] * num_rows + row];
                for (int64_t l = any ? first : end; l < end; ++l)
                    if (!scratch.sends_label[labels[l] * num_rows + row])
                        std::fill_n(scratch.sent.data() + labels[l] * around.size + row * width,
                                    width, 0.0f);
                scratch.sends.push_back(any);
            }
    }

    // What a voxel receives from, itself included.
    virtual std::vector<WindowRow> window() const = 0;

    // The lanes of a tile in the given column (-1: left of the tile, 0: its own, 1: right of it) as
    // they count in `sends`.
    SentLanes lanes_around(LaneMask lanes, int64_t column) const {
        if (column != 0 && lanes && around.halo[2] > kLanes) lanes = kAllLanes;
        return SentLanes{lanes} << ((column + 1) * kLanes);
    }

    // Marks the rows of the neighborhood that open voxels of the tile receive from.
    void find_needed(const LaneMask* open, TileScratch& scratch) const {
        scratch.needed.assign(num_rows_around(), 0);
        std::vector<uint8_t> near(around.shape[1]);  // of a plane of the tile
        for (int64_t z = 0; z < tiling_.tile[0]; ++z) {
            std::fill(near.begin(), near.end(), uint8_t{0});
            for (int64_t y = 0; y < tiling_.tile[1]; ++y)
                if (open[z * tiling_.tile[1] + y])
                    std::fill_n(near.begin() + y, 2 * around.halo[1] + 1, uint8_t{1});
            if (std::find(near.begin(), near.end(), uint8_t{1}) == near.end()) continue;
            for (int64_t plane = z; plane <= z + 2 * around.halo[0]; ++plane)
                for (int64_t y = 0; y < around.shape[1]; ++y)
                    scratch.needed[plane * around.shape[1] + y] |= near[y];
        }
    }

    // Prepares the tile whose sums follow, once it is known which voxels send.
    virtual void enter(int64_t tile, TileScratch& scratch) const = 0;
    // received: (label, voxel of the tile), from scratch.sent_of. open: (row of the tile) the
    // voxels that receive; the others of their rows get anything finite, other rows may be
    // anything.
    virtual void sum(int num_labels, const LaneMask* open, TileScratch& scratch) const = 0;

    int64_t num_rows_around() const { return around.shape[0] * around.shape[1]; }

    const Neighborhood around;

   protected:
    // The row of the neighborhood that is a row of the tile.
    int64_t own_row(int64_t row) const {
        return (row / tiling_.tile[1] + around.halo[0]) * around.shape[1] + row % tiling_.tile[1] +
               around.halo[1];
    }

    const Tiling& tiling_;
};

// The window of three standard deviations of window.h, and the taps of spatial_rows.h.
std::unique_ptr<TileKernel> make_bilateral_tile_kernel(const Tiling& tiling,
                                                       const DirectKernel& kernel);
std::unique_ptr<TileKernel> make_spatial_tile_kernel(const Tiling& tiling,
                                                     const DirectKernel& kernel);
}  // namespace crf
