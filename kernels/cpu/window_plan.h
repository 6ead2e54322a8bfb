// The memory access order of the truncated sum: a function of only the mask, the spacing and the
// window. The box is padded so that a neighbor is at a fixed linear distance. Vectors along the
// last axis hold voxels, a few rows at a time.
#pragma once

#include "cpu/simd.h"
#include "cpu/window.h"

namespace crf {
// Rows of voxels that are processed together: each loaded neighbor serves all of them.
constexpr int kRows = 2;

// The exponent where a row has no pair, far below all others: a weight of 0.
constexpr float kNoPair = -1e4f;

struct PlannedOffset {
    int64_t linear;         // distance in the padded box from the voxel of the first row, positive
    float exponent[kRows];  // log2 of the spatial part of the weight, from the voxel of each row
};

// An offset's squared distance along each axis over the bandwidth, apart from the data of
// filtering: only derivatives need it.
struct OffsetDistances {
    float squared[kRows][kMaxAxes]{};
};

// The padded box in blocks of some rows of one vector each, numbered in raster order.
struct WindowBlocks {
    int num_axes = 0;
    int64_t count[kMaxAxes]{}, stride[kMaxAxes]{};
    int64_t reach[kMaxAxes]{};  // blocks on either side that hold all neighbors of a block's voxels
    int64_t total = 0;
};

// A vector of voxels in each of kRows rows.
struct WindowChunk {
    int64_t place;  // of the first row's first voxel in the padded box
    int64_t block;
};

struct WindowPlan {
    int64_t radius[kMaxAxes]{},
        stride[kMaxAxes]{};   // per box axis: of the window, and of the padded box
    int64_t padded_size = 0;  // of the padded box
    int64_t total_size = 0;   // including the places that its last voxels reach beyond it
    int64_t row_stride = 0;   // between rows that are processed together
    int64_t slab_size = 0;
    int64_t num_pairs = 0;  // per voxel
    // where both rows have a pair, then where only the first has one, then only the second
    std::vector<PlannedOffset> offsets;
    int64_t num_of_both = 0, num_of_first = 0;
    std::vector<OffsetDistances> distances;  // of each offset
    std::vector<int64_t> padded_run;         // place of each run in the padded box
    // block of each run's first voxel; the next along the row are the next numbers
    std::vector<int64_t> run_block;
    std::vector<std::vector<WindowChunk>> slabs;  // the vectors to visit, slab by slab
    WindowBlocks blocks;
};

WindowPlan plan_window(const BilateralInput& input);

namespace {
constexpr int64_t kRowsInterleaved = 32;  // see list_offsets

// Rows of a block along every axis but the last: whole groups of rows, and few, because zeros are
// skipped by whole blocks.
constexpr int64_t kBlockRows = 4;
static_assert(kBlockRows % kRows == 0);

int64_t block_extent(const Voxels& voxels, int axis) {
    return axis == voxels.num_axes - 1 ? kLanes : kBlockRows;
}

void lay_out_padding(const BilateralInput& input, WindowPlan& plan) {
    const Voxels& voxels = *input.voxels;
    const int last = voxels.num_axes - 1;
    plan.padded_size = 1;
    for (int a = last; a >= 0; --a) {
        plan.radius[a] = window_radius(input.sigma(a), voxels.box_shape[a]);
        int64_t extent = voxels.box_shape[a] + plan.radius[a];
        // Whole vectors: lanes beyond a row's end must be padding, never the next row's voxels.
        if (a == last) extent = (extent + kLanes - 1) / kLanes * kLanes;
        // Whole groups of rows: the row after a last odd one must be padding, never the next
        // plane's first.
        if (a == last - 1)
            extent = std::max(extent, (voxels.box_shape[a] + kRows - 1) / kRows * kRows);
        plan.stride[a] = plan.padded_size;
        plan.padded_size *= extent;
    }
    // The distance to the second row. A box of one axis gets an empty second row after its only
    // row.
    plan.row_stride = last > 0 ? plan.stride[last - 1] : plan.padded_size;
    // Distances are positive (half of the window), so only the end needs room for the reach of the
    // last voxels.
    plan.total_size = plan.padded_size + 2 * kLanes + (kRows - 1) * plan.row_stride;
    for (int a = 1; a <= last; ++a) plan.total_size += plan.radius[a] * plan.stride[a];
    // Channels a multiple of 4 KiB apart would share the sets of the L1 cache; these are 17 of its
    // lines beyond that.
    plan.total_size = (plan.total_size + 1023) / 1024 * 1024 + 17 * kLanes;
}

void list_offsets(const BilateralInput& input, WindowPlan& plan) {
    const Voxels& voxels = *input.voxels;
    struct Entry {
        int64_t row;  // linear distance without the last axis
        int64_t x;
        int first;  // the row that the distance counts from
        double squared;
        const int64_t* distance;
    };
    std::vector<Entry> entries;
    const int last = voxels.num_axes - 1;
    const std::vector<WindowOffset> window = list_window(input);
    for (const WindowOffset& offset : window) {
        int64_t row = 0;
        for (int a = 0; a < last; ++a) row += offset.distance[a] * plan.stride[a];
        ++plan.num_pairs;
        for (int first = 0; first < kRows; ++first)
            entries.push_back({row + first * plan.row_stride, offset.distance[last], first,
                               offset.squared, offset.distance});
    }
    // Neighboring distances along a row touch the same cache lines, but a load that overlaps a
    // recent store must wait for it. So rows are interleaved, distance by distance.
    std::vector<int64_t> rows;
    for (const Entry& e : entries) rows.push_back(e.row);
    std::sort(rows.begin(), rows.end());
    rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
    auto group_of = [&](int64_t row) {
        return (std::lower_bound(rows.begin(), rows.end(), row) - rows.begin()) / kRowsInterleaved;
    };
    std::sort(entries.begin(), entries.end(), [&](const Entry& p, const Entry& q) {
        const int64_t group_p = group_of(p.row), group_q = group_of(q.row);
        if (group_p != group_q) return group_p < group_q;
        return p.x != q.x ? p.x < q.x : p.row < q.row;
    });
    struct Planned {
        PlannedOffset offset;
        OffsetDistances distances;
        int kind() const {
            return offset.exponent[1] == kNoPair ? 1 : offset.exponent[0] == kNoPair ? 2 : 0;
        }
    };
    std::vector<Planned> planned;
    for (const Entry& e : entries) {
        if (planned.empty() || planned.back().offset.linear != e.row + e.x) {
            planned.push_back({{e.row + e.x, {}}, {}});
            std::fill(planned.back().offset.exponent, planned.back().offset.exponent + kRows,
                      kNoPair);
        }
        planned.back().offset.exponent[e.first] = static_cast<float>(-0.5 * kLog2e * e.squared);
        for (int a = 0; a < voxels.num_axes; ++a) {
            const double scaled = input.in_bandwidths(a, e.distance[a]);
            planned.back().distances.squared[e.first][a] = static_cast<float>(scaled * scaled);
        }
    }
    std::stable_sort(planned.begin(), planned.end(),
                     [](const Planned& p, const Planned& q) { return p.kind() < q.kind(); });
    for (const Planned& p : planned) {
        plan.offsets.push_back(p.offset);
        plan.distances.push_back(p.distances);
        plan.num_of_both += p.kind() == 0;
        plan.num_of_first += p.kind() == 1;
    }
}

void lay_out_blocks(const Voxels& voxels, WindowPlan& plan) {
    WindowBlocks& blocks = plan.blocks;
    blocks.num_axes = voxels.num_axes;
    blocks.total = 1;
    for (int a = voxels.num_axes - 1; a >= 0; --a) {
        const int64_t extent = block_extent(voxels, a);
        blocks.count[a] = (voxels.box_shape[a] + extent - 1) / extent;
        blocks.stride[a] = blocks.total;
        blocks.reach[a] = (plan.radius[a] + extent - 1) / extent;
        blocks.total *= blocks.count[a];
    }
}

void pad_runs(const Voxels& voxels, WindowPlan& plan) {
    plan.padded_run.reserve(voxels.runs.size());
    plan.run_block.reserve(voxels.runs.size());
    for (const Run& run : voxels.runs) {
        int64_t c[kMaxAxes];
        voxels.coordinates(run.box, c);
        int64_t linear = 0, block = 0;
        for (int a = 0; a < voxels.num_axes; ++a) {
            linear += c[a] * plan.stride[a];
            block += c[a] / block_extent(voxels, a) * plan.blocks.stride[a];
        }
        plan.padded_run.push_back(linear);
        plan.run_block.push_back(block);
    }
}

// Vectors of the first of kRows rows if any of the rows has a voxel, cut into slabs along the first
// axis. A slab writes into itself and into the next one, so all even slabs are processed in
// parallel first, then all odd ones.
void list_chunks(const Voxels& voxels, WindowPlan& plan) {
    const int last = voxels.num_axes - 1;
    int64_t unit = plan.stride[0], planes = plan.radius[0] + 1;
    if (last == 0) {
        unit = kLanes;
        planes = (plan.radius[0] + kLanes - 1) / kLanes + 2;
    } else if (last == 1) {
        planes = (plan.radius[0] + kRows + kRows - 1) / kRows * kRows;  // whole groups of rows
    }
    plan.slab_size = planes * unit;
    plan.slabs.resize((plan.padded_size + plan.slab_size - 1) / plan.slab_size);
    for (size_t r = 0; r < voxels.runs.size(); ++r) {
        // Row groups begin at even coordinates of the axis before the last.
        int64_t c[kMaxAxes];
        voxels.coordinates(voxels.runs[r].box, c);
        const int64_t up = last > 0 ? c[last - 1] % kRows * plan.row_stride : 0;
        const int64_t begin = plan.padded_run[r] / kLanes * kLanes - up;
        const int64_t end = plan.padded_run[r] - up + voxels.runs[r].length;
        int64_t block = plan.run_block[r];
        for (int64_t place = begin; place < end; place += kLanes)
            plan.slabs[place / plan.slab_size].push_back({place, block++});
    }
    for (auto& slab : plan.slabs) {
        std::sort(slab.begin(), slab.end(),
                  [](const WindowChunk& p, const WindowChunk& q) { return p.place < q.place; });
        const auto is_same = [](const WindowChunk& p, const WindowChunk& q) {
            return p.place == q.place;
        };
        slab.erase(std::unique(slab.begin(), slab.end(), is_same), slab.end());
    }
}
}  // namespace

WindowPlan plan_window(const BilateralInput& input) {
    WindowPlan plan;
    lay_out_padding(input, plan);
    lay_out_blocks(*input.voxels, plan);
    list_offsets(input, plan);
    pad_runs(*input.voxels, plan);
    list_chunks(*input.voxels, plan);
    return plan;
}

// Where channels are zero, by blocks of the padded box: pairs of voxels that both send zero need
// not be visited.
class WindowOccupancy {
   public:
    WindowOccupancy(const WindowPlan& plan, int num_channels);

    // Reads a channel of the padded box. Threads may work on different channels.
    void find(int channel, const Voxels& voxels, const float* padded);

    // Whether a voxel of the block, or a voxel paired with it, sends anything.
    bool has_pairs(int channel, int64_t block) const {
        return paired_[channel * plan_.blocks.total + block] != 0;
    }

    // Whether a voxel of these consecutive blocks may receive anything.
    bool receives(int channel, int64_t first_block, int64_t count) const {
        const uint8_t* of_channel = receives_.data() + channel * plan_.blocks.total;
        for (int64_t block = first_block; block < first_block + count; ++block)
            if (of_channel[block]) return true;
        return false;
    }

   private:
    const WindowPlan& plan_;
    std::vector<uint8_t> paired_, receives_;  // (channel, block)
};

namespace {
// to[i] |= from[i - back] ... from[i + ahead] along an axis of the blocks.
void spread(const WindowBlocks& blocks, int axis, int64_t back, int64_t ahead, const uint8_t* from,
            uint8_t* to) {
    const int64_t length = blocks.count[axis], inner = blocks.stride[axis], plane = length * inner;
    for (int64_t begin = 0; begin < blocks.total; begin += plane)
        for (int64_t i = 0; i < length; ++i)
            for (int64_t j = std::max<int64_t>(0, i - back); j <= std::min(length - 1, i + ahead);
                 ++j)
                for (int64_t k = 0; k < inner; ++k)
                    to[begin + i * inner + k] |= from[begin + j * inner + k];
}

bool any(const float* values, int64_t count) {
    int found = 0;
    for (int64_t i = 0; i < count; ++i) found |= values[i] != 0.0f ? 1 : 0;
    return found != 0;
}
}  // namespace

WindowOccupancy::WindowOccupancy(const WindowPlan& plan, int num_channels)
    : plan_(plan),
      paired_(num_channels * plan.blocks.total),
      receives_(num_channels * plan.blocks.total) {}

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
    uint8_t* const paired = paired_.data() + channel * blocks.total;
    uint8_t* const receives = receives_.data() + channel * blocks.total;
    std::fill(paired, paired + blocks.total, uint8_t{0});
    std::fill(receives, receives + blocks.total, uint8_t{0});
    spread(blocks, 0, 0, blocks.reach[0], sent.data(), paired);
    spread(blocks, 0, blocks.reach[0], 0, paired, receives);
}
}  // namespace crf
