// Moments of the truncated sum for gradients with respect to bandwidths and the image
// (filter_moments.h), pair by pair like its weights: squares of features far from their center,
// which cancel in the moment form, are never formed.
#include "cpu/brick_pairs.h"

namespace crf {
void PairSum::add_moments(int num_channels, bool pulls, const BrickRegion& region,
                          BrickMemory& memory, double* squared) const {
    load_image(1, region, memory);
    const std::vector<BrickLayout::Units>& marks = memory.channels[0].sends;
    for (int64_t plane = 0; plane < region.end[0] - region.begin[0]; ++plane)
        for (int64_t y = 0; y < region.end[1] - region.begin[1]; y += kPairRows) {
            const int64_t row = layout().row(plane, y);
            const BrickLayout::Units used = (marks[row] | marks[row + 1]) & layout().own;
            for (BrickLayout::Units left = used; left; left &= left - 1) {
                const int64_t begin =
                    row * layout().row_length + std::countr_zero(left) * layout().unit;
                for (int64_t voxel = begin; voxel < begin + layout().unit; voxel += kLanes)
                    with_constant<1, 2, kMomentModalities>(num_modalities(), [&](auto modalities) {
                        if (pulls)
                            return add_moments_of<0, modalities(), true>(voxel, num_channels,
                                                                         memory, squared);
                        with_constant<1, 2, 4, kMomentChannels, 0>(
                            num_channels, [&](auto channels) {
                                add_moments_of<channels(), modalities(), false>(voxel, num_channels,
                                                                                memory, squared);
                            });
                    });
            }
        }
}

// The pairs of a vector of voxels in each of two rows. C: number of channels, 0 = any; M: room for
// modalities. Loops of known length stay in registers.
template <int C, int M, bool kPulls>
void PairSum::add_moments_of(int64_t voxel, int any_channels, BrickMemory& memory,
                             double* squared) const {
    constexpr int kRoom = C > 0 ? C : kMomentChannels;
    const int64_t stride = layout().channel_length, row_stride = layout().row_length;
    const int num_channels = C > 0 ? C : any_channels;
    const int num_modalities = M < kMomentModalities ? M : this->num_modalities();
    const float* const image = memory.others.get() + voxel;
    const float* const u = moment_u(memory, 0) + voxel;
    const float* const v = moment_v(memory, 0) + voxel;
    float* const pulls = moment_pull(memory, 0) + voxel;
    vfloat own_u[kPairRows][kRoom]{}, own_v[kPairRows][kRoom]{}, own_image[kPairRows][M]{},
        pulled[kPairRows][M]{}, by_modality[M]{}, by_axis[kMomentAxes]{};
    for (int r = 0; r < kPairRows; ++r) {
        for (int m = 0; m < num_modalities; ++m)
            own_image[r][m] = load(image + m * stride + r * row_stride);
        for (int c = 0; c < num_channels; ++c) {
            own_u[r][c] = load(u + c * stride + r * row_stride);
            own_v[r][c] = load(v + c * stride + r * row_stride);
        }
    }
    for (size_t o = 0; o < offsets_.size(); ++o) {
        const int64_t linear = offsets_[o].linear;
        vfloat product[kPairRows]{};
        for (int c = 0; c < num_channels; ++c) {
            const vfloat other_u = load(u + c * stride + linear);
            const vfloat other_v = load(v + c * stride + linear);
            for (int r = 0; r < kPairRows; ++r)
                product[r] += own_u[r][c] * other_v + own_v[r][c] * other_u;
        }
        vfloat weight[kPairRows], difference[kPairRows][M];
        for (int r = 0; r < kPairRows; ++r) weight[r] = splat_lanes(offsets_[o].exponent[r]);
        for (int m = 0; m < num_modalities; ++m) {
            const vfloat other = load(image + m * stride + linear);
            for (int r = 0; r < kPairRows; ++r) {
                difference[r][m] = own_image[r][m] - other;
                weight[r] -= difference[r][m] * difference[r][m];
            }
        }
        for (int r = 0; r < kPairRows; ++r) {
            product[r] *= Exp2<vfloat>()(weight[r]);
            for (int m = 0; m < num_modalities; ++m)
                by_modality[m] += product[r] * (difference[r][m] * difference[r][m]);
            for (int a = 0; a < kMomentAxes; ++a)
                by_axis[a] += product[r] * distances_[o].squared[r][a];
        }
        if constexpr (kPulls)
            for (int m = 0; m < num_modalities; ++m) {
                float* const other = pulls + m * stride + linear;
                vfloat on_other = load(other);
                for (int r = 0; r < kPairRows; ++r) {
                    const vfloat pull = product[r] * difference[r][m];
                    pulled[r][m] += pull;
                    on_other -= pull;
                }
                store(other, on_other);
            }
    }
    if constexpr (kPulls)
        for (int r = 0; r < kPairRows; ++r)
            for (int m = 0; m < num_modalities; ++m) {
                float* const own = pulls + m * stride + r * row_stride;
                store(own, load(own) + pulled[r][m]);
            }
    for (int m = 0; m < num_modalities; ++m)
        squared[m] += static_cast<double>(sum_lanes(by_modality[m]));
    for (int a = 0; a < kMomentAxes; ++a)
        squared[num_modalities + a] += static_cast<double>(sum_lanes(by_axis[a]));
}

void PairSum::clear_moments(int num_channels, bool pulls, BrickMemory& memory) const {
    const int64_t length = layout().row_length;
    std::vector<BrickLayout::Units>& marks = memory.channels[0].sends;
    for (int64_t row = 0; row < layout().num_rows; ++row) {
        for (int c = 0; c < (marks[row] ? num_channels : 0); ++c) {
            std::fill_n(moment_u(memory, c) + row * length, length, 0.0f);
            std::fill_n(moment_v(memory, c) + row * length, length, 0.0f);
        }
        for (int m = 0; m < (pulls ? num_modalities() : 0); ++m)
            std::fill_n(moment_pull(memory, m) + row * length, length, 0.0f);
        marks[row] = 0;
    }
}
}  // namespace crf
