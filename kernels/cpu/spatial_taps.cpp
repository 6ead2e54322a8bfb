#include "cpu/spatial_taps.h"

#include <algorithm>
#include <cmath>

namespace crf {

std::vector<SpatialTaps> spatial_taps(const Voxels& voxels, const std::vector<double>& theta_gamma, double radius) {
    std::vector<double> sigma;
    for (int a = 0; a < voxels.num_axes; ++a) sigma.push_back(theta_gamma[a] / voxels.spacing[a]);
    return spatial_taps(sigma, {voxels.box_shape, voxels.box_shape + voxels.num_axes}, radius);
}

std::vector<SpatialTaps> spatial_taps(const std::vector<double>& sigma, const std::vector<int64_t>& shape, double radius) {
    std::vector<SpatialTaps> taps(sigma.size());
    for (size_t a = 0; a < sigma.size(); ++a) {
        const double reach = radius * sigma[a];
        // Compared as floating point, because a huge bandwidth overflows any integer.
        const int64_t last = static_cast<int64_t>(std::min(std::ceil(reach), static_cast<double>(shape[a] - 1)));
        for (int64_t k = 0; k <= last; ++k) {
            const double u = static_cast<double>(k) / sigma[a], gaussian = std::exp(-0.5 * u * u);
            const double x =
                std::clamp(reach + 1 - static_cast<double>(k), 0.0, 1.0);  // 0 at the end of the kernel, 1 where it has its full weight
            const double fade = x * x * (3 - 2 * x), fade_slope = 6 * x * (1 - x) * reach;
            taps[a].weight.push_back(gaussian * fade);
            // A tap with full weight has only the Gaussian's slope; and reach may be infinite.
            taps[a].slope.push_back(x < 1 ? gaussian * (u * u * fade + fade_slope) : gaussian * u * u);
        }
    }
    return taps;
}

}  // namespace crf
