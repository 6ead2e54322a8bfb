// Lays out the truncated sum for a mask: the padded box, its blocks and slabs, the order of the
// window's pairs, and where channels are zero.
#include "cpu/window_plan.h"

#include "cpu/simd.h"

namespace crf {
namespace {
// Windows with more rows are not counted: they are far too large for any use.
constexpr double kMostRows = 1e6;

// A list of more pairs would take over 250 MB, and their sums days.
constexpr double kMostPairs = 1e6;

// Counts places of a box from -radius to radius along the first axes, the last of them fastest;
// false after the last place.
bool next_place(const int64_t* radius, int num_axes, int64_t* place) {
    for (int a = num_axes - 1; a >= 0; --a) {
        if (++place[a] <= radius[a]) return true;
        place[a] = -radius[a];
    }
    return false;
}

// A pair of voxels of the window: their offset along each box axis, in voxels, and their squared
// distance in standard deviations.
struct WindowOffset {
    int64_t distance[kMaxAxes];
    double squared;
};

}  // namespace

double num_window_pairs(const BilateralInput& input) {
    // Rows of the window are counted as a whole: the sum over the last axis has a closed form.
    const Voxels& voxels = *input.voxels;
    const int last = voxels.num_axes - 1;
    double step[kMaxAxes];
    int64_t radius[kMaxAxes], d[kMaxAxes];
    double rows = 1;
    for (int a = 0; a <= last; ++a) {
        step[a] = voxels.spacing[a] / input.theta_position[a];
        radius[a] = window_radius(1 / step[a], voxels.box_shape[a]);
        d[a] = -radius[a];
        if (a < last) rows *= static_cast<double>(2 * radius[a] + 1);
    }
    if (rows > kMostRows) return rows;
    double count = 0;
    do {
        double left = kLargestSquare;
        for (int a = 0; a < last; ++a) left -= d[a] * step[a] * d[a] * step[a];
        if (left >= 0)
            count += 1 + 2 * std::min<double>(std::floor(std::sqrt(left) / step[last]),
                                              static_cast<double>(radius[last]));
    } while (next_place(radius, last, d));
    return (count - 1) / 2;
}

namespace {
// One of each pair of opposite offsets: the one whose first nonzero distance is positive.
std::vector<WindowOffset> list_window(const BilateralInput& input) {
    if (num_window_pairs(input) > kMostPairs) {
        std::string theta, spacing;
        for (int a = 0; a < input.voxels->num_axes; ++a) {
            theta += (a ? " x " : "") + printed(input.theta_position[a]);
            spacing += (a ? " x " : "") + printed(input.voxels->spacing[a]);
        }
        throw CapacityError("a truncated sum with theta_alpha " + theta + " on voxels of " +
                            spacing +
                            " visits over a million pairs for each voxel; use a smaller bandwidth, "
                            "or mean_field.filter = \"auto\"");
    }
    const Voxels& voxels = *input.voxels;
    const int axes = voxels.num_axes;
    std::vector<WindowOffset> window;
    int64_t radius[kMaxAxes];
    WindowOffset offset{};
    for (int a = 0; a < axes; ++a) {
        radius[a] = window_radius(input.sigma(a), voxels.box_shape[a]);
        offset.distance[a] = -radius[a];
    }
    do {
        offset.squared = 0;
        int sign = 0;
        for (int a = 0; a < axes; ++a) {
            const double scaled = input.in_bandwidths(a, offset.distance[a]);
            offset.squared += scaled * scaled;
            if (sign == 0) sign = offset.distance[a] > 0 ? 1 : offset.distance[a] < 0 ? -1 : 0;
        }
        if (sign > 0 && offset.squared <= kLargestSquare) window.push_back(offset);
    } while (next_place(radius, axes, offset.distance));
    return window;
}

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
