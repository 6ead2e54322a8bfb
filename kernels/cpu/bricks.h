// Sums over the surroundings of voxels, brick by brick: a thread copies the values that voxels of a
// brick and around it send into its own memory, sums there, and adds what they received to the
// result. Bricks that have voxels in common take turns, in an order that only the grid sets.
#pragma once

#include <array>

#include "cpu/buffer.h"
#include "cpu/filter.h"
#include "cpu/simd.h"

namespace crf {
// Rows of a brick that are summed together: each loaded neighbor serves both.
constexpr int kPairRows = 2;

// Along planes, rows of a plane, and voxels of a row.
typedef std::array<int64_t, 3> BrickExtents;

// How bricks cut a grid, and how the memory of a thread is laid out: the voxels of a brick and
// those within reach, in rows of whole units, which are marked together.
struct BrickLayout {
    typedef uint64_t Units;  // a bit for each unit of a row

    // before, after: voxels within reach on either side.
    BrickLayout(const BrickExtents& grid, const BrickExtents& before, const BrickExtents& after);

    BrickExtents grid, brick, count;  // voxels of the grid, and of a brick; bricks
    BrickExtents before, after;       // voxels around a brick; whole units along rows
    BrickExtents turns;               // bricks so many apart have no voxel in common
    int64_t unit;                     // voxels, whole vectors
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
    BrickRegion(const BrickLayout& layout, const BrickExtents& number);

    const BrickLayout& layout;
    int64_t number;  // of the brick
    BrickExtents begin, end, first, last;

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

    explicit BrickMemory(const BrickLayout& layout);

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
    float* other_channels(int64_t count);

    void clear(int num_channels);

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
    void for_bricks(FunctionRef<const BrickRegion&, BrickMemory&> body);

    // Sums the sent values of the first channels; false if nothing is received.
    virtual bool sum(int num_channels, const BrickRegion& region, BrickMemory& memory) const = 0;

   private:
    const BrickLayout layout_;
    ThreadPool& pool_;
    std::vector<std::unique_ptr<BrickMemory>> memory_;  // (thread)
};

// The separable sum of the spatial filter (spatial_rows.h). sigma: standard deviations in voxels.
std::unique_ptr<BrickSum> make_separable_sum(const BrickExtents& grid,
                                             const std::vector<double>& sigma, ThreadPool& pool);
}  // namespace crf
