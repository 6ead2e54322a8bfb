#include "cpu/bricks.h"

namespace crf {
namespace {
// Small enough for a brick and its surroundings to stay in the L2 cache, large enough for most of
// them to be the brick.
constexpr BrickExtents kBrick = {16, 32, 4 * kLanes};

constexpr int64_t kMostUnits = 64;  // of a row

int64_t divided_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }
int64_t whole(int64_t count, int64_t unit) { return divided_up(count, unit) * unit; }
}  // namespace

BrickLayout::BrickLayout(const BrickExtents& size, const BrickExtents& reach_before,
                         const BrickExtents& reach_after)
    : grid(size), before(reach_before), after(reach_after) {
    unit = kLanes;
    while (whole(kBrick[2], unit) + whole(before[2], unit) + whole(after[2], unit) >
           kMostUnits * unit)
        unit += kLanes;
    const BrickExtents step = {1, kPairRows, unit};
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
    // Channels a multiple of 4 KiB apart would share the sets of the L1 cache; these are 17 of its
    // lines beyond that.
    channel_length = whole(num_rows * row_length, 1024) + 17 * kLanes;
    own = ((Units{1} << (brick[2] / unit)) - 1) << (before[2] / unit);
}

BrickRegion::BrickRegion(const BrickLayout& of_grid, const BrickExtents& place)
    : layout(of_grid),
      number((place[0] * layout.count[1] + place[1]) * layout.count[2] + place[2]) {
    for (int a = 0; a < 3; ++a) {
        begin[a] = place[a] * layout.brick[a];
        end[a] = std::min(layout.grid[a], begin[a] + layout.brick[a]);
        first[a] = std::max<int64_t>(0, begin[a] - layout.before[a]);
        last[a] = std::min(layout.grid[a], begin[a] + layout.brick[a] + layout.after[a]);
    }
}

BrickMemory::BrickMemory(const BrickLayout& of_grid)
    : layout(of_grid),
      touched(layout.num_rows),
      values_(2 * kChannelGroup * layout.channel_length) {
    std::fill_n(values_.get(), values_.size, 0.0f);
    float* next = values_.get();
    for (Channel& channel : channels) {
        channel.sent = next;
        channel.received = next + layout.channel_length;
        next += 2 * layout.channel_length;
        for (std::vector<Units>* marks :
             {&channel.sends, &channel.receives, &channel.reach_senders, &channel.reach_receivers})
            marks->assign(layout.num_rows, 0);
    }
}

float* BrickMemory::other_channels(int64_t count) {
    if (others.size < count * layout.channel_length) {
        others = Buffer<float>();  // freed before more is allocated
        others = Buffer<float>(count * layout.channel_length);
        std::fill_n(others.get(), others.size, 0.0f);
    }
    return others.get();
}

void BrickMemory::clear(int num_channels) {
    const int64_t length = layout.row_length;
    for (int c = 0; c < num_channels; ++c) {
        Channel& channel = channels[c];
        for (int64_t row = 0; row < layout.num_rows; ++row) {
            if (channel.sends[row]) std::fill_n(channel.sent + row * length, length, 0.0f);
            if (touched[row] >> c & 1) std::fill_n(channel.received + row * length, length, 0.0f);
            channel.sends[row] = channel.receives[row] = 0;
        }
    }
    std::fill(touched.begin(), touched.end(), uint8_t{0});
}

void BrickSum::for_bricks(FunctionRef<const BrickRegion&, BrickMemory&> body) {
    const BrickExtents& turns = layout_.turns;
    for (int64_t turn = 0; turn < turns[0] * turns[1] * turns[2]; ++turn) {
        const BrickExtents first = {turn / (turns[1] * turns[2]), turn / turns[2] % turns[1],
                                    turn % turns[2]};
        BrickExtents count;
        for (int a = 0; a < 3; ++a)
            count[a] = divided_up(std::max<int64_t>(0, layout_.count[a] - first[a]), turns[a]);
        pool_.run(count[0] * count[1] * count[2], [&](int64_t item, int thread) {
            const BrickExtents number = {first[0] + item / (count[1] * count[2]) * turns[0],
                                         first[1] + item / count[2] % count[1] * turns[1],
                                         first[2] + item % count[2] * turns[2]};
            std::unique_ptr<BrickMemory>& memory = memory_[thread];
            if (!memory) memory = std::make_unique<BrickMemory>(layout_);
            memory->has_image.assign(layout_.num_rows, 0);
            body(BrickRegion(layout_, number), *memory);
        });
    }
}
}  // namespace crf
