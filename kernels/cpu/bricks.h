// Sums over the surroundings of voxels, brick by brick: a thread copies the values that voxels of a
// brick and around it send into its own memory, sums there, and adds what they received to the
// result. Bricks that have voxels in common take turns, in an order that only the grid sets.
#pragma once

#include "cpu/buffer.h"
#include "cpu/filter.h"
#include "cpu/simd.h"

namespace crf {
// Rows of a brick that are summed together: each loaded neighbor serves both.
constexpr int kPairRows = 2;

// Large enough for most of a brick and its surroundings to be the brick, small enough for the
// planes within reach of one of them to stay in the L2 cache.
constexpr Extents kBrick = {16, 32, 8 * kLanes};
constexpr int64_t kMostUnits = 64;  // of a row

// How bricks cut a grid, and how the memory of a thread is laid out: the voxels of a brick and
// those within reach, in rows of whole units, which are marked together.
struct BrickLayout {
    typedef uint64_t Units;  // a bit for each unit of a row

    // size: of the grid; reach_before, reach_after: voxels within reach on either side.
    BrickLayout(const Extents& size, const Extents& reach_before, const Extents& reach_after)
        : grid(size), before(reach_before), after(reach_after) {
        unit = kLanes;
        while (whole(kBrick[2], unit) + whole(before[2], unit) + whole(after[2], unit) >
               kMostUnits * unit)
            unit += kLanes;
        const Extents step = {1, kPairRows, unit};
        for (int a = 0; a < 3; ++a) {
            brick[a] = std::min(whole(kBrick[a], step[a]), whole(grid[a], step[a]));
            count[a] = divided_up(grid[a], brick[a]);
        }
        before[2] = whole(before[2], unit);
        after[2] = whole(after[2], unit);
        for (int a = 0; a < 3; ++a) turns[a] = 1 + divided_up(before[a] + after[a], brick[a]);
        row_length = before[2] + brick[2] + after[2];
        plane_rows = before[1] + brick[1] + after[1];
        num_rows = plane_rows * (before[0] + brick[0] + after[0]);
        // Channels a multiple of 4 KiB apart would share the sets of the L1 cache; these are 17 of
        // its lines beyond that.
        channel_length = whole(num_rows * row_length, 1024) + 17 * kLanes;
        own = ((Units{1} << (brick[2] / unit)) - 1) << (before[2] / unit);
    }

    Extents grid, brick, count;  // voxels of the grid, and of a brick; bricks
    Extents before, after;       // voxels around a brick; whole units along rows
    Extents turns;               // bricks so many apart have no voxel in common
    int64_t unit;                // voxels, whole vectors
    int64_t row_length, plane_rows, num_rows;
    int64_t channel_length;  // from one channel to the next
    Units own;               // the units of the brick

    // The row of a plane and a row of the brick, or around it.
    int64_t row(int64_t plane, int64_t row) const {
        return (plane + before[0]) * plane_rows + row + before[1];
    }
};

// Where a vector of voxels is in the memory of a thread.
struct BrickPlace {
    int64_t row, unit, voxel;
};

// The voxels of a brick, [begin, end) along each axis of the grid, and those within reach as well,
// [first, last).
struct BrickRegion {
    BrickRegion(const BrickLayout& of_grid, const Extents& place)
        : layout(of_grid),
          number((place[0] * layout.count[1] + place[1]) * layout.count[2] + place[2]) {
        for (int a = 0; a < 3; ++a) {
            begin[a] = place[a] * layout.brick[a];
            end[a] = std::min(layout.grid[a], begin[a] + layout.brick[a]);
            first[a] = std::max<int64_t>(0, begin[a] - layout.before[a]);
            last[a] = std::min(layout.grid[a], begin[a] + layout.brick[a] + layout.after[a]);
        }
    }

    const BrickLayout& layout;
    int64_t number;  // of the brick
    Extents begin, end, first, last;

    BrickPlace place(int64_t plane, int64_t row, int64_t x) const {
        const int64_t column = x - begin[2] + layout.before[2];
        const int64_t own = layout.row(plane - begin[0], row - begin[1]);
        return {own, column / layout.unit, own * layout.row_length + column};
    }
};

// The memory of a thread. Between sums nothing is marked, and what channels send and receive is 0.
struct BrickMemory {
    typedef BrickLayout::Units Units;

    struct Channel {
        float *sent, *received;
        // (row) which units send, and which need a result; and those of which a unit is within
        // reach, at the same place or a later one.
        std::vector<Units> sends, receives, reach_senders, reach_receivers;
    };

    explicit BrickMemory(const BrickLayout& of_grid)
        : layout(of_grid),
          touched(layout.num_rows),
          values_(2 * kChannelGroup * layout.channel_length) {
        std::fill_n(values_.get(), values_.size, 0.0f);
        float* next = values_.get();
        for (Channel& channel : channels) {
            channel.sent = next;
            channel.received = next + layout.channel_length;
            next += 2 * layout.channel_length;
            for (std::vector<Units>* marks : {&channel.sends, &channel.receives,
                                              &channel.reach_senders, &channel.reach_receivers})
                marks->assign(layout.num_rows, 0);
        }
    }

    const BrickLayout& layout;
    Channel channels[kChannelGroup];
    std::vector<uint8_t> touched;    // (row) a bit for each channel that may have received there
    Buffer<float> others;            // channels of whatever else a sum needs
    std::vector<uint8_t> has_image;  // (row) whether the intensities of the brick at work are there

    void send(int channel, const BrickPlace& at, const vfloat& values, int64_t count = kLanes) {
        store_some(channels[channel].sent + at.voxel, values, count);
        channels[channel].sends[at.row] |= Units{1} << at.unit;
    }
    void receive(int channel, const BrickPlace& at) {
        channels[channel].receives[at.row] |= Units{1} << at.unit;
    }
    bool is_marked(int num_channels, int64_t row) const {
        Units any = 0;
        for (int c = 0; c < num_channels; ++c)
            any |= channels[c].sends[row] | channels[c].receives[row];
        return any != 0;
    }
    bool has_result(int channel, const BrickPlace& at) const {
        return (touched[at.row] >> channel & 1) &&
               (channels[channel].receives[at.row] >> at.unit & 1);
    }
    vfloat result(int channel, const BrickPlace& at) const {
        return load(channels[channel].received + at.voxel);
    }
    // Room for more channels, which are 0 at first.
    float* other_channels(int64_t count) {
        if (others.size < count * layout.channel_length) {
            others.grow(count * layout.channel_length);
            std::fill_n(others.get(), others.size, 0.0f);
        }
        return others.get();
    }

    void clear(int num_channels) {
        const int64_t length = layout.row_length;
        for (int c = 0; c < num_channels; ++c) {
            Channel& channel = channels[c];
            for (int64_t row = 0; row < layout.num_rows; ++row) {
                if (channel.sends[row]) std::fill_n(channel.sent + row * length, length, 0.0f);
                if (touched[row] >> c & 1)
                    std::fill_n(channel.received + row * length, length, 0.0f);
                channel.sends[row] = channel.receives[row] = 0;
            }
        }
        std::fill(touched.begin(), touched.end(), uint8_t{0});
    }

   private:
    Buffer<float> values_;
};

class BrickSum {
   public:
    BrickSum(const BrickLayout& layout, ThreadPool& pool)
        : layout_(layout), pool_(pool), memory_(pool.num_threads()) {}
    virtual ~BrickSum() = default;

    const BrickLayout& layout() const { return layout_; }
    int64_t num_bricks() const { return layout_.count[0] * layout_.count[1] * layout_.count[2]; }

    // Calls body(region, memory) for all bricks; those at work at the same time have no voxel in
    // common.
    void for_bricks(FunctionRef<const BrickRegion&, BrickMemory&> body) {
        const Extents& turns = layout_.turns;
        for (int64_t turn = 0; turn < turns[0] * turns[1] * turns[2]; ++turn) {
            const Extents first = {turn / (turns[1] * turns[2]), turn / turns[2] % turns[1],
                                   turn % turns[2]};
            Extents count;
            for (int a = 0; a < 3; ++a)
                count[a] = divided_up(std::max<int64_t>(0, layout_.count[a] - first[a]), turns[a]);
            pool_.run(count[0] * count[1] * count[2], [&](int64_t item, int thread) {
                const Extents number = {first[0] + item / (count[1] * count[2]) * turns[0],
                                        first[1] + item / count[2] % count[1] * turns[1],
                                        first[2] + item % count[2] * turns[2]};
                std::unique_ptr<BrickMemory>& memory = memory_[thread];
                if (!memory) memory = std::make_unique<BrickMemory>(layout_);
                memory->has_image.assign(layout_.num_rows, 0);
                body(BrickRegion(layout_, number), *memory);
            });
        }
    }

    // Sums the sent values of the first channels; false if nothing is received.
    virtual bool sum(int num_channels, const BrickRegion& region, BrickMemory& memory) const = 0;

   private:
    const BrickLayout layout_;
    ThreadPool& pool_;
    std::vector<std::unique_ptr<BrickMemory>> memory_;  // (thread)
};

// The separable sum of the spatial filter (spatial_rows.h). sigma: standard deviations in voxels.
std::unique_ptr<BrickSum> make_separable_sum(const Extents& grid, const std::vector<double>& sigma,
                                             ThreadPool& pool);
}  // namespace crf
