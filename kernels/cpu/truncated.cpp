// The bilateral kernel as a direct sum over a window: pairs farther apart than kTruncationRadius
// standard deviations in space are left out. Each unordered pair is visited once and its weight
// used in both directions; two rows of voxels share their loaded neighbors.

#include "cpu/filter_moments.h"
#include "cpu/simd.h"
#include "cpu/window_plan.h"

namespace crf {
namespace {
// Moments of the truncated sum for gradients with respect to bandwidths and the image
// (filter_moments.h), pair by pair like its weights: squares of features far from their center,
// which cancel in the moment form, are never formed.

// Room for channels, modalities and axes; more modalities or axes than that need the moment form. A
// pair's weight takes longer than a channel, so that with few voxels the channels of several steps
// are summed together.
constexpr int kMomentChannels = 8, kMomentModalities = 4, kMomentAxes = 3;
constexpr int kMomentChannelsOfManyVoxels = 4;

struct WindowMoments {
    const WindowPlan& plan;
    // (modality, padded voxel), scaled so that squared differences are exponents of 2
    const float* intensity;
    int num_modalities, num_axes, num_channels;
    const float *u, *v;  // (channel, padded voxel), zero around the voxels
    // (modality, padded voxel), added to: the pull on each voxel's intensity, in the scale of
    // `intensity`; or nullptr
    float* pull;
    // (slab, feature), added to: the squared distances, those of intensities in the scale of
    // `intensity`
    double* sums;

    void add(ThreadPool& pool) const;
};

namespace {
// C: number of channels, 0 = any; M: room for modalities. Loops of known length stay in registers.
template <int C, int M, bool kPulls>
void add_slab(const WindowMoments& moments, const std::vector<WindowChunk>& slab, double* sums) {
    constexpr int kRoom = C > 0 ? C : kMomentChannels;
    constexpr int A = kMomentAxes;  // distances along axes that the box lacks are zero
    const WindowPlan& plan = moments.plan;
    const int64_t channel_stride = plan.total_size, row_stride = plan.row_stride;
    const int num_channels = C > 0 ? C : moments.num_channels;
    const int num_modalities = M < kMomentModalities ? M : moments.num_modalities;
    for (const WindowChunk& chunk : slab) {
        const float* intensity = moments.intensity + chunk.place;
        const float* u = moments.u + chunk.place;
        const float* v = moments.v + chunk.place;
        vfloat own_u[kRows][kRoom]{}, own_v[kRows][kRoom]{}, own_intensity[kRows][M]{},
            pulled[kRows][M]{}, by_modality[M]{}, by_axis[A]{};
        for (int r = 0; r < kRows; ++r) {
            for (int m = 0; m < num_modalities; ++m)
                own_intensity[r][m] = load(intensity + m * channel_stride + r * row_stride);
            for (int c = 0; c < num_channels; ++c) {
                own_u[r][c] = load(u + c * channel_stride + r * row_stride);
                own_v[r][c] = load(v + c * channel_stride + r * row_stride);
            }
        }
        for (size_t o = 0; o < plan.offsets.size(); ++o) {
            const int64_t linear = plan.offsets[o].linear;
            vfloat product[kRows]{};
            for (int c = 0; c < num_channels; ++c) {
                const vfloat other_u = load(u + c * channel_stride + linear);
                const vfloat other_v = load(v + c * channel_stride + linear);
                for (int r = 0; r < kRows; ++r)
                    product[r] += own_u[r][c] * other_v + own_v[r][c] * other_u;
            }
            vfloat weight[kRows], difference[kRows][M];
            for (int r = 0; r < kRows; ++r) weight[r] = splat_lanes(plan.offsets[o].exponent[r]);
            for (int m = 0; m < num_modalities; ++m) {
                const vfloat other = load(intensity + m * channel_stride + linear);
                for (int r = 0; r < kRows; ++r) {
                    difference[r][m] = own_intensity[r][m] - other;
                    weight[r] -= difference[r][m] * difference[r][m];
                }
            }
            for (int r = 0; r < kRows; ++r) {
                product[r] *= exp2_nonpositive(weight[r]);
                for (int m = 0; m < num_modalities; ++m)
                    by_modality[m] += product[r] * (difference[r][m] * difference[r][m]);
                for (int a = 0; a < A; ++a)
                    by_axis[a] += product[r] * plan.distances[o].squared[r][a];
            }
            if constexpr (kPulls)
                for (int m = 0; m < num_modalities; ++m) {
                    float* const other = moments.pull + m * channel_stride + chunk.place + linear;
                    vfloat on_other = load(other);
                    for (int r = 0; r < kRows; ++r) {
                        const vfloat pull = product[r] * difference[r][m];
                        pulled[r][m] += pull;
                        on_other -= pull;
                    }
                    store(other, on_other);
                }
        }
        if constexpr (kPulls)
            for (int r = 0; r < kRows; ++r)
                for (int m = 0; m < num_modalities; ++m) {
                    float* const own =
                        moments.pull + m * channel_stride + chunk.place + r * row_stride;
                    store(own, load(own) + pulled[r][m]);
                }
        for (int m = 0; m < num_modalities; ++m)
            sums[m] += static_cast<double>(sum_lanes(by_modality[m]));
        for (int a = 0; a < moments.num_axes; ++a)
            sums[moments.num_modalities + a] += static_cast<double>(sum_lanes(by_axis[a]));
    }
}
}  // namespace

void WindowMoments::add(ThreadPool& pool) const {
    const int64_t num_slabs = static_cast<int64_t>(plan.slabs.size());
    const int64_t num_features = num_modalities + num_axes;
    // A slab's pairs reach into the next slab: where both would write, every second one first.
    const int num_turns = pull ? 2 : 1;
    for (int turn = 0; turn < num_turns; ++turn)
        pool.run((num_slabs - turn + num_turns - 1) / num_turns, [&](int64_t item, int) {
            const int64_t number = item * num_turns + turn;
            const std::vector<WindowChunk>& slab = plan.slabs[number];
            double* const of_slab = sums + number * num_features;
            with_constant<1, 2, kMomentModalities>(num_modalities, [&](auto modalities) {
                if (pull) return add_slab<0, modalities(), true>(*this, slab, of_slab);
                with_constant<1, 2, 4, kMomentChannels, 0>(num_channels, [&](auto channels) {
                    add_slab<channels(), modalities(), false>(*this, slab, of_slab);
                });
            });
        });
}

class TruncatedFilter final : public Filter {
   public:
    TruncatedFilter(const BilateralInput& input, ThreadPool& pool)
        : Filter(traits_of(input)),
          voxels_(*input.voxels),
          pool_(pool),
          num_modalities_(static_cast<int>(input.intensity.size())),
          has_moments_(has_moments(input)),
          plan_(plan_window(input)) {
        load_intensity(input);
    }

    void accumulate(const float* values, int num_channels, const float* pre, const float* post,
                    const float* channel_weight, float* sum, Workspace& workspace) override {
        WindowOccupancy occupancy(plan_, std::min(kChannelGroup, num_channels));
        for (int c = 0; c < num_channels; c += kChannelGroup) {
            const int group = std::min(kChannelGroup, num_channels - c);
            sent_ = workspace.floats(2 * group * plan_.total_size);
            received_ = sent_ + group * plan_.total_size;
            scatter(values + c * voxels_.num_voxels, group, pre, occupancy);
            filter(group, occupancy);
            gather(group, post, channel_weight + c, sum + c * voxels_.num_voxels, occupancy);
        }
    }

    void add_moments(const FilteredPair& pair, const FeatureColumns& features, double* squared,
                     float* image, MomentSums& sums) override {
        if (!has_moments_) return Filter::add_moments(pair, features, squared, image, sums);
        float* const pull = sums.cleared_pull(features, image);
        add_pairs(pair.u, pair.v, pair.num_channels, squared, pull, sums.workspace());
        sums.add_pull(features, image);
    }

    std::string description() const override {
        return "truncated (" + std::to_string(plan_.num_pairs) + " pairs per voxel)";
    }

   private:
    static FilterTraits traits_of(const BilateralInput& input) {
        FilterTraits traits{.shares_weights = true};
        if (has_moments(input) && input.voxels->num_voxels <= kFewVoxels)
            traits.num_moment_channels = kMomentChannels;
        return traits;
    }

    static bool has_moments(const BilateralInput& input) {
        return static_cast<int>(input.intensity.size()) <= kMomentModalities &&
               input.voxels->num_axes <= kMomentAxes;
    }

    // The sums of `add_moments`. pull: (modality, voxel), added to, or nullptr.
    void add_pairs(const float* u, const float* v, int num_channels, double* squared, float* pull,
                   Workspace& workspace) {
        const int num_features = num_modalities_ + voxels_.num_axes;
        const int room =
            voxels_.num_voxels <= kFewVoxels ? kMomentChannels : kMomentChannelsOfManyVoxels;
        const int most = std::min(room, num_channels);
        const int64_t num_pulls = pull ? num_modalities_ * plan_.total_size : 0;
        std::vector<double> sums(plan_.slabs.size() * num_features);
        float* const pulls = workspace.floats(num_pulls + 2 * most * plan_.total_size);
        float* const padded_u = pulls + num_pulls;
        float* const padded_v = padded_u + most * plan_.total_size;
        std::fill(pulls, pulls + num_pulls, 0.0f);
        for (int c = 0; c < num_channels; c += room) {
            const int group = std::min(room, num_channels - c);
            pool_.run(group, [&](int64_t i, int) {
                pad(u + (c + i) * voxels_.num_voxels, nullptr, padded_u + i * plan_.total_size);
                pad(v + (c + i) * voxels_.num_voxels, nullptr, padded_v + i * plan_.total_size);
            });
            const WindowMoments moments{.plan = plan_,
                                        .intensity = intensity_.get(),
                                        .num_modalities = num_modalities_,
                                        .num_axes = voxels_.num_axes,
                                        .num_channels = group,
                                        .u = padded_u,
                                        .v = padded_v,
                                        .pull = pull ? pulls : nullptr,
                                        .sums = sums.data()};
            moments.add(pool_);
        }
        // Intensities are scaled to give exponents of 2.
        for (size_t slab = 0; slab < plan_.slabs.size(); ++slab)
            for (int f = 0; f < num_features; ++f)
                squared[f] +=
                    sums[slab * num_features + f] * (f < num_modalities_ ? 2 / kLog2e : 1.0);
        if (pull) add_pulls(pulls, pull);
    }

    void load_intensity(const BilateralInput& input) {
        intensity_ = Buffer<float>(num_modalities_ * plan_.total_size);
        const int64_t origin = voxels_.runs.front().grid;
        pool_.run(num_modalities_, [&](int64_t m, int) {
            float* to = intensity_.get() + m * plan_.total_size;
            std::fill(to, to + plan_.total_size, 0.0f);
            const float* from = input.intensity[m];
            const float zero = from[origin];
            const float scale = static_cast<float>(kSqrtHalfLog2e / input.theta_beta[m]);
            for (size_t r = 0; r < voxels_.runs.size(); ++r) {
                const Run& run = voxels_.runs[r];
                float* row = to + plan_.padded_run[r];
                for (int32_t i = 0; i < run.length; ++i)
                    row[i] = (from[run.grid + i] - zero) * scale;
            }
        });
    }

    void scatter(const float* values, int group, const float* pre, WindowOccupancy& occupancy) {
        pool_.run(group, [&](int64_t c, int) {
            float* sent = sent_ + c * plan_.total_size;
            pad(values + c * voxels_.num_voxels, pre, sent);
            // The voxel itself has weight 1.
            std::copy(sent, sent + plan_.total_size, received_ + c * plan_.total_size);
            occupancy.find(static_cast<int>(c), voxels_, sent);
        });
    }

    // A compact channel into the padded box, zero around the voxels.
    void pad(const float* values, const float* pre, float* padded) const {
        std::fill(padded, padded + plan_.total_size, 0.0f);
        for (size_t r = 0; r < voxels_.runs.size(); ++r) {
            const Run& run = voxels_.runs[r];
            float* row = padded + plan_.padded_run[r];
            for (int32_t i = 0; i < run.length; ++i)
                row[i] = values[run.voxel + i] * (pre ? pre[run.voxel + i] : 1.0f);
        }
    }

    // From the padded box and the scale of the intensities to the compact features.
    void add_pulls(const float* padded, float* pull) const {
        const float unscale = static_cast<float>(1 / kSqrtHalfLog2e);
        pool_.run(num_modalities_, [&](int64_t m, int) {
            for (size_t r = 0; r < voxels_.runs.size(); ++r) {
                const Run& run = voxels_.runs[r];
                const float* row = padded + m * plan_.total_size + plan_.padded_run[r];
                float* to = pull + m * voxels_.num_voxels + run.voxel;
                for (int32_t i = 0; i < run.length; ++i) to[i] += row[i] * unscale;
            }
        });
    }

    void gather(int group, const float* post, const float* channel_weight, float* sum,
                const WindowOccupancy& occupancy) {
        const int64_t num_runs = static_cast<int64_t>(voxels_.runs.size());
        pool_.run((num_runs + kRunBlock - 1) / kRunBlock, [&](int64_t block, int) {
            for (int64_t r = block * kRunBlock; r < std::min((block + 1) * kRunBlock, num_runs);
                 ++r) {
                const Run& run = voxels_.runs[r];
                const int64_t place = plan_.padded_run[r];
                const int64_t num_blocks = (place % kLanes + run.length + kLanes - 1) / kLanes;
                for (int c = 0; c < group; ++c) {
                    if (!occupancy.receives(c, plan_.run_block[r], num_blocks)) continue;
                    const float* row = received_ + c * plan_.total_size + place;
                    float* to = sum + c * voxels_.num_voxels + run.voxel;
                    for (int32_t i = 0; i < run.length; ++i)
                        to[i] += channel_weight[c] * (post ? post[run.voxel + i] : 1.0f) * row[i];
                }
            }
        });
    }

    void filter(int group, const WindowOccupancy& occupancy) {
        const int64_t num_slabs = static_cast<int64_t>(plan_.slabs.size());
        for (int parity = 0; parity < 2; ++parity) {
            pool_.run((num_slabs - parity + 1) / 2, [&](int64_t item, int) {
                const std::vector<WindowChunk>& slab = plan_.slabs[2 * item + parity];
                const WindowChunk *chunk = slab.data(), *const end = chunk + slab.size();
                while (chunk < end) {
                    const Channels channels = occupied_channels(*chunk, group, occupancy);
                    const WindowChunk* const first = chunk;
                    do ++chunk;
                    while (chunk < end && occupied_channels(*chunk, group, occupancy) == channels);
                    filter_channels(first, chunk, channels);
                }
            });
        }
    }

    // Channels first, first + step, ...
    struct Channels {
        int count, first, step;
        bool operator==(const Channels&) const = default;
    };

    // Channels that are zero at all voxels concerned are left out, as they would only add zeros;
    // all others are in.
    static Channels occupied_channels(const WindowChunk& chunk, int group,
                                      const WindowOccupancy& occupancy) {
        int count = 0, first = 0, last = 0;
        for (int c = 0; c < group; ++c)
            if (occupancy.has_pairs(c, chunk.block)) {
                if (count++ == 0) first = c;
                last = c;
            }
        if (count == 2) return {2, first, last - first};
        if (count == 3 && last - first == 3) return {4, 0, 1};
        return {count, first, 1};
    }

    void filter_channels(const WindowChunk* begin, const WindowChunk* end,
                         const Channels& channels) {
        if (channels.count == 0) return;
        with_constant<1, 2, 3, kChannelGroup>(channels.count, [&](auto count) {
            with_constant<kHasWideRegisters, 2 * kHasWideRegisters, 3 * kHasWideRegisters,
                          4 * kHasWideRegisters, 0>(num_modalities_, [&](auto modalities) {
                filter_chunks<count(), modalities()>(begin, end, channels);
            });
        });
    }

    // A register of voxels in each of kRows rows: more would not stay in registers while their
    // pairs are visited.
    template <int C, int M>
    struct Own {
        vregister intensity[kRows][M > 0 ? M : 1], sent[kRows][C], received[kRows][C];
    };
    static vregister load_register(const float* from) { return load_lanes<vregister>(from); }

    // All pairs of the chunks' voxels. M: number of modalities, 0 = any.
    template <int C, int M>
    void filter_chunks(const WindowChunk* begin, const WindowChunk* end, const Channels& channels) {
        constexpr int64_t kPart = sizeof(vregister) / sizeof(float);
        const int64_t modality_stride = plan_.total_size;
        const int64_t channel_stride = channels.step * plan_.total_size;
        const int64_t row_stride = plan_.row_stride;
        const int64_t row_length = voxels_.box_shape[voxels_.num_axes - 1];
        constexpr std::integral_constant<int, 0> kFirst;
        constexpr std::integral_constant<int, 1> kSecond;
        constexpr std::integral_constant<int, kRows> kEnd;
        const PlannedOffset* const offsets = plan_.offsets.data();
        const PlannedOffset* const last = offsets + plan_.offsets.size();
        const PlannedOffset* const first_only = offsets + plan_.num_of_both;
        const PlannedOffset* const second_only = first_only + plan_.num_of_first;
        for (const WindowChunk* chunk = begin; chunk < end; ++chunk) {
            const int64_t row_end =
                chunk->place + std::min<int64_t>(kLanes, row_length - chunk->place % row_stride);
            for (int64_t place = chunk->place; place < row_end; place += kPart) {
                const float* intensity = intensity_.get() + place;
                const float* sent = sent_ + channels.first * plan_.total_size + place;
                float* received = received_ + channels.first * plan_.total_size + place;
                Own<C, M> own;
                for (int r = 0; r < kRows; ++r) {
                    if constexpr (M > 0)
                        for (int m = 0; m < M; ++m)
                            own.intensity[r][m] =
                                load_register(intensity + m * modality_stride + r * row_stride);
                    for (int c = 0; c < C; ++c) {
                        own.sent[r][c] = load_register(sent + c * channel_stride + r * row_stride);
                        own.received[r][c] = vregister{};
                    }
                }
                const auto add = [&](auto begin_row, auto end_row, const PlannedOffset* offset,
                                     const PlannedOffset* end_offset) {
                    for (; offset < end_offset; ++offset)
                        add_pairs<begin_row(), end_row()>(*offset, modality_stride, channel_stride,
                                                          intensity, sent, received, own);
                };
                // At the window's ends only one of the rows has a pair: a sixth of the work, if the
                // bandwidth is 1.5 voxels.
                add(kFirst, kEnd, offsets, first_only);
                add(kFirst, kSecond, first_only, second_only);
                add(kSecond, kEnd, second_only, last);
                for (int r = 0; r < kRows; ++r)
                    for (int c = 0; c < C; ++c) {
                        float* to = received + c * channel_stride + r * row_stride;
                        store_lanes(to, load_register(to) + own.received[r][c]);
                    }
            }
        }
    }

    // The pairs of rows First to End - 1 at one offset.
    template <int First, int End, int C, int M>
    [[gnu::always_inline]] inline void add_pairs(const PlannedOffset& offset,
                                                 int64_t modality_stride, int64_t channel_stride,
                                                 const float* intensity, const float* sent,
                                                 float* received, Own<C, M>& own) const {
        const int64_t linear = offset.linear;
        vregister weight[kRows];
        for (int r = First; r < End; ++r) weight[r] = splat<vregister>(offset.exponent[r]);
        for (int m = 0; m < (M > 0 ? M : num_modalities_); ++m) {
            const vregister other = load_register(intensity + m * modality_stride + linear);
            for (int r = First; r < End; ++r) {
                const vregister difference =
                    (M > 0
                         ? own.intensity[r][M > 0 ? m : 0]
                         : load_register(intensity + m * modality_stride + r * plan_.row_stride)) -
                    other;
                weight[r] -= difference * difference;
            }
        }
        for (int r = First; r < End; ++r) weight[r] = exp2_nonpositive(weight[r]);
        for (int c = 0; c < C; ++c) {
            const vregister other_sent = load_register(sent + c * channel_stride + linear);
            vregister other_received = load_register(received + c * channel_stride + linear);
            for (int r = First; r < End; ++r) {
                own.received[r][c] += weight[r] * other_sent;
                other_received += weight[r] * own.sent[r][c];
            }
            store_lanes(received + c * channel_stride + linear, other_received);
        }
    }

    const Voxels& voxels_;
    ThreadPool& pool_;
    int num_modalities_;
    const bool has_moments_;  // there is room for its modalities and axes
    const WindowPlan plan_;
    // (modality, padded voxel), scaled so that squared differences are exponents of 2
    Buffer<float> intensity_;
    float *sent_ = nullptr, *received_ = nullptr;  // (channel, padded voxel), in the workspace
};
}  // namespace

std::unique_ptr<Filter> make_truncated_filter(const BilateralInput& input, ThreadPool& pool) {
    return std::make_unique<TruncatedFilter>(input, pool);
}
}  // namespace crf
