// The gradient of the Gaussian kernel of points with respect to their features
// (docs/reference/math.md, section 9), from filterings of the products of values and features.
// Channels are numbered by feature, then by value: the values themselves come first, their products
// with feature 0 next. CRF_WIDTH: channels that are filtered together.
#include "cuda/launch.h"

namespace crf {
using Channels = Row<CRF_WIDTH>;

// One thread per point: its row of the channels from `first` on; zero beyond the last one.
// values: (value, point). features: (feature, point).
CRF_KERNEL(multiply_features, const Real* values, const Real* features, int num_features,
           int num_values, int64 num_points, int first, Channels* rows) {
    const int64 n = thread_number();
    if (n >= num_points) return;
    Channels row = zero_row<CRF_WIDTH>();
    CRF_UNROLL
    for (int c = 0; c < CRF_WIDTH; ++c) {
        const int block = (first + c) / num_values;  // 0: the values themselves
        if (block > num_features) continue;
        const Real value = values[(first + c) % num_values * num_points + n];
        row.value[c] = block == 0 ? value : value * features[(block - 1) * num_points + n];
    }
    rows[n] = row;
}

// One thread per point: adds the products of the filtered channels from `first` on and the values
// of the pair, `others`, (value, point), to the gradient, (feature, point).
CRF_KERNEL(add_gradient, const Channels* filtered, const Real* others, const Real* features,
           int num_features, int num_values, int64 num_points, int first, Real* gradient) {
    const int64 n = thread_number();
    if (n >= num_points) return;
    const Channels row = filtered[n];
    Real of_values = Real(0.0);
    CRF_UNROLL
    for (int c = 0; c < CRF_WIDTH; ++c) {
        const int block = (first + c) / num_values;
        if (block > num_features) continue;
        const Real product = row.value[c] * others[(first + c) % num_values * num_points + n];
        if (block == 0)
            of_values += product;
        else
            gradient[(block - 1) * num_points + n] += product;
    }
    if (first >= num_values) return;
    for (int f = 0; f < num_features; ++f)
        gradient[f * num_points + n] -= features[f * num_points + n] * of_values;
}
}  // namespace crf
