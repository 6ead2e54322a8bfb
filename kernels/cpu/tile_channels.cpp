// Messages between tiles by the filters of the whole volume, for kernels that are too wide for
// direct sums: labels whose tiles do not overlap share a channel. A group of channels is sent from
// the tiles of its labels, and received there.

#include "cpu/tile_filter.h"
#include "cpu/voxel_rows.h"

namespace crf {
namespace {
class ChannelTileFilter final : public TileFilter {
   public:
    ChannelTileFilter(const TileSet& set, const TileChannels& channels, const Voxels& voxels,
                      const LaneMask* open, Kernel& kernel, ThreadPool& pool)
        : set_(set),
          channels_(channels),
          voxels_(voxels),
          kernel_(kernel),
          pool_(pool),
          group_(std::min(kChannelGroup, channels.num_channels)),
          sent_(filled(group_ * voxels.num_voxels, 0.0f, pool)),
          received_(filled(group_ * voxels.num_voxels, 0.0f, pool)),
          senders_(filled(voxels.num_voxels, uint8_t{0}, pool)),
          receivers_(filled(voxels.num_voxels, uint8_t{0}, pool)),
          pieces_(set.num_active()) {
        const Tiling& tiling = set.tiling;
        first_run_ = voxels.first_runs(tiling.shape[0] * tiling.shape[1],
                                       [&](const Run& run) { return run.grid / tiling.shape[2]; });
        pool.run(set.num_active(), [&](int64_t item, int) {
            for_pieces(set.active[item], [&](int64_t voxel, int64_t place, int64_t length) {
                const int64_t row = item * tiling.tile_rows() + place / kLanes;
                pieces_[item].push_back({voxel, place, length, row,
                                         static_cast<LaneMask>(open[row] >> place % kLanes) != 0});
            });
        });
        find_tiles_of_groups();
        kernel.filter->senders = senders_.get();
        kernel.filter->receivers = receivers_.get();
    }

    // The filter outlives this run, whose marks are freed.
    ~ChannelTileFilter() override {
        kernel_.filter->senders = nullptr;
        kernel_.filter->receivers = nullptr;
    }

    void accumulate(const SentVoxels& sent, const LaneMask* /*open*/, const float* label_weight,
                    float* message) override {
        if (!sent.from_settled &&
            !any_marked(sent.voxels, set_.num_active() * set_.tiling.tile_rows()))
            return;
        // For the last channel, the message of changes that sum to zero over the labels follows
        // from the others.
        const int num_filtered = channels_.num_channels - (sent.sums_to_zero ? 1 : 0);
        if (sent.sums_to_zero && !rest_) rest_ = filled(voxels_.num_voxels, 0.0f, pool_);
        for (int first = 0; first < channels_.num_channels; first += kChannelGroup) {
            const int count = std::min(kChannelGroup, channels_.num_channels - first);
            const int filtered = std::min(count, num_filtered - first);
            put(sent, first, filtered, false);
            expect(first, count, true);
            if (filtered > 0)
                kernel_.accumulate(sent_.get(), filtered, nullptr, received_.get(), workspace_);
            put(sent, first, filtered, true);
            take(first, count, filtered, sent.sums_to_zero, label_weight, message);
            expect(first, count, false);
        }
    }

   private:
    // Consecutive voxels of an active tile.
    struct Piece {
        int64_t voxel, place, length;  // of the first: its number, and its place in the tile
        int64_t row;                   // (active tile, row of the tile)
        bool is_open;                  // whether one of its voxels, or a later one of the row, is
    };

    // The tiles with a label of the group; and those with a label of the last channel, whose
    // message may follow from all others.
    void find_tiles_of_groups() {
        const int last = channels_.num_channels - 1;
        tiles_of_group_.resize(last / kChannelGroup + 1);
        has_last_.assign(set_.num_active(), 0);
        for (int64_t item = 0; item < set_.num_active(); ++item) {
            std::vector<uint8_t> in_group(tiles_of_group_.size(), 0);
            for (int64_t e = set_.first_entry[item]; e < set_.first_entry[item + 1]; ++e) {
                in_group[channels_.of_entry[e] / kChannelGroup] = 1;
                if (channels_.of_entry[e] == last) has_last_[item] = 1;
            }
            for (size_t group = 0; group < in_group.size(); ++group)
                if (in_group[group] || has_last_[item]) tiles_of_group_[group].push_back(item);
        }
    }

    template <class Body>
    void for_tiles_of(int first, Body&& body) {
        const std::vector<int64_t>& items = tiles_of_group_[first / kChannelGroup];
        pool_.run(static_cast<int64_t>(items.size()), [&](int64_t i, int) { body(items[i]); });
    }

    // Writes the sent values of some channels, or zeros to the same places: elsewhere there
    // are zeros always.
    void put(const SentVoxels& sent, int first, int count, bool clear) {
        const int64_t num_voxels = voxels_.num_voxels;
        const int64_t tile_voxels = set_.tiling.tile_voxels();
        const int64_t num_rows = set_.tiling.tile_rows();
        for_tiles_of(first, [&](int64_t item) {
            for (int64_t e = set_.first_entry[item]; e < set_.first_entry[item + 1]; ++e) {
                const int channel = channels_.of_entry[e] - first;
                if (channel < 0 || channel >= count) continue;
                float* const to = sent_.get() + channel * num_voxels;
                for (const Piece& piece : pieces_[item]) {
                    if (!sent.voxels[piece.row] || !sent.labels[(e - item) * num_rows + piece.row])
                        continue;
                    std::fill_n(senders_.get() + piece.voxel, piece.length, uint8_t{!clear});
                    if (clear) {
                        std::fill_n(to + piece.voxel, piece.length, 0.0f);
                    } else {
                        std::copy_n(sent.values + e * tile_voxels + piece.place, piece.length,
                                    to + piece.voxel);
                    }
                }
            }
        });
        if (!sent.from_settled) return;
        pool_.run(set_.tiling.num_tiles(), [&](int64_t tile, int) {
            if (set_.index[tile] >= 0 || set_.settled[tile] < 0) return;
            const int channel = channels_.of_settled[tile] - first;
            if (channel < 0 || channel >= count) return;
            for_pieces(tile, [&](int64_t voxel, int64_t, int64_t length) {
                std::fill_n(senders_.get() + voxel, length, uint8_t{!clear});
                std::fill_n(sent_.get() + channel * num_voxels + voxel, length,
                            clear ? 0.0f : 1.0f);
            });
        });
    }

    // Marks the rows with a voxel that receives in some channels, and clears what a filter will add
    // to; or marks none.
    void expect(int first, int count, bool mark) {
        for_tiles_of(first, [&](int64_t item) {
            for (const Piece& piece : pieces_[item]) {
                if (!piece.is_open) continue;
                std::fill_n(receivers_.get() + piece.voxel, piece.length, uint8_t{mark});
                for (int c = 0; mark && c < count; ++c)
                    std::fill_n(received_.get() + c * voxels_.num_voxels + piece.voxel,
                                piece.length, 0.0f);
            }
        });
    }

    // Adds the received values of some channels to the messages.
    void take(int first, int count, int filtered, bool sums_to_zero, const float* label_weight,
              float* message) {
        const int64_t num_voxels = voxels_.num_voxels, tile_voxels = set_.tiling.tile_voxels();
        for_tiles_of(first, [&](int64_t item) {
            for (const Piece& piece : pieces_[item]) {
                if (!piece.is_open) continue;
                if (sums_to_zero && has_last_[item]) follow(piece, count, filtered);
                for (int64_t e = set_.first_entry[item]; e < set_.first_entry[item + 1]; ++e) {
                    const int channel = channels_.of_entry[e] - first;
                    if (channel < 0 || channel >= count) continue;
                    const float weight = label_weight[set_.label[e]];
                    const float* const from = received_.get() + channel * num_voxels + piece.voxel;
                    float* const to = message + e * tile_voxels + piece.place;
                    for (int64_t i = 0; i < piece.length; ++i) to[i] += weight * from[i];
                }
            }
        });
    }

    // The message of the last channel, if it is one of these: minus the sum of all others.
    void follow(const Piece& piece, int count, int filtered) {
        float* const rest = rest_.get() + piece.voxel;
        for (int c = 0; c < filtered; ++c)
            for (int64_t i = 0; i < piece.length; ++i)
                rest[i] -= received_[c * voxels_.num_voxels + piece.voxel + i];
        if (filtered == count) return;
        std::copy_n(rest, piece.length,
                    received_.get() + filtered * voxels_.num_voxels + piece.voxel);
        std::fill_n(rest, piece.length, 0.0f);
    }

    // Calls body(compact voxel, place among the tile's voxels, length) for the voxels of a tile
    // inside the mask of the filters.
    template <class Body>
    void for_pieces(int64_t number, Body&& body) const {
        set_.tiling.for_rows(number, [&](const TileRow& row) {
            const int64_t of_grid = row.z * set_.tiling.shape[1] + row.y;
            for (int64_t r = first_run_[of_grid]; r < first_run_[of_grid + 1]; ++r) {
                const Run& run = voxels_.runs[r];
                const int64_t begin = std::max(row.grid, run.grid);
                const int64_t end = std::min(row.grid + row.length, run.grid + run.length);
                if (begin < end)
                    body(run.voxel + begin - run.grid, row.place + begin - row.grid, end - begin);
            }
        });
    }

    const TileSet& set_;
    const TileChannels& channels_;
    const Voxels& voxels_;
    Kernel& kernel_;
    ThreadPool& pool_;
    const int group_;                 // channels that are filtered together
    std::vector<int64_t> first_run_;  // (row of the grid + 1)
    Buffer<float> sent_;              // (channel of a group, compact voxel), zero between calls
    Buffer<float> received_;  // (channel of a group, compact voxel), anything finite between calls
    Buffer<float> rest_;      // (compact voxel) minus what the channels so far received
    Buffer<uint8_t> senders_,
        receivers_;  // (compact voxel) whether it sends, or receives, in the group at work
    std::vector<std::vector<Piece>> pieces_;  // of each active tile
    // active tiles that a group of channels is needed in
    std::vector<std::vector<int64_t>> tiles_of_group_;
    std::vector<uint8_t> has_last_;  // (active tile) whether a label of it has the last channel
    Workspace workspace_;
};
}  // namespace

std::unique_ptr<TileFilter> make_channel_tile_filter(const TileSet& set,
                                                     const TileChannels& channels,
                                                     const Voxels& voxels, const LaneMask* open,
                                                     Kernel& kernel, ThreadPool& pool) {
    return std::make_unique<ChannelTileFilter>(set, channels, voxels, open, kernel, pool);
}
}  // namespace crf
