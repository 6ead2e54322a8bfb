#include "cpu/lattice_geometry.h"

#include <cmath>
#include <cstring>
#include <string>

#include "cpu/errors.h"
#include "lattice_math.h"

namespace crf {

namespace {

template <int D>
void find_simplices(const float* features, int64_t stride, const float* scale, SimplexBatch& batch) {
    vfloat scaled[D], elevated[D + 1], weight[D + 1];
    vint quotient[D + 1], sorted[D + 1], wrapped;
    for (int i = 0; i < D; ++i) scaled[i] = load(features + i * stride) * scale[i];
    elevate<D>(scaled, elevated);
    enclosing_simplex<D>(elevated, quotient, sorted, wrapped);
    barycentric_weights<D>(sorted, weight);
    // Remainder 0 absorbs the rounding errors of the others. If its own weight is almost 0, the sum may be up to D / 2 units too large.
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
    for (int i = 0; i < D; ++i) geometry.scale.push_back(static_cast<float>(feature_scale(D, i, [](double x) { return std::sqrt(x); })));
    return geometry;
}

// The first of the sizes, in ascending order, that is large enough.
template <int D, int... Larger>
LatticeGeometry smallest_geometry(int num_features) {
    if (num_features <= D) return make_geometry<D>();
    if constexpr (sizeof...(Larger) > 0) {
        return smallest_geometry<Larger...>(num_features);
    } else {
        throw CapacityError("the lattice holds at most " + std::to_string(D) + " features (axes + modalities), not " +
                            std::to_string(num_features));
    }
}

}  // namespace

LatticeGeometry choose_geometry(int num_features) {
    return smallest_geometry<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 16, 20, kMaxLatticeFeatures>(num_features);
}

}  // namespace crf
