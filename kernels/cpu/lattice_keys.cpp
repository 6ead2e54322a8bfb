// Computes the simplices of voxels, and how wide the fields of a key are for an image.
#include "cpu/lattice_keys.h"

#include "lattice_math.h"

namespace crf {
namespace {
int bit_width(int64_t largest) { return std::bit_width(static_cast<uint64_t>(largest)); }
}  // namespace

// Field widths from the range of every coordinate, by interval arithmetic on the elevation.
KeyLayout layout_keys(const KernelInput& input, const LatticeGeometry& geometry) {
    const Voxels& voxels = *input.voxels;
    const int d = geometry.num_features;
    const int num_modalities = static_cast<int>(input.intensity.size());
    const int num_positions = static_cast<int>(input.theta_position.size());
    const int padding = d - num_modalities - num_positions;
    std::vector<double> low(d, 0.0),
        high(d, 0.0);  // of the scaled features; of those that the image lacks, 0
    for (int m = 0; m < num_modalities; ++m) {
        low[padding + m] =
            (input.lowest[m] - input.zero[m]) / input.theta_beta[m] * geometry.scale[padding + m];
        high[padding + m] =
            (input.highest[m] - input.zero[m]) / input.theta_beta[m] * geometry.scale[padding + m];
    }
    for (int a = 0; a < num_positions; ++a) {
        const int i = padding + num_modalities + voxels.feature[a];
        low[i] = input.in_bandwidths(a, input.first[a]) * geometry.scale[i];
        high[i] =
            input.in_bandwidths(a, input.first[a] + voxels.box_shape[a] - 1) * geometry.scale[i];
    }
    KeyLayout layout;
    layout.num_features = d;
    double sum_low = 0, sum_high = 0;
    for (int i = d; i >= 1; --i) {
        // elevated_i = sum over j >= i of scaled_j - i scaled_(i-1)
        const double least = sum_low - i * high[i - 1], most = sum_high - i * low[i - 1];
        sum_low += low[i - 1];
        sum_high += high[i - 1];
        if (most - least > numerics::KEY_RANGE)
            throw CapacityError("a bandwidth is too small for the range of its feature");
        layout.lowest[i] = static_cast<int>(std::floor(least / (d + 1))) - numerics::KEY_MARGIN;
        layout.width[i] = bit_width(static_cast<int64_t>(std::ceil(most / (d + 1))) +
                                    numerics::KEY_MARGIN - layout.lowest[i]);
    }
    layout.width[0] = bits_for(d + 1);
    for (int i = 1; i <= d; ++i) layout.shift[i] = layout.shift[i - 1] + layout.width[i - 1];
    return layout;
}

namespace {
template <int D>
void find_simplices(const float* features, int64_t stride, const float* scale,
                    SimplexBatch& batch) {
    vfloat scaled[D], elevated[D + 1], weight[D + 1];
    vint quotient[D + 1], sorted[D + 1], wrapped;
    for (int i = 0; i < D; ++i) scaled[i] = load(features + i * stride) * scale[i];
    elevate<D>(scaled, elevated);
    enclosing_simplex<D>(elevated, quotient, sorted, wrapped);
    barycentric_weights<D>(sorted, weight);
    // Remainder 0 absorbs the rounding errors of the others. If its own weight is almost 0, the sum
    // may be up to D / 2 units too large.
    vint rest = splat_lanes(kWeightUnit);
    for (int k = 1; k <= D; ++k) {
        const vint rounded = truncate_to_int(weight[k] * static_cast<float>(kWeightUnit) + 0.5f);
        rest -= rounded;
        std::memcpy(batch.weight[k], &rounded, sizeof rounded);
    }
    rest = larger(rest, vint{});
    std::memcpy(batch.weight[0], &rest, sizeof rest);
    for (int i = 0; i <= D; ++i) {
        std::memcpy(batch.quotient[i], &quotient[i], sizeof quotient[i]);
        const vint index = coordinate_index<D>(sorted[i]);
        std::memcpy(batch.order[i], &index, sizeof index);
    }
    std::memcpy(batch.wrapped, &wrapped, sizeof wrapped);
}

template <int D>
LatticeGeometry make_geometry() {
    LatticeGeometry geometry{D, {}, &find_simplices<D>};
    for (int i = 0; i < D; ++i)
        geometry.scale.push_back(
            static_cast<float>(feature_scale(D, i, [](double x) { return std::sqrt(x); })));
    return geometry;
}

// The first of the sizes, in ascending order, that is large enough.
template <int D, int... Larger>
LatticeGeometry smallest_geometry(int num_features) {
    if (num_features <= D) return make_geometry<D>();
    if constexpr (sizeof...(Larger) > 0) {
        return smallest_geometry<Larger...>(num_features);
    } else {
        throw CapacityError("the lattice holds at most " + std::to_string(D) +
                            " features (axes + modalities), not " + std::to_string(num_features));
    }
}
}  // namespace

LatticeGeometry choose_geometry(int num_features) {
    return smallest_geometry<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 16, 20, kMaxLatticeFeatures>(
        num_features);
}
}  // namespace crf
