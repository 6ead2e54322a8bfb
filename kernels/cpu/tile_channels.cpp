// Messages between tiles by the filters of the whole volume: labels whose tiles do not overlap share a channel, and a few channels at a
// time are spread over all voxels. For kernels that are too wide for direct sums.
#include <algorithm>

#include "cpu/tile_filter.h"

namespace crf {

namespace {

// Channels per filtering: the filters process as many together.
constexpr int kGroup = 4;

class ChannelTileFilter final : public TileFilter {
   public:
    ChannelTileFilter(const TileSet& set, const TileChannels& channels, const Voxels& voxels, Kernel<float>& kernel, ThreadPool& pool)
        : set_(set), channels_(channels), voxels_(voxels), kernel_(kernel), pool_(pool) {
        const Tiling& tiling = set.tiling;
        const int64_t num_rows = tiling.shape[0] * tiling.shape[1];
        first_run_.assign(num_rows + 1, static_cast<int64_t>(voxels.runs.size()));
        for (int64_t r = static_cast<int64_t>(voxels.runs.size()) - 1; r >= 0; --r) first_run_[voxels.runs[r].grid / tiling.shape[2]] = r;
        for (int64_t row = num_rows - 1; row >= 0; --row) first_run_[row] = std::min(first_run_[row], first_run_[row + 1]);
    }

    void accumulate(const float* marginals, const uint8_t* /*is_open*/, const float* label_weight, float* message) override {
        const int64_t num_voxels = voxels_.num_voxels, tile_voxels = set_.tiling.tile_voxels();
        const std::vector<float> ones(kGroup, 1.0f);
        const float* scale = kernel_.scale.get();
        Workspace workspace;
        for (int first = 0; first < channels_.num_channels; first += kGroup) {
            const int count = std::min(kGroup, channels_.num_channels - first);
            if (sent_.size < count * num_voxels) {
                sent_ = Buffer<float>(count * num_voxels);
                received_ = Buffer<float>(count * num_voxels);
            }
            pool_.run(count, [&](int64_t c, int) {
                std::fill(sent_.get() + c * num_voxels, sent_.get() + (c + 1) * num_voxels, 0.0f);
                std::fill(received_.get() + c * num_voxels, received_.get() + (c + 1) * num_voxels, 0.0f);
            });
            pool_.run(set_.tiling.num_tiles(), [&](int64_t tile, int) {
                const int64_t item = set_.index[tile];
                if (item < 0) {
                    const int channel = set_.settled[tile] < 0 ? -1 : channels_.of_settled[tile] - first;
                    if (channel < 0 || channel >= count) return;
                    for_pieces(tile, [&](int64_t voxel, int64_t, int64_t length) {
                        std::fill_n(sent_.get() + channel * num_voxels + voxel, length, 1.0f);
                    });
                    return;
                }
                for (int64_t e = set_.first_entry[item]; e < set_.first_entry[item + 1]; ++e) {
                    const int channel = channels_.of_entry[e] - first;
                    if (channel < 0 || channel >= count) continue;
                    for_pieces(tile, [&](int64_t voxel, int64_t place, int64_t length) {
                        std::copy_n(marginals + e * tile_voxels + place, length, sent_.get() + channel * num_voxels + voxel);
                    });
                }
            });
            kernel_.filter->accumulate(sent_.get(), count, kernel_.scales_sent ? scale : nullptr, scale, ones.data(), received_.get(),
                                       workspace);
            pool_.run(set_.num_active, [&](int64_t item, int) {
                for (int64_t e = set_.first_entry[item]; e < set_.first_entry[item + 1]; ++e) {
                    const int channel = channels_.of_entry[e] - first;
                    if (channel < 0 || channel >= count) continue;
                    const float weight = label_weight[set_.label[e]];
                    for_pieces(set_.active[item], [&](int64_t voxel, int64_t place, int64_t length) {
                        const float* from = received_.get() + channel * num_voxels + voxel;
                        float* to = message + e * tile_voxels + place;
                        for (int64_t i = 0; i < length; ++i) to[i] += weight * from[i];
                    });
                }
            });
        }
    }

   private:
    // Calls body(compact voxel, place among the tile's voxels, length) for the voxels of a tile inside the mask of the filters.
    template <class Body>
    void for_pieces(int64_t number, Body&& body) const {
        const Tiling& tiling = set_.tiling;
        int64_t at[3];
        tiling.place(number, at);
        const int64_t x = tiling.begin(2, at[2]), x_end = tiling.end(2, at[2]);
        for (int64_t z = tiling.begin(0, at[0]); z < tiling.end(0, at[0]); ++z)
            for (int64_t y = tiling.begin(1, at[1]); y < tiling.end(1, at[1]); ++y) {
                const int64_t row = z * tiling.shape[1] + y, start = row * tiling.shape[2];
                const int64_t place = (z % tiling.tile[0] * tiling.tile[1] + y % tiling.tile[1]) * tiling.tile[2];
                for (int64_t r = first_run_[row]; r < first_run_[row + 1]; ++r) {
                    const Run& run = voxels_.runs[r];
                    const int64_t begin = std::max(x, run.grid - start), end = std::min(x_end, run.grid - start + run.length);
                    if (begin < end) body(run.voxel + begin - (run.grid - start), place + begin - x, end - begin);
                }
            }
    }

    const TileSet& set_;
    const TileChannels& channels_;
    const Voxels& voxels_;
    Kernel<float>& kernel_;
    ThreadPool& pool_;
    std::vector<int64_t> first_run_;  // (row of the grid + 1) the first run of the row, or of a later one
    Buffer<float> sent_, received_;   // (channel of a group, compact voxel)
};

}  // namespace

std::unique_ptr<TileFilter> make_channel_tile_filter(const TileSet& set, const TileChannels& channels, const Voxels& voxels,
                                                     Kernel<float>& kernel, ThreadPool& pool) {
    return std::make_unique<ChannelTileFilter>(set, channels, voxels, kernel, pool);
}

}  // namespace crf
