#include "cpu/window_occupancy.h"

#include <algorithm>

namespace crf {

namespace {

// to[i] |= from[i - back] ... from[i + ahead] along an axis of the blocks.
void spread(const WindowBlocks& blocks, int axis, int64_t back, int64_t ahead, const uint8_t* from, uint8_t* to) {
    const int64_t length = blocks.count[axis], inner = blocks.stride[axis], plane = length * inner;
    for (int64_t begin = 0; begin < blocks.total; begin += plane)
        for (int64_t i = 0; i < length; ++i)
            for (int64_t j = std::max<int64_t>(0, i - back); j <= std::min(length - 1, i + ahead); ++j)
                for (int64_t k = 0; k < inner; ++k) to[begin + i * inner + k] |= from[begin + j * inner + k];
}

bool any(const float* values, int64_t count) {
    int found = 0;
    for (int64_t i = 0; i < count; ++i) found |= values[i] != 0.0f ? 1 : 0;
    return found != 0;
}

}  // namespace

WindowOccupancy::WindowOccupancy(const WindowPlan& plan, int num_channels)
    : plan_(plan), paired_(num_channels * plan.blocks.total), receives_(num_channels * plan.blocks.total) {}

void WindowOccupancy::find(int channel, const Voxels& voxels, const float* padded) {
    const WindowBlocks& blocks = plan_.blocks;
    std::vector<uint8_t> sent(blocks.total), wider(blocks.total);
    for (size_t r = 0; r < voxels.runs.size(); ++r) {
        const int64_t begin = plan_.padded_run[r], end = begin + voxels.runs[r].length;
        int64_t block = plan_.run_block[r];
        for (int64_t place = begin; place < end; ++block) {
            const int64_t next = std::min(end, (place / kLanes + 1) * kLanes);
            if (!sent[block] && any(padded + place, next - place)) sent[block] = 1;
            place = next;
        }
    }
    for (int a = 1; a < blocks.num_axes; ++a) {
        wider = sent;
        spread(blocks, a, blocks.reach[a], blocks.reach[a], sent.data(), wider.data());
        std::swap(sent, wider);
    }
    // A voxel is paired with later ones along the first axis, and receives from earlier ones too.
    uint8_t *const paired = paired_.data() + channel * blocks.total, *const receives = receives_.data() + channel * blocks.total;
    std::fill(paired, paired + blocks.total, uint8_t{0});
    std::fill(receives, receives + blocks.total, uint8_t{0});
    spread(blocks, 0, 0, blocks.reach[0], sent.data(), paired);
    spread(blocks, 0, blocks.reach[0], 0, paired, receives);
}

}  // namespace crf
