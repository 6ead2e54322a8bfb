// Moments of the truncated sum for gradients with respect to bandwidths and the image (moments.h), pair by pair like its weights: squares
// of features far from their center, which cancel in the moment form, are never formed.
#pragma once

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

}  // namespace crf
