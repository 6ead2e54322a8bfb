// The bilateral kernel as a direct sum over a window: pairs farther apart than kTruncationRadius standard deviations in space are left out,
// everything else is exact. No lattice, no build; the fastest filter if theta_alpha is a few voxels.
//
// Each unordered pair is visited once (half of the window) and its weight used in both directions; two rows of voxels share
// their loaded neighbors (window_plan.h).
#include <algorithm>
#include <cmath>

#include "cpu/simd.h"
#include "cpu/window_plan.h"

namespace crf {

namespace {

constexpr double kLog2e = 1.4426950408889634;  // exp(x) = 2^(x kLog2e)

class TruncatedFilter final : public Filter {
   public:
    TruncatedFilter(const BilateralInput& input, ThreadPool& pool)
        : voxels_(*input.voxels), pool_(pool), num_modalities_(static_cast<int>(input.intensity.size())), plan_(plan_window(input)) {
        load_intensity(input);
    }

    void accumulate(const float* values, int num_channels, const float* pre, const float* post, const float* channel_weight, float* sum,
                    Workspace& workspace) override {
        for (int c = 0; c < num_channels;) {
            const int group = num_channels - c >= 3 ? std::min(4, num_channels - c) : num_channels - c;
            const int width = group == 3 ? 4 : group;
            sent_ = workspace.floats(2 * width * plan_.total_size);
            received_ = sent_ + width * plan_.total_size;
            scatter(values + c * voxels_.num_voxels, group, width, pre);
            filter(width);
            gather(group, post, channel_weight + c, sum + c * voxels_.num_voxels);
            c += group;
        }
    }

    // Pair by pair, like the kernel's weights: only the sums are written.
    bool second_moments(const float* u, const float* v, int num_channels, double* squared, float* pull, Workspace& workspace) override {
        if (pull || num_modalities_ > kMomentModalities || voxels_.num_axes > kMomentAxes) return false;
        const int num_features = num_modalities_ + voxels_.num_axes;
        std::vector<double> sums(plan_.slabs.size() * num_features);
        for (int c = 0; c < num_channels; c += kMomentChannels) {
            const int group = std::min(kMomentChannels, num_channels - c);
            sent_ = workspace.floats(2 * group * plan_.total_size);
            received_ = sent_ + group * plan_.total_size;
            pad(u + c * voxels_.num_voxels, group, group, nullptr, sent_);
            pad(v + c * voxels_.num_voxels, group, group, nullptr, received_);
            pool_.run(static_cast<int64_t>(plan_.slabs.size()), [&](int64_t item, int) {
                double* const of_slab = sums.data() + item * num_features;
                if (group == 1) return add_moments_of<1>(plan_.slabs[item], group, of_slab);
                if (group == 2) return add_moments_of<2>(plan_.slabs[item], group, of_slab);
                add_moments_of<kMomentChannels>(plan_.slabs[item], group, of_slab);
            });
        }
        // Intensities are scaled to give exponents of 2.
        for (size_t slab = 0; slab < plan_.slabs.size(); ++slab)
            for (int f = 0; f < num_features; ++f) squared[f] += sums[slab * num_features + f] * (f < num_modalities_ ? 2 / kLog2e : 1.0);
        return true;
    }

    std::string description() const override { return "truncated (" + std::to_string(plan_.num_pairs) + " pairs per voxel)"; }

   private:
    static constexpr int kMomentChannels = 4, kMomentModalities = 4, kMomentAxes = 3;

    void load_intensity(const BilateralInput& input) {
        intensity_ = Buffer<float>(num_modalities_ * plan_.total_size);
        const int64_t origin = voxels_.runs.front().grid;
        pool_.run(num_modalities_, [&](int64_t m, int) {
            float* to = intensity_.get() + m * plan_.total_size;
            std::fill(to, to + plan_.total_size, 0.0f);
            const float* from = input.intensity[m];
            const float zero = from[origin];
            const float scale = static_cast<float>(std::sqrt(0.5 * kLog2e) / input.theta_beta[m]);
            for (size_t r = 0; r < voxels_.runs.size(); ++r) {
                const Run& run = voxels_.runs[r];
                float* row = to + plan_.padded_run[r];
                for (int32_t i = 0; i < run.length; ++i) row[i] = (from[run.grid + i] - zero) * scale;
            }
        });
    }

    void scatter(const float* values, int group, int width, const float* pre) {
        pad(values, group, width, pre, sent_);
        // The voxel itself has weight 1.
        pool_.run(width, [&](int64_t c, int) {
            std::copy(sent_ + c * plan_.total_size, sent_ + (c + 1) * plan_.total_size, received_ + c * plan_.total_size);
        });
    }

    // Compact channels into the padded box, zero around the voxels.
    void pad(const float* values, int group, int width, const float* pre, float* padded) {
        pool_.run(width, [&](int64_t c, int) {
            float* to = padded + c * plan_.total_size;
            std::fill(to, to + plan_.total_size, 0.0f);
            if (c < group) {
                const float* from = values + c * voxels_.num_voxels;
                for (size_t r = 0; r < voxels_.runs.size(); ++r) {
                    const Run& run = voxels_.runs[r];
                    float* row = to + plan_.padded_run[r];
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
                    const float* row = received_ + c * plan_.total_size + plan_.padded_run[r];
                    float* to = sum + c * voxels_.num_voxels + run.voxel;
                    for (int32_t i = 0; i < run.length; ++i) to[i] += channel_weight[c] * (post ? post[run.voxel + i] : 1.0f) * row[i];
                }
            }
        });
    }

    void filter(int width) {
        const int64_t num_slabs = static_cast<int64_t>(plan_.slabs.size());
        for (int parity = 0; parity < 2; ++parity) {
            pool_.run((num_slabs - parity + 1) / 2, [&](int64_t item, int) {
                const auto& slab = plan_.slabs[2 * item + parity];
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
        const int64_t channel_stride = plan_.total_size, row_stride = plan_.row_stride;
        const PlannedOffset* const end = plan_.offsets.data() + plan_.offsets.size();
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
            for (const PlannedOffset* offset = plan_.offsets.data(); offset < end; ++offset) {
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
        const int64_t channel_stride = plan_.total_size, row_stride = plan_.row_stride;
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
            for (size_t o = 0; o < plan_.offsets.size(); ++o) {
                const int64_t linear = plan_.offsets[o].linear;
                vfloat product[kRows]{};
                for (int c = 0; c < num_channels; ++c) {
                    const vfloat other_u = load(u + c * channel_stride + linear), other_v = load(v + c * channel_stride + linear);
                    for (int r = 0; r < kRows; ++r) product[r] += own_u[r][c] * other_v + own_v[r][c] * other_u;
                }
                vfloat weight[kRows], difference[kRows][M];
                for (int r = 0; r < kRows; ++r) weight[r] = splat_lanes(plan_.offsets[o].exponent[r]);
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
                    for (int a = 0; a < A; ++a) by_axis[a] += product[r] * plan_.distances[o].squared[r][a];
                }
            }
            for (int m = 0; m < num_modalities; ++m) sums[m] += static_cast<double>(sum_lanes(by_modality[m]));
            for (int a = 0; a < voxels_.num_axes; ++a) sums[num_modalities_ + a] += static_cast<double>(sum_lanes(by_axis[a]));
        }
    }

    const Voxels& voxels_;
    ThreadPool& pool_;
    int num_modalities_;
    const WindowPlan plan_;
    Buffer<float> intensity_;                      // (modality, padded voxel), scaled so that squared differences are exponents of 2
    float *sent_ = nullptr, *received_ = nullptr;  // (channel, padded voxel), in the workspace
};

}  // namespace

std::unique_ptr<Filter> make_truncated_filter(const BilateralInput& input, ThreadPool& pool) {
    return std::make_unique<TruncatedFilter>(input, pool);
}

}  // namespace crf
