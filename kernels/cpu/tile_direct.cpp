// Direct sums between the voxels of tiles, brick by brick: the labels that a brick and its
// surroundings send and receive are summed four at a time.

#include "cpu/brick_pairs.h"
#include "cpu/tile_filter.h"

namespace crf {
namespace {
std::unique_ptr<BrickSum> make_sums(const TileSet& set, const DirectKernel& kernel,
                                    ThreadPool& pool) {
    const Tiling& tiling = set.tiling;
    const Extents& grid = tiling.shape;
    if (kernel.intensity.empty()) return make_separable_sum(grid, kernel.sigma, pool);
    int64_t inside = 0;
    while (inside + 1 < tiling.num_voxels() && !set.is_inside(inside)) ++inside;
    PairKernel pairs{.shape = {grid.begin(), grid.end()},
                     .stride = {grid[1] * grid[2], grid[2], 1},
                     .sigma = kernel.sigma,
                     .intensity = kernel.intensity,
                     .theta_beta = kernel.theta_beta,
                     .zero = {}};
    for (const float* intensity : kernel.intensity) pairs.zero.push_back(intensity[inside]);
    return std::make_unique<PairSum>(pairs, pool);
}

class DirectTileFilter final : public TileFilter {
   public:
    DirectTileFilter(const TileSet& set, const LaneMask* open, const DirectKernel& kernel,
                     Normalization normalization, ThreadPool& pool)
        : set_(set),
          tiling_(set.tiling),
          pool_(pool),
          scales_sent_(normalization == Normalization::kSymmetric),
          sums_(make_sums(set, kernel, pool)),
          voxels_(tiling_.tile_voxels()),
          num_rows_(tiling_.tile_rows()),
          is_open_(set.num_active()),
          sends_(set.num_entries()) {
        for (int64_t item = 0; item < set.num_active(); ++item)
            is_open_[item] = any_marked(open + item * num_rows_, num_rows_);
        normalize(open);
    }

    void accumulate(const SentVoxels& sent, const LaneMask* open, const float* label_weight,
                    float* message) override {
        pool_.run(set_.num_active(), [&](int64_t item, int) {
            for (int64_t e = set_.first_entry[item]; e < set_.first_entry[item + 1]; ++e) {
                sends_[e] = 0;
                for (int64_t row = 0; row < num_rows_; ++row)
                    sends_[e] |= sent.voxels[item * num_rows_ + row] && sends(sent, e, row);
            }
        });
        sums_->for_bricks([&](const BrickRegion& region, BrickMemory& memory) {
            const std::vector<int32_t> labels = list_labels(region, sent);
            for (size_t first = 0; first < labels.size(); first += kChannelGroup) {
                const size_t left = labels.size() - first;
                const Group group{labels.data() + first,
                                  static_cast<int>(std::min<size_t>(kChannelGroup, left))};
                scatter(region, sent, open, group, memory);
                if (sums_->sum(group.count, region, memory))
                    gather(region, memory, open, group, label_weight, message);
                memory.clear(group.count);
            }
        });
    }

   private:
    // Labels that are summed together, each in the channel of its number.
    struct Group {
        const int32_t* labels;
        int count;

        int channel(int32_t label) const {
            return static_cast<int>(std::find(labels, labels + count, label) - labels);
        }
        bool has(int channel) const { return channel < count; }
    };

    bool sends(const SentVoxels& sent, int64_t entry, int64_t row) const {
        return sent.labels[entry * num_rows_ + row];
    }

    // Calls body(tile) for the tiles that a region overlaps.
    template <class Body>
    void for_tiles(const BrickRegion& region, Body&& body) const {
        tiling_.for_tiles(region.first, region.last, body);
    }

    // Calls body(row, its place in memory) for the rows of a tile that are in a region.
    template <class Body>
    void for_rows(const BrickRegion& region, int64_t tile, Body&& body) const {
        tiling_.for_rows(tile, [&](const TileRow& row) {
            if (row.z >= region.first[0] && row.z < region.last[0] && row.y >= region.first[1] &&
                row.y < region.last[1])
                body(row, region.place(row.z, row.y, row.x));
        });
    }

    // The labels that a tile of the region sends, and one with open voxels has: those of most
    // tiles first, as labels that are summed together should be in the same places.
    std::vector<int32_t> list_labels(const BrickRegion& region, const SentVoxels& sent) const {
        struct Found {
            int32_t label;
            int num_senders;
            bool is_needed;
        };
        std::vector<Found> found;
        const auto add = [&](int32_t label, bool sends, bool is_needed) {
            auto at = std::find_if(found.begin(), found.end(),
                                   [&](const Found& own) { return own.label == label; });
            if (at == found.end()) at = found.insert(at, {label, 0, false});
            at->num_senders += sends;
            at->is_needed |= is_needed;
        };
        for_tiles(region, [&](int64_t tile) {
            const int64_t item = set_.index[tile];
            if (item < 0) {
                if (sent.from_settled && set_.settled[tile] >= 0)
                    add(set_.settled[tile], true, false);
                return;
            }
            for (int64_t e = set_.first_entry[item]; e < set_.first_entry[item + 1]; ++e)
                add(set_.label[e], sends_[e], is_open_[item]);
        });
        std::erase_if(found, [](const Found& own) { return !own.is_needed || !own.num_senders; });
        std::stable_sort(found.begin(), found.end(), [](const Found& p, const Found& q) {
            return p.num_senders > q.num_senders;
        });
        std::vector<int32_t> labels;
        for (const Found& own : found) labels.push_back(own.label);
        return labels;
    }

    void scatter(const BrickRegion& region, const SentVoxels& sent, const LaneMask* open,
                 const Group& group, BrickMemory& memory) const {
        for_tiles(region, [&](int64_t tile) {
            const int64_t item = set_.index[tile];
            const float* const scale = scales_sent_ ? scale_of(tile) : nullptr;
            // Nothing that a tile without factors sends is received.
            const bool is_heard = !scales_sent_ || scale;
            if (item < 0) {
                const int c = group.channel(set_.settled[tile]);
                if (sent.from_settled && is_heard && group.has(c))
                    send_all(region, tile, c, scale, memory);
                return;
            }
            for (int64_t e = set_.first_entry[item]; e < set_.first_entry[item + 1]; ++e) {
                const int c = group.channel(set_.label[e]);
                if (!group.has(c) || !(sends_[e] || is_open_[item])) continue;
                for_rows(region, tile, [&](const TileRow& row, const BrickPlace& at) {
                    if (open[item * num_rows_ + row.number]) memory.receive(c, at);
                    if (!is_heard || !sent.voxels[item * num_rows_ + row.number] ||
                        !sends(sent, e, row.number))
                        return;
                    const vfloat values = load(sent.values + e * voxels_ + row.place);
                    memory.send(c, at, scale ? values * load(scale + row.place) : values);
                });
            }
        });
    }

    // The voxels of a tile inside the mask send 1, or their factor.
    void send_all(const BrickRegion& region, int64_t tile, int channel, const float* scale,
                  BrickMemory& memory) const {
        for_rows(region, tile, [&](const TileRow& row, const BrickPlace& at) {
            const LaneMask inside = set_.lanes_inside(row);
            const vfloat one = scale ? load(scale + row.place) : splat_lanes(1.0f);
            if (inside) memory.send(channel, at, select(lanes_of(inside), one, vfloat{}));
        });
    }

    void gather(const BrickRegion& region, const BrickMemory& memory, const LaneMask* open,
                const Group& group, const float* label_weight, float* message) const {
        for_tiles(region, [&](int64_t tile) {
            const int64_t item = set_.index[tile];
            if (item < 0 || !is_open_[item]) return;
            const float* const scale = scale_of(tile);
            for (int64_t e = set_.first_entry[item]; e < set_.first_entry[item + 1]; ++e) {
                const int c = group.channel(set_.label[e]);
                if (!group.has(c)) continue;
                const float weight = label_weight[set_.label[e]];
                for_rows(region, tile, [&](const TileRow& row, const BrickPlace& at) {
                    if (!open[item * num_rows_ + row.number] || !memory.has_result(c, at)) return;
                    float* const to = message + e * voxels_ + row.place;
                    const vfloat factor = load(scale + row.place) * weight;
                    store(to, load(to) + memory.result(c, at) * factor);
                });
            }
        });
    }

    // (voxel of the tile) the factors of the normalization, or nullptr where none is needed.
    const float* scale_of(int64_t tile) const {
        return scaled_[tile] < 0 ? nullptr : scale_.get() + scaled_[tile] * voxels_;
    }

    // Finds the factors at rows that receive, or send to them.
    void normalize(const LaneMask* open) {
        // (row of the grid, tile along it)
        const int64_t num_columns = tiling_.count[2];
        const auto place = [&](const TileRow& row) {
            return (row.z * tiling_.shape[1] + row.y) * num_columns + row.x / kLanes;
        };
        std::vector<uint8_t> needed(tiling_.shape[0] * tiling_.shape[1] * num_columns);
        for (int64_t item = 0; item < set_.num_active(); ++item)
            tiling_.for_rows(set_.active[item], [&](const TileRow& row) {
                if (open[item * num_rows_ + row.number]) needed[place(row)] = 1;
            });
        if (scales_sent_) widen(needed);

        scaled_.assign(tiling_.num_tiles(), -1);
        int64_t num_scaled = 0;
        for (int64_t tile = 0; tile < tiling_.num_tiles(); ++tile) {
            bool any = false;
            tiling_.for_rows(tile, [&](const TileRow& row) { any |= needed[place(row)] != 0; });
            if (any) scaled_[tile] = num_scaled++;
        }
        scale_ = Buffer<float>(num_scaled * voxels_);
        std::fill_n(scale_.get(), scale_.size, 0.0f);
        sums_->for_bricks([&](const BrickRegion& region, BrickMemory& memory) {
            bool any = false;
            for_tiles(region, [&](int64_t tile) { any |= scaled_[tile] >= 0; });
            if (!any) return;
            for_tiles(region, [&](int64_t tile) {
                send_all(region, tile, 0, nullptr, memory);
                for_rows(region, tile, [&](const TileRow& row, const BrickPlace& at) {
                    if (needed[place(row)]) memory.receive(0, at);
                });
            });
            if (sums_->sum(1, region, memory)) add_sums(region, memory);
            memory.clear(1);
        });
        // A voxel inside the mask counts itself with weight 1; the others do not matter.
        for (int64_t i = 0; i < scale_.size; ++i) {
            const float inverse = scale_[i] >= 0.5f ? 1 / scale_[i] : 0.0f;
            scale_[i] = scales_sent_ ? std::sqrt(inverse) : inverse;
        }
    }

    // Marks the rows of tiles from which a marked one is within reach.
    void widen(std::vector<uint8_t>& marks) const {
        const Extents& reach = sums_->layout().after;
        const Extents away = {reach[0], reach[1], divided_up(reach[2], kLanes)};
        const Extents count = {tiling_.shape[0], tiling_.shape[1], tiling_.count[2]};
        int64_t step = 1;
        for (int a = 2; a >= 0; --a) {
            const std::vector<uint8_t> own = marks;
            for (int64_t i = 0; i < static_cast<int64_t>(own.size()); ++i) {
                if (!own[i]) continue;
                const int64_t at = i / step % count[a];
                const int64_t end = std::min(away[a], count[a] - 1 - at);
                for (int64_t k = -std::min(away[a], at); k <= end; ++k) marks[i + k * step] = 1;
            }
            step *= count[a];
        }
    }

    // Adds the row sums that a brick has found.
    void add_sums(const BrickRegion& region, const BrickMemory& memory) {
        for_tiles(region, [&](int64_t tile) {
            if (scaled_[tile] < 0) return;
            for_rows(region, tile, [&](const TileRow& row, const BrickPlace& at) {
                if (!memory.has_result(0, at)) return;
                float* const to = scale_.get() + scaled_[tile] * voxels_ + row.place;
                store(to, load(to) + memory.result(0, at));
            });
        });
    }

    const TileSet& set_;
    const Tiling& tiling_;
    ThreadPool& pool_;
    const bool scales_sent_;
    const std::unique_ptr<BrickSum> sums_;
    const int64_t voxels_, num_rows_;  // of a tile
    std::vector<uint8_t> is_open_;     // (active tile) whether a voxel of it receives
    std::vector<uint8_t> sends_;       // (entry)
    std::vector<int64_t> scaled_;      // (tile) its place in `scale_`, or -1
    Buffer<float> scale_;  // (tile near open voxels, voxel) factors of the normalization
};
}  // namespace

std::unique_ptr<TileFilter> make_direct_tile_filter(const TileSet& set, const LaneMask* open,
                                                    const DirectKernel& kernel,
                                                    Normalization normalization, ThreadPool& pool) {
    return std::make_unique<DirectTileFilter>(set, open, kernel, normalization, pool);
}
}  // namespace crf
