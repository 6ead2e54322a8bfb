#include "cpu/spatial_taps.h"

#include <algorithm>
#include <cmath>

namespace crf {

std::vector<SpatialTaps> spatial_taps(const Voxels& voxels, const std::vector<double>& theta_gamma, double radius) {
    std::vector<SpatialTaps> taps(voxels.num_axes);
    for (int a = 0; a < voxels.num_axes; ++a) {
        const double sigma = theta_gamma[a] / voxels.spacing[a], reach = radius * sigma;
        // Compared as floating point, because a huge bandwidth overflows any integer.
        const int64_t last = static_cast<int64_t>(std::min(std::ceil(reach), static_cast<double>(voxels.box_shape[a] - 1)));
        for (int64_t k = 0; k <= last; ++k) {
            const double u = static_cast<double>(k) / sigma, gaussian = std::exp(-0.5 * u * u);
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
