// The separable sum of the spatial filter by bricks: along rows where voxels send, then across
// rows, then across planes.
#include "cpu/bricks.h"
#include "cpu/spatial_rows.h"

namespace crf {
namespace {
Extents reach_of(const std::vector<SpatialTaps>& taps) {
    Extents reach;
    for (int a = 0; a < 3; ++a) reach[a] = static_cast<int64_t>(taps[a].weight.size()) - 1;
    return reach;
}

class SeparableSum final : public BrickSum {
   public:
    SeparableSum(const Extents& grid, const std::vector<SpatialTaps>& taps, ThreadPool& pool)
        : BrickSum(BrickLayout(grid, reach_of(taps), reach_of(taps)), pool) {
        for (int a = 0; a < 3; ++a) weight_[a].assign(taps[a].weight.begin(), taps[a].weight.end());
    }

    bool sum(int num_channels, const BrickRegion& region, BrickMemory& memory) const override {
        float* const along_rows = memory.other_channels(2);
        float* const across_rows = along_rows + layout().channel_length;
        bool any = false;
        for (int c = 0; c < num_channels; ++c) {
            const BrickMemory::Channel& channel = memory.channels[c];
            std::vector<uint8_t> sends(layout().num_rows), passes(layout().num_rows);
            for (int64_t row = 0; row < layout().num_rows; ++row) {
                sends[row] = channel.sends[row] != 0;
                if (sends[row])
                    sum_row(channel.sent + row * layout().row_length,
                            along_rows + row * layout().row_length);
            }
            const int64_t num_planes = layout().num_rows / layout().plane_rows;
            const int64_t own_rows = region.end[1] - region.begin[1];
            for (int64_t plane = 0; plane < num_planes; ++plane)
                for (int64_t y = 0; y < own_rows; ++y) {
                    const int64_t row = layout().row(plane - layout().before[0], y);
                    passes[row] = add_rows(along_rows, sends, row, 1, weight_[1], across_rows);
                }
            for (int64_t plane = 0; plane < region.end[0] - region.begin[0]; ++plane)
                for (int64_t y = 0; y < own_rows; ++y) {
                    const int64_t row = layout().row(plane, y);
                    if (!channel.receives[row] ||
                        !add_rows(across_rows, passes, row, layout().plane_rows, weight_[0],
                                  channel.received))
                        continue;
                    memory.touched[row] |= static_cast<uint8_t>(1 << c);
                    any = true;
                }
        }
        return any;
    }

   private:
    // The brick's voxels of a row, from voxels of the row.
    void sum_row(const float* from, float* to) const {
        const std::vector<float>& weight = weight_[2];
        const int64_t first = layout().before[2];
        for (int64_t x = first; x < first + layout().brick[2]; x += kLanes) {
            vfloat total = load(from + x) * weight[0];
            for (int64_t k = 1; k < static_cast<int64_t>(weight.size()); ++k)
                total += (load(from + x - k) + load(from + x + k)) * weight[k];
            store(to + x, total);
        }
    }

    // The same from other rows, every `step`-th one, which hold anything; false if none does.
    bool add_rows(const float* from, const std::vector<uint8_t>& holds, int64_t row, int64_t step,
                  const std::vector<float>& weight, float* to) const {
        const int64_t reach = static_cast<int64_t>(weight.size()) - 1;
        const int64_t first = layout().before[2], length = layout().row_length;
        bool any = false;
        for (int64_t k = -reach; k <= reach; ++k) {
            const int64_t other = row + k * step;
            if (!holds[other]) continue;
            const float* const its = from + other * length;
            float* const own = to + row * length;
            if (!any) std::fill_n(own + first, layout().brick[2], 0.0f);
            for (int64_t x = first; x < first + layout().brick[2]; x += kLanes)
                store(own + x, load(own + x) + load(its + x) * weight[std::abs(k)]);
            any = true;
        }
        return any;
    }

    std::vector<float> weight_[3];
};
}  // namespace

std::unique_ptr<BrickSum> make_separable_sum(const Extents& grid, const std::vector<double>& sigma,
                                             ThreadPool& pool) {
    return std::make_unique<SeparableSum>(grid, spatial_taps(sigma, {grid[0], grid[1], grid[2]}),
                                          pool);
}
}  // namespace crf
