#include "cpu/window_plan.h"

#include <algorithm>

namespace crf {

namespace {

constexpr int64_t kRowsInterleaved = 32;  // see list_offsets

// Rows of a block along every axis but the last: whole groups of rows, and few, because zeros are skipped by whole blocks.
constexpr int64_t kBlockRows = 4;
static_assert(kBlockRows % kRows == 0);

int64_t block_extent(const Voxels& voxels, int axis) { return axis == voxels.num_axes - 1 ? kLanes : kBlockRows; }

void lay_out_padding(const BilateralInput& input, WindowPlan& plan) {
    const Voxels& voxels = *input.voxels;
    const int last = voxels.num_axes - 1;
    plan.padded_size = 1;
    for (int a = last; a >= 0; --a) {
        const double sigma = input.theta_alpha[a] / voxels.spacing[a];
        plan.radius[a] = window_radius(sigma, voxels.box_shape[a]);
        int64_t extent = voxels.box_shape[a] + plan.radius[a];
        // Whole vectors: lanes beyond a row's end must be padding, never the next row's voxels.
        if (a == last) extent = (extent + kLanes - 1) / kLanes * kLanes;
        // Whole groups of rows: the row after a last odd one must be padding, never the next plane's first.
        if (a == last - 1) extent = std::max(extent, (voxels.box_shape[a] + kRows - 1) / kRows * kRows);
        plan.stride[a] = plan.padded_size;
        plan.padded_size *= extent;
    }
    // The row after the first; a box of one axis has none, and gets an empty one after all others.
    plan.row_stride = last > 0 ? plan.stride[last - 1] : plan.padded_size;
    // Distances are positive (half of the window), so only the end needs room for the reach of the last voxels.
    plan.total_size = plan.padded_size + 2 * kLanes + (kRows - 1) * plan.row_stride;
    for (int a = 1; a <= last; ++a) plan.total_size += plan.radius[a] * plan.stride[a];
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
            entries.push_back({row + first * plan.row_stride, offset.distance[last], first, offset.squared, offset.distance});
    }
    // Neighboring distances along a row touch the same cache lines, but a load that overlaps a recent store must wait for it.
    // So rows are interleaved, distance by distance.
    std::vector<int64_t> rows;
    for (const Entry& e : entries) rows.push_back(e.row);
    std::sort(rows.begin(), rows.end());
    rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
    auto group_of = [&](int64_t row) { return (std::lower_bound(rows.begin(), rows.end(), row) - rows.begin()) / kRowsInterleaved; };
    std::sort(entries.begin(), entries.end(), [&](const Entry& p, const Entry& q) {
        const int64_t group_p = group_of(p.row), group_q = group_of(q.row);
        if (group_p != group_q) return group_p < group_q;
        return p.x != q.x ? p.x < q.x : p.row < q.row;
    });
    struct Planned {
        PlannedOffset offset;
        OffsetDistances distances;
        int kind() const { return offset.exponent[1] == kNoPair ? 1 : offset.exponent[0] == kNoPair ? 2 : 0; }
    };
    std::vector<Planned> planned;
    for (const Entry& e : entries) {
        if (planned.empty() || planned.back().offset.linear != e.row + e.x) {
            planned.push_back({{e.row + e.x, {}}, {}});
            std::fill(planned.back().offset.exponent, planned.back().offset.exponent + kRows, kNoPair);
        }
        planned.back().offset.exponent[e.first] = static_cast<float>(-0.5 * kLog2e * e.squared);
        for (int a = 0; a < voxels.num_axes; ++a) {
            const double scaled = static_cast<double>(e.distance[a]) * voxels.spacing[a] / input.theta_alpha[a];
            planned.back().distances.squared[e.first][a] = static_cast<float>(scaled * scaled);
        }
    }
    std::stable_sort(planned.begin(), planned.end(), [](const Planned& p, const Planned& q) { return p.kind() < q.kind(); });
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

// Vectors of the first of kRows rows if any of the rows has a voxel, cut into slabs along the first axis. A slab writes into
// itself and into the next one, so all even slabs are processed in parallel first, then all odd ones: no two threads write to the same
// place, and the order of additions is fixed.
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
        const int64_t begin = plan.padded_run[r] / kLanes * kLanes - up, end = plan.padded_run[r] - up + voxels.runs[r].length;
        int64_t block = plan.run_block[r];
        for (int64_t place = begin; place < end; place += kLanes) plan.slabs[place / plan.slab_size].push_back({place, block++});
    }
    for (auto& slab : plan.slabs) {
        std::sort(slab.begin(), slab.end(), [](const WindowChunk& p, const WindowChunk& q) { return p.place < q.place; });
        const auto is_same = [](const WindowChunk& p, const WindowChunk& q) { return p.place == q.place; };
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

}  // namespace crf
