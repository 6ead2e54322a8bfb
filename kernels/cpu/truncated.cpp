// The bilateral kernel as a direct sum over a window: pairs farther apart than kTruncationRadius standard deviations in space are left out,
// everything else is exact. No lattice, no build; the fastest way while theta_alpha is a few voxels.
//
// The box is padded so that every neighbor of a voxel is at one fixed linear distance. Each unordered pair is visited once
// (half of the window) and its weight used in both directions; two rows of voxels share what is loaded of their neighbors.
#include "cpu/truncated.h"

#include <algorithm>
#include <cmath>

#include "cpu/simd.h"

namespace crf {

namespace {

constexpr double kRounding = 1e-6;             // relative: voxels on the window's surface belong to it
constexpr double kLog2e = 1.4426950408889634;  // exp(x) = 2^(x kLog2e)
constexpr int64_t kRowsInterleaved = 8;        // see order_offsets

// Rows of voxels that are handled together: what is loaded of a neighbor serves them all.
constexpr int kRows = 2;

// Far below the smallest exponent: a weight of 0.
constexpr float kNoPair = -1e4f;

struct Offset {
    int64_t linear;         // distance in the padded box from the voxel of the first row, positive
    float exponent[kRows];  // log2 of the spatial part of the weight, from the voxel of each row
};

// Squared distances along each axis over theta_alpha, for derivatives only: an offset's share of them, kept apart from what filtering
// reads.
struct OffsetDistances {
    float squared[kRows][kMaxAxes]{};
};

// Voxels on either side along an axis; compared as floating point, since a huge bandwidth fits into no integer.
int64_t window_radius(double sigma, int64_t extent) {
    return static_cast<int64_t>(std::min(kTruncationRadius * sigma * (1 + kRounding), static_cast<double>(extent - 1)));
}

class TruncatedFilter final : public Filter {
   public:
    TruncatedFilter(const BilateralInput& input, ThreadPool& pool)
        : voxels_(*input.voxels), pool_(pool), num_modalities_(static_cast<int>(input.intensity.size())) {
        layout_padding(input);
        list_offsets(input);
        pad_runs();
        list_chunks();
        load_intensity(input);
    }

    void accumulate(const float* values, int num_channels, const float* pre, const float* post, const float* channel_weight, float* sum,
                    Workspace& workspace) override {
        for (int c = 0; c < num_channels;) {
            const int group = num_channels - c >= 3 ? std::min(4, num_channels - c) : num_channels - c;
            const int width = group == 3 ? 4 : group;
            sent_ = workspace.floats(2 * width * total_size_);
            received_ = sent_ + width * total_size_;
            scatter(values + c * voxels_.num_voxels, group, width, pre);
            filter(width);
            gather(group, post, channel_weight + c, sum + c * voxels_.num_voxels);
            c += group;
        }
    }

    // Pair by pair, as the kernel's weights are: nothing is written but the sums.
    bool second_moments(const float* u, const float* v, int num_channels, double* squared, float* pull, Workspace& workspace) override {
        if (pull || num_modalities_ > kMomentModalities || voxels_.num_axes > kMomentAxes) return false;
        const int num_features = num_modalities_ + voxels_.num_axes;
        std::vector<double> sums(slabs_.size() * num_features);
        for (int c = 0; c < num_channels; c += kMomentChannels) {
            const int group = std::min(kMomentChannels, num_channels - c);
            sent_ = workspace.floats(2 * group * total_size_);
            received_ = sent_ + group * total_size_;
            pad(u + c * voxels_.num_voxels, group, group, nullptr, sent_);
            pad(v + c * voxels_.num_voxels, group, group, nullptr, received_);
            pool_.run(static_cast<int64_t>(slabs_.size()), [&](int64_t item, int) {
                double* const of_slab = sums.data() + item * num_features;
                if (group == 1) return add_moments_of<1>(slabs_[item], group, of_slab);
                if (group == 2) return add_moments_of<2>(slabs_[item], group, of_slab);
                add_moments_of<kMomentChannels>(slabs_[item], group, of_slab);
            });
        }
        // Intensities were scaled to be exponents of 2.
        for (size_t slab = 0; slab < slabs_.size(); ++slab)
            for (int f = 0; f < num_features; ++f) squared[f] += sums[slab * num_features + f] * (f < num_modalities_ ? 2 / kLog2e : 1.0);
        return true;
    }

    std::string description() const override { return "truncated (" + std::to_string(num_pairs_) + " pairs a voxel)"; }

   private:
    static constexpr int kMomentChannels = 4, kMomentModalities = 4, kMomentAxes = 3;

    void layout_padding(const BilateralInput& input) {
        const int last = voxels_.num_axes - 1;
        padded_size_ = 1;
        for (int a = last; a >= 0; --a) {
            const double sigma = input.theta_alpha[a] / voxels_.spacing[a];
            radius_[a] = window_radius(sigma, voxels_.box_shape[a]);
            int64_t extent = voxels_.box_shape[a] + radius_[a];
            // Whole vectors: the lanes beyond a row's end must be padding, never the next row's voxels.
            if (a == last) extent = (extent + kLanes - 1) / kLanes * kLanes;
            // Whole groups of rows: the row beyond an odd one out must be padding, never the next plane's first.
            if (a == last - 1) extent = std::max(extent, (voxels_.box_shape[a] + kRows - 1) / kRows * kRows);
            stride_[a] = padded_size_;
            padded_size_ *= extent;
        }
        // The row after the first; a box of one axis has none, and gets an empty one behind all others.
        row_stride_ = last > 0 ? stride_[last - 1] : padded_size_;
        // Distances are positive (half of the window), so only the end needs room for what the last voxels reach.
        total_size_ = padded_size_ + 2 * kLanes + (kRows - 1) * row_stride_;
        for (int a = 1; a <= last; ++a) total_size_ += radius_[a] * stride_[a];
    }

    void list_offsets(const BilateralInput& input) {
        struct Entry {
            int64_t row;  // linear distance without the last axis
            int64_t x;
            int first;  // the row that the distance counts from
            double squared;
            const int64_t* distance;
        };
        std::vector<Entry> entries;
        const int last = voxels_.num_axes - 1;
        const std::vector<WindowOffset> window = truncated_window(input);
        for (const WindowOffset& offset : window) {
            int64_t row = 0;
            for (int a = 0; a < last; ++a) row += offset.distance[a] * stride_[a];
            ++num_pairs_;
            for (int first = 0; first < kRows; ++first)
                entries.push_back({row + first * row_stride_, offset.distance[last], first, offset.squared, offset.distance});
        }
        // Neighboring distances along a row touch the same cache lines, but a load that overlaps a store just made must wait for it.
        // So a few rows take turns, distance by distance.
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
        for (const Entry& e : entries) {
            if (offsets_.empty() || offsets_.back().linear != e.row + e.x) {
                offsets_.push_back({e.row + e.x, {}});
                std::fill(offsets_.back().exponent, offsets_.back().exponent + kRows, kNoPair);
                distances_.emplace_back();
            }
            offsets_.back().exponent[e.first] = static_cast<float>(-0.5 * kLog2e * e.squared);
            for (int a = 0; a < voxels_.num_axes; ++a) {
                const double scaled = static_cast<double>(e.distance[a]) * voxels_.spacing[a] / input.theta_alpha[a];
                distances_.back().squared[e.first][a] = static_cast<float>(scaled * scaled);
            }
        }
    }

    void pad_runs() {
        padded_run_.reserve(voxels_.runs.size());
        for (const Run& run : voxels_.runs) {
            int64_t c[kMaxAxes];
            voxels_.coordinates(run.box, c);
            int64_t linear = 0;
            for (int a = 0; a < voxels_.num_axes; ++a) linear += c[a] * stride_[a];
            padded_run_.push_back(linear);
        }
    }

    // Vectors of the first of kRows rows where one of the rows holds a voxel, cut into slabs along the first axis. A slab writes into
    // itself and into the next one, so first all even slabs are done at the same time, then all odd ones: no two threads meet, and the
    // order of additions is fixed.
    void list_chunks() {
        const int last = voxels_.num_axes - 1;
        int64_t unit = stride_[0], planes = radius_[0] + 1;
        if (last == 0) {
            unit = kLanes;
            planes = (radius_[0] + kLanes - 1) / kLanes + 2;
        } else if (last == 1) {
            planes = (radius_[0] + kRows + kRows - 1) / kRows * kRows;  // whole groups of rows
        }
        slab_size_ = planes * unit;
        slabs_.resize((padded_size_ + slab_size_ - 1) / slab_size_);
        for (size_t r = 0; r < voxels_.runs.size(); ++r) {
            // Row groups begin at even coordinates of the axis before the last.
            int64_t c[kMaxAxes];
            voxels_.coordinates(voxels_.runs[r].box, c);
            const int64_t up = last > 0 ? c[last - 1] % kRows * row_stride_ : 0;
            const int64_t begin = padded_run_[r] / kLanes * kLanes - up, end = padded_run_[r] - up + voxels_.runs[r].length;
            for (int64_t chunk = begin; chunk < end; chunk += kLanes) slabs_[chunk / slab_size_].push_back(chunk);
        }
        for (auto& slab : slabs_) {
            std::sort(slab.begin(), slab.end());
            slab.erase(std::unique(slab.begin(), slab.end()), slab.end());
        }
    }

    void load_intensity(const BilateralInput& input) {
        intensity_ = Buffer<float>(num_modalities_ * total_size_);
        const int64_t origin = voxels_.runs.front().grid;
        pool_.run(num_modalities_, [&](int64_t m, int) {
            float* to = intensity_.get() + m * total_size_;
            std::fill(to, to + total_size_, 0.0f);
            const float* from = input.intensity[m];
            const float zero = from[origin];
            const float scale = static_cast<float>(std::sqrt(0.5 * kLog2e) / input.theta_beta[m]);
            for (size_t r = 0; r < voxels_.runs.size(); ++r) {
                const Run& run = voxels_.runs[r];
                float* row = to + padded_run_[r];
                for (int32_t i = 0; i < run.length; ++i) row[i] = (from[run.grid + i] - zero) * scale;
            }
        });
    }

    void scatter(const float* values, int group, int width, const float* pre) {
        pad(values, group, width, pre, sent_);
        // The voxel itself has weight 1.
        pool_.run(width,
                  [&](int64_t c, int) { std::copy(sent_ + c * total_size_, sent_ + (c + 1) * total_size_, received_ + c * total_size_); });
    }

    // Compact channels into the padded box, zero around the voxels.
    void pad(const float* values, int group, int width, const float* pre, float* padded) {
        pool_.run(width, [&](int64_t c, int) {
            float* to = padded + c * total_size_;
            std::fill(to, to + total_size_, 0.0f);
            if (c < group) {
                const float* from = values + c * voxels_.num_voxels;
                for (size_t r = 0; r < voxels_.runs.size(); ++r) {
                    const Run& run = voxels_.runs[r];
                    float* row = to + padded_run_[r];
                    for (int32_t i = 0; i < run.length; ++i) row[i] = from[run.voxel + i] * (pre ? pre[run.voxel + i] : 1.0f);
                }
            }
        });
    }

    void gather(int group, const float* post, const float* channel_weight, float* sum) {
        constexpr int64_t kRunBlock = 256;
        const int64_t num_runs = static_cast<int64_t>(voxels_.runs.size());
        pool_.run((num_runs + kRunBlock - 1) / kRunBlock, [&](int64_t block, int) {
            for (int64_t r = block * kRunBlock; r < std::min((block + 1) * kRunBlock, num_runs); ++r) {
                const Run& run = voxels_.runs[r];
                for (int c = 0; c < group; ++c) {
                    const float* row = received_ + c * total_size_ + padded_run_[r];
                    float* to = sum + c * voxels_.num_voxels + run.voxel;
                    for (int32_t i = 0; i < run.length; ++i) to[i] += channel_weight[c] * (post ? post[run.voxel + i] : 1.0f) * row[i];
                }
            }
        });
    }

    void filter(int width) {
        const int64_t num_slabs = static_cast<int64_t>(slabs_.size());
        for (int parity = 0; parity < 2; ++parity) {
            pool_.run((num_slabs - parity + 1) / 2, [&](int64_t item, int) {
                const auto& slab = slabs_[2 * item + parity];
                switch (width) {
                    case 1:
                        filter_slab<1>(slab);
                        break;
                    case 2:
                        filter_slab<2>(slab);
                        break;
                    default:
                        filter_slab<4>(slab);
                        break;
                }
            });
        }
    }

    template <int C>
    void filter_slab(const std::vector<int64_t>& slab) {
        switch (num_modalities_) {
            case 1:
                return filter_chunks<C, 1>(slab);
            case 2:
                return filter_chunks<C, 2>(slab);
            case 3:
                return filter_chunks<C, 3>(slab);
            case 4:
                return filter_chunks<C, 4>(slab);
            default:
                return filter_chunks<C, 0>(slab);
        }
    }

    // M: number of modalities, 0 = any.
    template <int C, int M>
    void filter_chunks(const std::vector<int64_t>& slab) {
        constexpr int kHeld = M > 0 ? M : 1;
        const int64_t channel_stride = total_size_, row_stride = row_stride_;
        const Offset* const end = offsets_.data() + offsets_.size();
        for (const int64_t chunk : slab) {
            const float* intensity = intensity_.get() + chunk;
            const float* sent = sent_ + chunk;
            float* received = received_ + chunk;
            vfloat own_intensity[kRows][kHeld], own_sent[kRows][C], own_received[kRows][C];
            for (int r = 0; r < kRows; ++r) {
                if constexpr (M > 0)
                    for (int m = 0; m < M; ++m) own_intensity[r][m] = load(intensity + m * channel_stride + r * row_stride);
                for (int c = 0; c < C; ++c) {
                    own_sent[r][c] = load(sent + c * channel_stride + r * row_stride);
                    own_received[r][c] = vfloat{};
                }
            }
            for (const Offset* offset = offsets_.data(); offset < end; ++offset) {
                const int64_t linear = offset->linear;
                vfloat weight[kRows];
                for (int r = 0; r < kRows; ++r) weight[r] = splat_lanes(offset->exponent[r]);
                for (int m = 0; m < (M > 0 ? M : num_modalities_); ++m) {
                    const vfloat other = load(intensity + m * channel_stride + linear);
                    for (int r = 0; r < kRows; ++r) {
                        const vfloat own = M > 0 ? own_intensity[r][M > 0 ? m : 0] : load(intensity + m * channel_stride + r * row_stride);
                        const vfloat difference = own - other;
                        weight[r] -= difference * difference;
                    }
                }
                for (int r = 0; r < kRows; ++r) weight[r] = exp2_nonpositive(weight[r]);
                for (int c = 0; c < C; ++c) {
                    const vfloat other_sent = load(sent + c * channel_stride + linear);
                    vfloat other_received = load(received + c * channel_stride + linear);
                    for (int r = 0; r < kRows; ++r) {
                        own_received[r][c] += weight[r] * other_sent;
                        other_received += weight[r] * own_sent[r][c];
                    }
                    store(received + c * channel_stride + linear, other_received);
                }
            }
            for (int r = 0; r < kRows; ++r)
                for (int c = 0; c < C; ++c) {
                    float* own = received + c * channel_stride + r * row_stride;
                    store(own, load(own) + own_received[r][c]);
                }
        }
    }

    // Sums of u_n K(n, m) v_m times squared differences of features, u in `sent_`, v in `received_`, over the pairs of a slab's voxels.
    template <int C>
    void add_moments_of(const std::vector<int64_t>& slab, int num_channels, double* sums) const {
        if (num_modalities_ == 1) return add_moments<C, 1>(slab, num_channels, sums);
        if (num_modalities_ == 2) return add_moments<C, 2>(slab, num_channels, sums);
        add_moments<C, kMomentModalities>(slab, num_channels, sums);
    }

    // C, M: room for channels and modalities; loops of known length stay in registers.
    template <int C, int M>
    void add_moments(const std::vector<int64_t>& slab, int group, double* sums) const {
        constexpr int A = kMomentAxes;  // distances along axes that the box lacks are zero
        const int64_t channel_stride = total_size_, row_stride = row_stride_;
        const int num_channels = C < kMomentChannels ? C : group, num_modalities = M < kMomentModalities ? M : num_modalities_;
        for (const int64_t chunk : slab) {
            const float *intensity = intensity_.get() + chunk, *u = sent_ + chunk, *v = received_ + chunk;
            vfloat own_u[kRows][C]{}, own_v[kRows][C]{}, own_intensity[kRows][M]{}, by_modality[M]{}, by_axis[A]{};
            for (int r = 0; r < kRows; ++r) {
                for (int m = 0; m < num_modalities; ++m) own_intensity[r][m] = load(intensity + m * channel_stride + r * row_stride);
                for (int c = 0; c < num_channels; ++c) {
                    own_u[r][c] = load(u + c * channel_stride + r * row_stride);
                    own_v[r][c] = load(v + c * channel_stride + r * row_stride);
                }
            }
            for (size_t o = 0; o < offsets_.size(); ++o) {
                const int64_t linear = offsets_[o].linear;
                vfloat product[kRows]{};
                for (int c = 0; c < num_channels; ++c) {
                    const vfloat other_u = load(u + c * channel_stride + linear), other_v = load(v + c * channel_stride + linear);
                    for (int r = 0; r < kRows; ++r) product[r] += own_u[r][c] * other_v + own_v[r][c] * other_u;
                }
                vfloat weight[kRows], difference[kRows][M];
                for (int r = 0; r < kRows; ++r) weight[r] = splat_lanes(offsets_[o].exponent[r]);
                for (int m = 0; m < num_modalities; ++m) {
                    const vfloat other = load(intensity + m * channel_stride + linear);
                    for (int r = 0; r < kRows; ++r) {
                        difference[r][m] = own_intensity[r][m] - other;
                        weight[r] -= difference[r][m] * difference[r][m];
                    }
                }
                for (int r = 0; r < kRows; ++r) {
                    product[r] *= exp2_nonpositive(weight[r]);
                    for (int m = 0; m < num_modalities; ++m) by_modality[m] += product[r] * (difference[r][m] * difference[r][m]);
                    for (int a = 0; a < A; ++a) by_axis[a] += product[r] * distances_[o].squared[r][a];
                }
            }
            for (int m = 0; m < num_modalities; ++m) sums[m] += static_cast<double>(sum_lanes(by_modality[m]));
            for (int a = 0; a < voxels_.num_axes; ++a) sums[num_modalities_ + a] += static_cast<double>(sum_lanes(by_axis[a]));
        }
    }

    const Voxels& voxels_;
    ThreadPool& pool_;
    int num_modalities_;
    int64_t radius_[kMaxAxes]{}, stride_[kMaxAxes]{};
    int64_t padded_size_ = 0, total_size_ = 0, slab_size_ = 0, row_stride_ = 0, num_pairs_ = 0;
    std::vector<Offset> offsets_;
    std::vector<OffsetDistances> distances_;       // of each offset
    std::vector<int64_t> padded_run_;              // each run's place in the padded box
    std::vector<std::vector<int64_t>> slabs_;      // first voxels of the vectors to visit, slab by slab
    Buffer<float> intensity_;                      // (modality, padded voxel), scaled so that squared differences are exponents of 2
    float *sent_ = nullptr, *received_ = nullptr;  // (channel, padded voxel), in the workspace
};

}  // namespace

std::vector<WindowOffset> truncated_window(const BilateralInput& input) {
    const Voxels& voxels = *input.voxels;
    const int axes = voxels.num_axes;
    std::vector<WindowOffset> window;
    int64_t radius[kMaxAxes];
    WindowOffset offset{};
    for (int a = 0; a < axes; ++a) {
        radius[a] = window_radius(input.theta_alpha[a] / voxels.spacing[a], voxels.box_shape[a]);
        offset.distance[a] = -radius[a];
    }
    for (bool more = true; more;) {
        offset.squared = 0;
        int sign = 0;
        for (int a = 0; a < axes; ++a) {
            const double scaled = offset.distance[a] * voxels.spacing[a] / input.theta_alpha[a];
            offset.squared += scaled * scaled;
            if (sign == 0) sign = offset.distance[a] > 0 ? 1 : offset.distance[a] < 0 ? -1 : 0;
        }
        if (sign > 0 && offset.squared <= kTruncationRadius * kTruncationRadius * (1 + kRounding)) window.push_back(offset);
        more = false;
        for (int a = axes - 1; a >= 0 && !more; --a) {
            more = ++offset.distance[a] <= radius[a];
            if (!more) offset.distance[a] = -radius[a];
        }
    }
    return window;
}

double num_truncated_pairs(const BilateralInput& input) {
    // Rows of the window, counted whole: the sum over the last axis has a closed form.
    const Voxels& voxels = *input.voxels;
    const int last = voxels.num_axes - 1;
    double step[kMaxAxes];
    int64_t radius[kMaxAxes], d[kMaxAxes];
    double rows = 1;
    for (int a = 0; a <= last; ++a) {
        step[a] = voxels.spacing[a] / input.theta_alpha[a];
        radius[a] = window_radius(1 / step[a], voxels.box_shape[a]);
        d[a] = -radius[a];
        if (a < last) rows *= static_cast<double>(2 * radius[a] + 1);
    }
    if (rows > 1e6) return rows;  // far too many to be worth counting
    double count = 0;
    for (bool more = true; more;) {
        double left = kTruncationRadius * kTruncationRadius * (1 + kRounding);
        for (int a = 0; a < last; ++a) left -= d[a] * step[a] * d[a] * step[a];
        if (left >= 0) count += 1 + 2 * std::min<double>(std::floor(std::sqrt(left) / step[last]), static_cast<double>(radius[last]));
        more = false;
        for (int a = last - 1; a >= 0 && !more; --a) {
            more = ++d[a] <= radius[a];
            if (!more) d[a] = -radius[a];
        }
    }
    return (count - 1) / 2;
}

std::unique_ptr<Filter> make_truncated_filter(const BilateralInput& input, ThreadPool& pool) {
    return std::make_unique<TruncatedFilter>(input, pool);
}

}  // namespace crf
