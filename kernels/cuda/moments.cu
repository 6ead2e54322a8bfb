// Gradients of a filter's sums with respect to its bandwidths and the image, in moment form (docs/reference/math.md, section 9), for a pair
// u = factor * g and v = sent_factor * q of (channel, voxel) values that the filter has summed already.
//
// CRF_CHANNELS, CRF_WIDTH: channels of g and q, and those side by side. CRF_TOGETHER: features that are filtered together, each times all
// channels; more than one only if all are in one row. CRF_MOMENTS: channels side by side of these.
#include "cuda/launch.h"

namespace crf {

using Channels = Row<CRF_WIDTH>;
using Moments = Row<CRF_MOMENTS>;
constexpr int kChannels = CRF_CHANNELS;
constexpr int kTogether = CRF_TOGETHER;
constexpr int kGroups = (kChannels + CRF_WIDTH - 1) / CRF_WIDTH;  // if one feature is filtered at a time

// One thread per voxel: the centered features of a kernel, intensities first, box axes last.
//
// image: (modality, *grid). mean, inverse_theta: (modality). box_shape, step, middle: (axis), distance of neighbors in bandwidths, and the
// place of the center. columns: (modality + axis, voxel).
CRF_KERNEL(center_features, const Real* image, int64 grid_size, const int64* grid_index, const int64* box_index, int64 num_voxels,
           int num_modalities, const double* mean, const double* inverse_theta, int num_axes, const int64* box_shape, const double* step,
           const double* middle, Real* columns) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    for (int m = 0; m < num_modalities; ++m)
        columns[m * num_voxels + n] =
            static_cast<Real>((static_cast<double>(image[m * grid_size + grid_index[n]]) - mean[m]) * inverse_theta[m]);
    int64 rest = box_index[n];
    for (int a = num_axes - 1; a >= 0; --a) {
        const double coordinate = static_cast<double>(rest % box_shape[a]);
        rest /= box_shape[a];
        columns[(num_modalities + a) * num_voxels + n] = static_cast<Real>((coordinate - middle[a]) * step[a]);
    }
}

// One thread per voxel: features times values, channel j * CRF_CHANNELS + c for feature j.
//
// factor: (voxel), or nullptr for ones. columns: (feature, voxel) of those that are filtered together.
CRF_KERNEL(place_moments, const Channels* values, const Real* factor, const Real* columns, int64 num_voxels, Moments* rows) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const Real own = factor ? factor[n] : Real(1.0);
    if (kTogether == 1) {
        const Real x = own * columns[n];
        CRF_ROLLED
        for (int g = 0; g < kGroups; ++g) {
            const Channels from = values[g * num_voxels + n];
            Moments row = zero_row<CRF_MOMENTS>();
            CRF_UNROLL
            for (int c = 0; c < CRF_WIDTH && c < CRF_MOMENTS; ++c) row.value[c] = x * from.value[c];
            rows[g * num_voxels + n] = row;
        }
        return;
    }
    const Channels from = values[n];
    Moments row = zero_row<CRF_MOMENTS>();
    CRF_UNROLL
    for (int j = 0; j < kTogether; ++j) {
        const Real x = own * columns[j * num_voxels + n];
        CRF_UNROLL
        for (int c = 0; c < kChannels; ++c)
            if (c < CRF_WIDTH && j * kChannels + c < CRF_MOMENTS) row.value[j * kChannels + c] = x * from.value[c];
    }
    rows[n] = row;
}

// Each thread takes every num_threads-th voxel: products of what was filtered and the other value of the pair, summed over the channels.
//
// filtered: the filter's sums of rows from place_moments (or of the values, for a kernel whose taps are differentiated). other, factor: the
// other value of the pair. columns: (feature, voxel), or nullptr for ones. coefficient: of the sums. partial: (feature, thread), added to;
// nullptr: no sums. by_image: (feature, voxel), added to; nullptr: not asked for. inverse_theta: (feature), for it.
CRF_KERNEL(add_moments, const Moments* filtered, const Channels* other, const Real* factor, const Real* columns, int64 num_voxels,
           double coefficient, int64 num_threads, double* partial, const double* inverse_theta, Real* by_image) {
    const int64 thread = thread_number();
    if (thread >= num_threads) return;
    double sums[kTogether] = {};
    for (int64 n = thread; n < num_voxels; n += num_threads) {
        Real dot[kTogether] = {};
        if (kTogether == 1) {
            CRF_ROLLED
            for (int g = 0; g < kGroups; ++g) {
                const Moments row = filtered[g * num_voxels + n];
                const Channels with = other[g * num_voxels + n];
                CRF_UNROLL
                for (int c = 0; c < CRF_WIDTH && c < CRF_MOMENTS; ++c) dot[0] += row.value[c] * with.value[c];
            }
        } else {
            const Moments row = filtered[n];
            const Channels with = other[n];
            CRF_UNROLL
            for (int j = 0; j < kTogether; ++j) {
                CRF_UNROLL
                for (int c = 0; c < kChannels; ++c)
                    if (c < CRF_WIDTH && j * kChannels + c < CRF_MOMENTS) dot[j] += row.value[j * kChannels + c] * with.value[c];
            }
        }
        const Real own = factor ? factor[n] : Real(1.0);
        CRF_UNROLL
        for (int j = 0; j < kTogether; ++j) {
            const Real found = own * dot[j];
            if (partial) sums[j] += static_cast<double>(columns ? columns[j * num_voxels + n] * found : found);
            if (by_image) by_image[j * num_voxels + n] += found * static_cast<Real>(inverse_theta[j]);
        }
    }
    if (!partial) return;
    CRF_UNROLL
    for (int j = 0; j < kTogether; ++j) partial[j * num_threads + thread] += coefficient * sums[j];
}

// One thread per voxel, after the steps and the filtering of by_ones: the gradient with respect to a kernel's row sums D.
//
// Symmetric: the scale is D^-1/2, on both sides; after: D^-1, on the receiving side.
//
// scale: (voxel), or nullptr: no normalization. ones, by_ones: (voxel) message of all ones and its gradient; filtered_back: the transpose's
// sums of by_ones times the scale. by_received, by_sent: (voxel) sums over the steps, as from take_messages. by_degree: (voxel); nullptr
// without a scale. squares: (voxel) what the square of a feature is multiplied with; nullptr: not asked for. by_degree may be by_ones, and
// squares may be by_received.
CRF_KERNEL(differentiate_scale, const Real* scale, int scales_sent, const Real* ones, const Real* by_ones, const Real* filtered_back,
           const Real* by_received, const Real* by_sent, int64 num_voxels, Real* by_degree, Real* squares) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const Real s = scale ? scale[n] : Real(1.0), sent_scale = scales_sent ? s : Real(1.0);
    const Real received = (by_received ? by_received[n] : Real(0.0)) + by_ones[n] * (ones[n] / s);
    const Real sent = (by_sent ? by_sent[n] : Real(0.0)) + filtered_back[n];
    Real square = s * received + sent_scale * sent;
    if (scale) {
        const Real found = scales_sent ? Real(-0.5) * s * s * s * (received + sent) : -s * s * received;
        by_degree[n] = found;
        square += found * (scales_sent ? Real(1.0) / (s * s) : Real(1.0) / s);
    }
    if (squares) squares[n] = square;
}

// One thread per feature and remainder modulo num_threads: the part of the moments with the squares of the features.
//
// squares: (voxel), as from differentiate_scale; also_squares: (voxel), added to it, or nullptr. columns: (feature, voxel). partial:
// (feature, thread), added to. by_image: (modality, voxel), added to; nullptr: not asked for.
CRF_KERNEL(add_squares, const Real* squares, const Real* also_squares, const Real* columns, int64 num_voxels, int num_features,
           int64 num_threads, double* partial, int num_modalities, const double* inverse_theta, Real* by_image) {
    const int64 i = thread_number();
    if (i >= num_features * num_threads) return;
    const int64 f = i / num_threads;
    double total = 0.0;
    for (int64 n = i % num_threads; n < num_voxels; n += num_threads) {
        const Real x = columns[f * num_voxels + n], found = x * (also_squares ? squares[n] + also_squares[n] : squares[n]);
        total += static_cast<double>(x * found);
        if (by_image && f < num_modalities) by_image[f * num_voxels + n] -= found * static_cast<Real>(inverse_theta[f]);
    }
    partial[i] += total;
}

}  // namespace crf
