// Moments of the truncated sum for gradients with respect to bandwidths and the image (moments.h), pair by pair like its weights: squares
// of features far from their center, which cancel in the moment form, are never formed.
#pragma once

#include "cpu/simd.h"
#include "cpu/window_plan.h"

namespace crf {

// Room for channels, modalities and axes; more modalities or axes than that need the moment form. A pair's weight takes longer than a
// channel, so that with few voxels the channels of several steps are summed together.
constexpr int kMomentChannels = 8, kMomentModalities = 4, kMomentAxes = 3;
constexpr int kMomentChannelsOfManyVoxels = 4;

struct WindowMoments {
    const WindowPlan& plan;
    const float* intensity;  // (modality, padded voxel), scaled so that squared differences are exponents of 2
    int num_modalities, num_axes, num_channels;
    const float *u, *v;  // (channel, padded voxel), zero around the voxels
    float* pull;         // (modality, padded voxel), added to: the pull on each voxel's intensity, in the scale of `intensity`; or nullptr
    double* sums;        // (slab, feature), added to: the squared distances, those of intensities in the scale of `intensity`

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
        const float *intensity = moments.intensity + chunk.place, *u = moments.u + chunk.place, *v = moments.v + chunk.place;
        vfloat own_u[kRows][kRoom]{}, own_v[kRows][kRoom]{}, own_intensity[kRows][M]{}, pulled[kRows][M]{}, by_modality[M]{}, by_axis[A]{};
        for (int r = 0; r < kRows; ++r) {
            for (int m = 0; m < num_modalities; ++m) own_intensity[r][m] = load(intensity + m * channel_stride + r * row_stride);
            for (int c = 0; c < num_channels; ++c) {
                own_u[r][c] = load(u + c * channel_stride + r * row_stride);
                own_v[r][c] = load(v + c * channel_stride + r * row_stride);
            }
        }
        for (size_t o = 0; o < plan.offsets.size(); ++o) {
            const int64_t linear = plan.offsets[o].linear;
            vfloat product[kRows]{};
            for (int c = 0; c < num_channels; ++c) {
                const vfloat other_u = load(u + c * channel_stride + linear), other_v = load(v + c * channel_stride + linear);
                for (int r = 0; r < kRows; ++r) product[r] += own_u[r][c] * other_v + own_v[r][c] * other_u;
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
                for (int m = 0; m < num_modalities; ++m) by_modality[m] += product[r] * (difference[r][m] * difference[r][m]);
                for (int a = 0; a < A; ++a) by_axis[a] += product[r] * plan.distances[o].squared[r][a];
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
                    float* const own = moments.pull + m * channel_stride + chunk.place + r * row_stride;
                    store(own, load(own) + pulled[r][m]);
                }
        for (int m = 0; m < num_modalities; ++m) sums[m] += static_cast<double>(sum_lanes(by_modality[m]));
        for (int a = 0; a < moments.num_axes; ++a) sums[moments.num_modalities + a] += static_cast<double>(sum_lanes(by_axis[a]));
    }
}

}  // namespace

void WindowMoments::add(ThreadPool& pool) const {
    const int64_t num_slabs = static_cast<int64_t>(plan.slabs.size()), num_features = num_modalities + num_axes;
    // A slab's pairs reach into the next slab: where both would write, every second one first.
    const int num_turns = pull ? 2 : 1;
    for (int turn = 0; turn < num_turns; ++turn)
        pool.run((num_slabs - turn + num_turns - 1) / num_turns, [&](int64_t item, int) {
            const int64_t number = item * num_turns + turn;
            const std::vector<WindowChunk>& slab = plan.slabs[number];
            double* const of_slab = sums + number * num_features;
            with_constant<1, 2, kMomentModalities>(num_modalities, [&](auto modalities) {
                if (pull) return add_slab<0, modalities(), true>(*this, slab, of_slab);
                with_constant<1, 2, 4, kMomentChannels, 0>(
                    num_channels, [&](auto channels) { add_slab<channels(), modalities(), false>(*this, slab, of_slab); });
            });
        });
}

}  // namespace crf
