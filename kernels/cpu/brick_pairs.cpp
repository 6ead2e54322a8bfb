#include "cpu/brick_pairs.h"

#include <map>

namespace crf {
namespace {
typedef BrickLayout::Units Units;

// The exponent where a row has no pair, far below all others: a weight of 0.
constexpr float kNoPair = -1e4f;

constexpr int64_t kRowsInterleaved = 32;  // see list_offsets

// Intensities in bandwidths are not read as larger ones: squares of differences of any two that are
// outside the mask stay finite.
constexpr float kMostBandwidths = 1e18f;

// The first of the last two axes, which are a plane's.
int num_plane_axes(const PairKernel& kernel) { return static_cast<int>(kernel.shape.size()) - 2; }

BrickLayout layout_of(const PairKernel& kernel) {
    const PlaneSequence planes(kernel);
    const int axis = num_plane_axes(kernel);
    const Extents grid = {planes.num_planes, kernel.shape[axis], kernel.shape[axis + 1]};
    const Extents after = {planes.reach, window_radius(kernel.sigma[axis], grid[1]),
                           window_radius(kernel.sigma[axis + 1], grid[2])};
    return BrickLayout(grid, {0, after[1], after[2]}, after);
}
}  // namespace

PlaneSequence::PlaneSequence(const PairKernel& kernel) : distance(num_plane_axes(kernel)) {
    const int num_axes = num_plane_axes(kernel);
    int64_t of_grid = 1;
    for (int a = num_axes - 1; a >= 0; --a) {
        const int64_t radius = window_radius(kernel.sigma[a], kernel.shape[a]);
        distance[a] = num_planes;
        reach += radius * num_planes;
        num_planes *= kernel.shape[a] + (a > 0 ? radius : 0);
        of_grid *= kernel.shape[a];
    }
    image_place.assign(num_planes, -1);
    for (int64_t plane = 0; plane < of_grid; ++plane) {
        int64_t left = plane, own = 0, place = 0;
        for (int a = num_axes - 1; a >= 0; --a) {
            own += left % kernel.shape[a] * distance[a];
            place += left % kernel.shape[a] * kernel.stride[a];
            left /= kernel.shape[a];
        }
        number.push_back(own);
        image_place[own] = place;
    }
}

PairSum::PairSum(const PairKernel& kernel, ThreadPool& pool)
    : BrickSum(layout_of(kernel), pool), kernel_(kernel), planes_(kernel) {
    for (double theta : kernel_.theta_beta)
        scale_.push_back(static_cast<float>(kSqrtHalfLog2e / theta));
    list_offsets();
}

void PairSum::list_offsets() {
    struct Planned {
        int64_t group;
        Offset offset{0, {kNoPair, kNoPair}};
        OffsetDistances distances;

        // Where both rows have a pair, only the first, only the second.
        int kind() const {
            return offset.exponent[1] == kNoPair ? 1 : offset.exponent[0] == kNoPair ? 2 : 0;
        }
    };
    typedef std::pair<int64_t, int64_t> Place;  // in memory: rows away, and voxels along the row
    std::map<Place, Planned> window;
    const int axis = num_plane_axes(kernel_);
    std::vector<int64_t> radius, distance(axis + 2);
    std::vector<double> squared(axis + 2);
    for (int a = 0; a < axis + 2; ++a)
        radius.push_back(window_radius(kernel_.sigma[a], kernel_.shape[a]));
    while (next_place(radius, distance)) {
        for (int a = 0; a < axis + 2; ++a) {
            const double scaled = static_cast<double>(distance[a]) / kernel_.sigma[a];
            squared[a] = scaled * scaled;
        }
        const double total = std::accumulate(squared.begin(), squared.end(), 0.0);
        if (total > kLargestSquare) continue;
        int64_t planes = 0;
        for (int a = 0; a < axis; ++a) planes += distance[a] * planes_.distance[a];
        for (int first = 0; first < kPairRows; ++first) {
            const int64_t row = planes * layout().plane_rows + distance[axis] + first;
            Planned& planned = window[{row, distance[axis + 1]}];
            planned.offset.exponent[first] = static_cast<float>(-0.5 * kLog2e * total);
            for (int a = 0; a < kMomentAxes; ++a)
                planned.distances.squared[first][a] =
                    static_cast<float>(squared[axis + 2 - kMomentAxes + a]);
        }
        ++num_pairs_;
    }
    // Neighboring distances along a row touch the same cache lines, but a load that overlaps a
    // recent store must wait for it. So rows are interleaved, distance by distance.
    std::vector<std::pair<Place, Planned>> ordered;
    int64_t num_rows = 0;
    for (auto& [place, planned] : window) {
        if (ordered.empty() || ordered.back().first.first != place.first) ++num_rows;
        planned.group = (num_rows - 1) / kRowsInterleaved;
        planned.offset.linear = place.first * layout().row_length + place.second;
        ordered.push_back({place, planned});
    }
    const auto key = [](const std::pair<Place, Planned>& own) {
        const auto& [place, planned] = own;
        return std::tuple(planned.kind(), planned.group, place.second, place.first);
    };
    std::sort(ordered.begin(), ordered.end(),
              [&](const auto& p, const auto& q) { return key(p) < key(q); });
    for (const auto& [place, planned] : ordered) {
        offsets_.push_back(planned.offset);
        distances_.push_back(planned.distances);
        num_of_both_ += planned.kind() == 0;
        num_of_first_ += planned.kind() == 1;
    }
}

// In rows where a voxel sends or needs a result, as if there were no mask.
void PairSum::load_image(int num_channels, const BrickRegion& region, BrickMemory& memory) const {
    float* const image = memory.other_channels(num_modalities());
    for (int64_t plane = region.first[0]; plane < region.last[0]; ++plane)
        for (int64_t y = region.first[1]; y < region.last[1]; ++y) {
            const BrickPlace place = region.place(plane, y, region.first[2]);
            if (memory.has_image[place.row] || !memory.is_marked(num_channels, place.row)) continue;
            memory.has_image[place.row] = 1;
            for (int m = 0; m < num_modalities(); ++m)
                load_row(m, planes_.image_place[plane] + y * kernel_.stride.rbegin()[1], region,
                         image + m * layout().channel_length + place.voxel);
        }
}

void PairSum::load_row(int modality, int64_t image_row, const BrickRegion& region,
                       float* to) const {
    const int64_t step = kernel_.stride.back(), length = region.last[2] - region.first[2];
    const float* const from = kernel_.intensity[modality] + image_row + region.first[2] * step;
    for (int64_t i = 0; i < length; i += kLanes) {
        float some[kLanes]{};
        for (int64_t k = 0; step != 1 && k < std::min<int64_t>(kLanes, length - i); ++k)
            some[k] = from[(i + k) * step];
        const vfloat intensity = step == 1 ? load_some(from + i, length - i) : load(some);
        const vfloat scaled = (intensity - splat_lanes(kernel_.zero[modality])) * scale_[modality];
        const vfloat above = vmax(scaled, splat_lanes(-kMostBandwidths));
        store_some(to + i, vmin(above, splat_lanes(kMostBandwidths)), length - i);
    }
}

// The units, none at first, that have a marked one at the same place or a later one of the window.
void PairSum::look_ahead(const std::vector<Units>& marks, std::vector<Units>& ahead) const {
    const int64_t rows = layout().plane_rows, planes = layout().num_rows / rows;
    const int64_t reach = layout().after[1], units = layout().after[2] / layout().unit;
    std::vector<Units> beside(layout().num_rows);
    for (int64_t row = 0; row < layout().num_rows; ++row) {
        if (!marks[row]) continue;
        Units near = marks[row];
        for (int64_t k = 1; k <= units; ++k) near |= marks[row] << k | marks[row] >> k;
        const int64_t y = row % rows;
        for (int64_t k = -std::min(reach, y); k <= std::min(reach, rows - 1 - y); ++k) {
            beside[row + k] |= near;
            if (k <= 0) ahead[row + k] |= near;
        }
    }
    for (int64_t plane = 0; plane < planes; ++plane)
        for (int64_t k = 1; k <= std::min(layout().after[0], planes - 1 - plane); ++k)
            for (int64_t row = plane * rows; row < (plane + 1) * rows; ++row)
                ahead[row] |= beside[row + k * rows];
}

bool PairSum::sum(int num_channels, const BrickRegion& region, BrickMemory& memory) const {
    const auto any = [](const std::vector<Units>& marks) {
        return std::any_of(marks.begin(), marks.end(), [](Units units) { return units != 0; });
    };
    const BrickMemory::Channel* last = nullptr;  // of those with pairs
    for (int c = 0; c < num_channels; ++c) {
        BrickMemory::Channel& channel = memory.channels[c];
        std::fill(channel.reach_senders.begin(), channel.reach_senders.end(), Units{0});
        std::fill(channel.reach_receivers.begin(), channel.reach_receivers.end(), Units{0});
        if (!any(channel.sends) || !any(channel.receives)) continue;
        // Channels often have the same marks.
        const auto look = [&](auto marks, auto ahead) {
            if (last && last->*marks == channel.*marks)
                channel.*ahead = last->*ahead;
            else
                look_ahead(channel.*marks, channel.*ahead);
        };
        look(&BrickMemory::Channel::sends, &BrickMemory::Channel::reach_senders);
        look(&BrickMemory::Channel::receives, &BrickMemory::Channel::reach_receivers);
        last = &channel;
    }
    if (!last) return false;
    load_image(num_channels, region, memory);
    for (int64_t plane = 0; plane < region.end[0] - region.begin[0]; ++plane)
        for (int64_t row = 0; row < region.end[1] - region.begin[1]; row += kPairRows)
            add_rows(num_channels, layout().row(plane, row), memory);
    return true;
}

// The pairs of the voxels of two rows. In each channel only those of units where voxels send and
// others of their window need it, or the other way around.
void PairSum::add_rows(int num_channels, int64_t row, BrickMemory& memory) const {
    Units used[kChannelGroup]{}, any = 0;
    for (int c = 0; c < num_channels; ++c) {
        const BrickMemory::Channel& channel = memory.channels[c];
        const auto both = [&](const std::vector<Units>& marks) {
            return marks[row] | marks[row + 1];
        };
        used[c] = ((both(channel.sends) & both(channel.reach_receivers)) |
                   (both(channel.reach_senders) & both(channel.receives))) &
                  layout().own;
        any |= used[c];
    }
    const auto channels_of = [&](int64_t unit) -> Channels {
        int count = 0, first = 0, last = 0;
        for (int c = 0; c < num_channels; ++c)
            if (used[c] >> unit & 1) {
                if (count++ == 0) first = c;
                last = c;
            }
        if (count == 2) return {2, first, last - first};
        if (count == 3 && last - first == 3) return {4, 0, 1};
        return {count, first, 1};
    };
    uint8_t touched = 0;
    while (any) {
        const int first = std::countr_zero(any);
        const Channels channels = channels_of(first);
        int end = first;
        for (; any >> end & 1 && channels_of(end) == channels; ++end) any ^= Units{1} << end;
        for (int c = 0; c < channels.count; ++c)
            touched |= static_cast<uint8_t>(1 << (channels.first + c * channels.step));
        const int64_t voxel = row * layout().row_length + first * layout().unit;
        with_constant<1, 2, 3, kChannelGroup>(channels.count, [&](auto count) {
            with_constant<kHasWideRegisters, 2 * kHasWideRegisters, 3 * kHasWideRegisters,
                          4 * kHasWideRegisters, 0>(num_modalities(), [&](auto modalities) {
                add_pairs<count(), modalities()>(voxel, (end - first) * layout().unit, channels,
                                                 memory);
            });
        });
    }
    if (!touched) return;
    const int64_t reach = layout().after[1];
    for (int64_t plane = 0; plane <= layout().after[0]; ++plane)
        for (int64_t to = row - reach; to < row + kPairRows + reach; ++to)
            memory.touched[to + plane * layout().plane_rows] |= touched;
}

// All pairs of voxels in a part of two rows. M: number of modalities, 0 = any.
template <int C, int M>
void PairSum::add_pairs(int64_t first_voxel, int64_t num_voxels, const Channels& channels,
                        BrickMemory& memory) const {
    constexpr int64_t kPart = sizeof(vregister) / sizeof(float);
    const auto load_part = [](const float* from) { return load_lanes<vregister>(from); };
    const int64_t image_stride = layout().channel_length, row_stride = layout().row_length;
    const int64_t stride = channels.step * 2 * layout().channel_length;
    const int num_modalities = M > 0 ? M : this->num_modalities();
    const Offset* const only_first = offsets_.data() + num_of_both_;
    const Offset* const only_second = only_first + num_of_first_;
    const Offset* const last = offsets_.data() + offsets_.size();
    const Exp2<vregister, vregister> exp2;
    constexpr std::integral_constant<int, 0> kFirst;
    constexpr std::integral_constant<int, 1> kSecond;
    constexpr std::integral_constant<int, kPairRows> kEnd;
    for (int64_t voxel = first_voxel; voxel < first_voxel + num_voxels; voxel += kPart) {
        const float* const image = memory.others.get() + voxel;
        const float* const sent = memory.channels[channels.first].sent + voxel;
        float* const received = memory.channels[channels.first].received + voxel;
        // More rows would not stay in registers while their pairs are visited.
        vregister own_image[kPairRows][M > 0 ? M : 1], own_sent[kPairRows][C],
            own_received[kPairRows][C];
        for (int r = 0; r < kPairRows; ++r) {
            for (int m = 0; m < M; ++m)
                own_image[r][m] = load_part(image + m * image_stride + r * row_stride);
            for (int c = 0; c < C; ++c)  // The voxel itself has weight 1.
                own_received[r][c] = own_sent[r][c] = load_part(sent + c * stride + r * row_stride);
        }
        const auto add = [&](auto begin_row, auto end_row, const Offset* offset,
                             const Offset* end) {
            constexpr int kBegin = decltype(begin_row)::value, kLast = decltype(end_row)::value;
            for (; offset < end; ++offset) {
                const int64_t linear = offset->linear;
                vregister weight[kPairRows];
                for (int r = kBegin; r < kLast; ++r)
                    weight[r] = splat<vregister>(offset->exponent[r]);
                for (int m = 0; m < num_modalities; ++m) {
                    const float* const of_modality = image + m * image_stride;
                    const vregister other = load_part(of_modality + linear);
                    for (int r = kBegin; r < kLast; ++r) {
                        const vregister own = M > 0 ? own_image[r][M > 0 ? m : 0]
                                                    : load_part(of_modality + r * row_stride);
                        const vregister difference = own - other;
                        weight[r] -= difference * difference;
                    }
                }
                for (int r = kBegin; r < kLast; ++r) weight[r] = exp2(weight[r]);
                for (int c = 0; c < C; ++c) {
                    const vregister other_sent = load_part(sent + c * stride + linear);
                    float* const to = received + c * stride + linear;
                    vregister other_received = load_part(to);
                    for (int r = kBegin; r < kLast; ++r) {
                        own_received[r][c] += weight[r] * other_sent;
                        other_received += weight[r] * own_sent[r][c];
                    }
                    store_lanes(to, other_received);
                }
            }
        };
        // At the window's ends only one of the rows has a pair: a sixth of the work, if the
        // bandwidth is 1.5 voxels.
        add(kFirst, kEnd, offsets_.data(), only_first);
        add(kFirst, kSecond, only_first, only_second);
        add(kSecond, kEnd, only_second, last);
        for (int r = 0; r < kPairRows; ++r)
            for (int c = 0; c < C; ++c) {
                float* const to = received + c * stride + r * row_stride;
                store_lanes(to, load_part(to) + own_received[r][c]);
            }
    }
}
}  // namespace crf
