// Gradients of a filter's sums with respect to its bandwidths and its features, in moment form
// (docs/reference/math.md, section 9), for a pair u = factor * g and v = sent_factor * q of
// (channel, voxel) values. CRF_WIDTH: channels that are filtered together.
#include "cuda/launch.h"

namespace crf {
using Channels = Row<CRF_WIDTH>;

// Each thread takes every num_threads-th voxel: products of the filtered value and the other value
// of the pair, summed over the channels, for a kernel whose taps are differentiated. filtered:
// (group, voxel) the filter's sums of the values. other, factor: the other value of the pair.
// partial: (thread), added to.
CRF_KERNEL(add_moments, const Channels* filtered, const Channels* other, int num_groups,
           const Real* factor, int64 num_voxels, int64 num_threads, double* partial) {
    const int64 thread = thread_number();
    if (thread >= num_threads) return;
    double sum = 0.0;
    for (int64 n = thread; n < num_voxels; n += num_threads) {
        Real dot = Real(0.0);
        for (int g = 0; g < num_groups; ++g) {
            const Channels row = filtered[g * num_voxels + n], with = other[g * num_voxels + n];
            CRF_UNROLL
            for (int c = 0; c < CRF_WIDTH; ++c) dot += row.value[c] * with.value[c];
        }
        sum += static_cast<double>(factor ? factor[n] * dot : dot);
    }
    partial[thread] += sum;
}

// Channel c of the products of features and values: value c % num_values times feature
// c / num_values.
struct Product {
    int feature, value;
    CRF_D Product(int channel, int num_values)
        : feature(channel / num_values), value(channel % num_values) {}
};

// The number of a value in rows of `width` channels, (group, voxel).
CRF_D int64 place_in_rows(int value, int width, int64 num_voxels, int64 n) {
    return (value / width * num_voxels + n) * width + value % width;
}

// One thread per voxel: its row of the products from channel `first` on; zero beyond the last one.
// values: (group, voxel) rows of `width` channels. factor: (voxel) of the values, or nullptr.
// columns: (feature, voxel).
CRF_KERNEL(multiply_columns, const Real* values, int width, int num_values, const Real* factor,
           const Real* columns, int num_features, int64 num_voxels, int first, Channels* rows) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    Channels row = zero_row<CRF_WIDTH>();
    CRF_UNROLL
    for (int c = 0; c < CRF_WIDTH; ++c) {
        const Product product(first + c, num_values);
        if (product.feature >= num_features) continue;
        const Real value = values[place_in_rows(product.value, width, num_voxels, n)];
        const Real column = columns[product.feature * num_voxels + n];
        row.value[c] = factor ? factor[n] * column * value : column * value;
    }
    rows[n] = row;
}

// Each thread takes every num_threads-th voxel: the products of the filtered channels from `first`
// on and the other values of the pair, added to the sums of the features' bandwidths and to the
// image's gradient. filtered: the filter's sums of what multiply_columns has made. other: (group,
// voxel) rows of `width` channels. factor: (voxel) of the other values, or nullptr. partial:
// (feature, thread), from which twice the sums are taken; nullptr: no sums. inverse_theta:
// (feature). by_image: (modality, voxel), added to, for the features that are modalities; nullptr:
// not asked for.
CRF_KERNEL(add_columns, const Channels* filtered, const Real* other, int width, int num_values,
           const Real* factor, const Real* columns, int num_features, int64 num_voxels, int first,
           int64 num_threads, double* partial, const double* inverse_theta, int num_modalities,
           Real* by_image) {
    const int64 thread = thread_number();
    if (thread >= num_threads) return;
    double sums[CRF_WIDTH] = {};
    for (int64 n = thread; n < num_voxels; n += num_threads) {
        const Channels row = filtered[n];
        CRF_UNROLL
        for (int c = 0; c < CRF_WIDTH; ++c) {
            const Product product(first + c, num_values);
            if (product.feature >= num_features) continue;
            const Real with = other[place_in_rows(product.value, width, num_voxels, n)];
            const Real dot = row.value[c] * with;
            const Real found = factor ? factor[n] * dot : dot;
            const int64 place = product.feature * num_voxels + n;
            if (partial) sums[c] += static_cast<double>(columns[place] * found);
            if (by_image && product.feature < num_modalities)
                by_image[place] += found * static_cast<Real>(inverse_theta[product.feature]);
        }
    }
    if (!partial) return;
    CRF_UNROLL
    for (int c = 0; c < CRF_WIDTH; ++c) {
        const Product product(first + c, num_values);
        if (product.feature < num_features)
            partial[product.feature * num_threads + thread] -= 2.0 * sums[c];
    }
}

// One thread per voxel, after the steps and the filtering of by_ones: the gradient with respect to
// a kernel's row sums D. Symmetric: the scale is D^-1/2, on both sides; after: D^-1, on the
// receiving side. scale: (voxel), or nullptr: no normalization. ones, by_ones: (voxel) message of
// all ones and its gradient; filtered_back: the transpose's sums of by_ones times the scale.
// by_received, by_sent: (voxel) sums over the steps, as from take_messages. by_degree: (voxel);
// nullptr without a scale. squares: (voxel) factors of the squares of the features; nullptr: not
// asked for. by_degree may be by_ones, and squares may be by_received.
CRF_KERNEL(differentiate_scale, const Real* scale, int scales_sent, const Real* ones,
           const Real* by_ones, const Real* filtered_back, const Real* by_received,
           const Real* by_sent, int64 num_voxels, Real* by_degree, Real* squares) {
    const int64 n = thread_number();
    if (n >= num_voxels) return;
    const Real s = scale ? scale[n] : Real(1.0), sent_scale = scales_sent ? s : Real(1.0);
    const Real received = (by_received ? by_received[n] : Real(0.0)) + by_ones[n] * (ones[n] / s);
    const Real sent = (by_sent ? by_sent[n] : Real(0.0)) + filtered_back[n];
    Real square = s * received + sent_scale * sent;
    if (scale) {
        const Real found =
            scales_sent ? Real(-0.5) * s * s * s * (received + sent) : -s * s * received;
        by_degree[n] = found;
        square += found * (scales_sent ? Real(1.0) / (s * s) : Real(1.0) / s);
    }
    if (squares) squares[n] = square;
}

// One thread per feature and remainder modulo num_threads: the part of the moments with the squares
// of the features. squares: (voxel), as from differentiate_scale; also_squares: (voxel), added to
// it, or nullptr. columns: (feature, voxel). partial: (feature, thread), added to. by_image:
// (modality, voxel), added to; nullptr: not asked for.
CRF_KERNEL(add_squares, const Real* squares, const Real* also_squares, const Real* columns,
           int64 num_voxels, int num_features, int64 num_threads, double* partial,
           int num_modalities, const double* inverse_theta, Real* by_image) {
    const int64 i = thread_number();
    if (i >= num_features * num_threads) return;
    const int64 f = i / num_threads;
    double total = 0.0;
    for (int64 n = i % num_threads; n < num_voxels; n += num_threads) {
        const Real x = columns[f * num_voxels + n];
        const Real found = x * (also_squares ? squares[n] + also_squares[n] : squares[n]);
        total += static_cast<double>(x * found);
        if (by_image && f < num_modalities)
            by_image[f * num_voxels + n] -= found * static_cast<Real>(inverse_theta[f]);
    }
    partial[i] += total;
}
}  // namespace crf
