#include "cpu/lattice_keys.h"

#include <bit>
#include <cmath>
#include <vector>

#include "cpu/errors.h"

namespace crf {

namespace {

// Room on either side of the range of a quotient: 1 for rounding in single precision, 1 for the coordinates that wrap, 1 for the vertices
// of a simplex below its remainder-0 vertex, 1 for a step to a neighbor.
constexpr int kMargin = 4;

// Quotients must fit into 32 bits with that room.
constexpr double kWidestRange = 1e9;

int bit_width(int64_t largest) { return std::bit_width(static_cast<uint64_t>(largest)); }

}  // namespace

// Field widths from the range of every coordinate, by interval arithmetic on the elevation.
KeyLayout layout_keys(const BilateralInput& input, const LatticeGeometry& geometry) {
    const Voxels& voxels = *input.voxels;
    const int d = geometry.num_features;
    const int num_modalities = static_cast<int>(input.intensity.size());
    const int padding = d - num_modalities - voxels.num_axes;
    std::vector<double> low(d, 0.0), high(d, 0.0);  // of the scaled features; of those that the image lacks, 0
    for (int m = 0; m < num_modalities; ++m) {
        low[padding + m] = (input.lowest[m] - input.zero[m]) / input.theta_beta[m] * geometry.scale[padding + m];
        high[padding + m] = (input.highest[m] - input.zero[m]) / input.theta_beta[m] * geometry.scale[padding + m];
    }
    for (int a = 0; a < voxels.num_axes; ++a) {
        const int i = padding + num_modalities + voxels.feature[a];
        low[i] = input.first[a] * voxels.spacing[a] / input.theta_alpha[a] * geometry.scale[i];
        high[i] = (input.first[a] + voxels.box_shape[a] - 1) * voxels.spacing[a] / input.theta_alpha[a] * geometry.scale[i];
    }
    KeyLayout layout;
    layout.num_features = d;
    double sum_low = 0, sum_high = 0;
    for (int i = d; i >= 1; --i) {
        // elevated_i = sum over j >= i of scaled_j - i scaled_(i-1)
        const double least = sum_low - i * high[i - 1], most = sum_high - i * low[i - 1];
        sum_low += low[i - 1];
        sum_high += high[i - 1];
        if (most - least > kWidestRange) throw CapacityError("a bandwidth is too small for the range of its feature");
        layout.lowest[i] = static_cast<int>(std::floor(least / (d + 1))) - kMargin;
        layout.width[i] = bit_width(static_cast<int64_t>(std::ceil(most / (d + 1))) + kMargin - layout.lowest[i]);
    }
    layout.width[0] = bits_for(d + 1);
    for (int i = 1; i <= d; ++i) layout.shift[i] = layout.shift[i - 1] + layout.width[i - 1];
    return layout;
}

}  // namespace crf
