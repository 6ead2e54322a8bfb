// The features of a kernel: their ranges, those of rows of voxels, and columns of all voxels.
#include "cpu/features.h"

#include "cpu/simd.h"

namespace crf {
BilateralInput::BilateralInput(const Voxels& voxels_in, std::vector<double> theta,
                               std::vector<double> beta, std::vector<const float*> intensity_in,
                               ThreadPool& pool, const FeatureOrigin* origin)
    : voxels(&voxels_in),
      theta_position(std::move(theta)),
      theta_beta(std::move(beta)),
      intensity(std::move(intensity_in)),
      lowest(intensity.size()),
      highest(intensity.size()) {
    for (size_t m = 0; m < intensity.size(); ++m) {
        const auto add = [&](int64_t block, LaneRange& range) {
            const int64_t begin = block * kVoxelBlock;
            const int64_t end = std::min(begin + kVoxelBlock, voxels->num_voxels);
            voxels->for_pieces(begin, end, [&](int64_t, int64_t grid, int64_t, int64_t length) {
                range.add(intensity[m] + grid, length);
            });
        };
        std::tie(lowest[m], highest[m]) =
            range_of_blocks(num_voxel_blocks(voxels->num_voxels), pool, add);
        if (lowest[m] == lowest[m]) continue;  // not NaN
        if (theta_position.empty())
            throw InputError(
                "features: expected finite numbers, found NaN or infinity in feature " +
                std::to_string(m));
        throw InputError("modality " + std::to_string(m) +
                         " of the image holds values that are not finite (NaN or infinity)");
    }
    zero = lowest;
    if (origin) {
        zero.assign(origin->intensity.begin(), origin->intensity.end());
        for (int a = 0; a < voxels->num_axes; ++a)
            first[a] = voxels->first[a] - origin->position[voxels->source_axis[a]];
    }
    check_span();
}

void BilateralInput::check_span() const {
    for (int a = 0; a < static_cast<int>(theta_position.size()); ++a) {
        const int64_t farthest =
            std::max(std::abs(first[a]), std::abs(first[a] + voxels->box_shape[a]));
        if (in_bandwidths(a, farthest) > numerics::MAX_SPAN)
            throw CapacityError("theta_alpha " + printed(theta_position[a]) +
                                " is less than a millionth of the volume's extent, " +
                                std::to_string(voxels->box_shape[a]) + " voxels " +
                                printed(voxels->spacing[a]) +
                                " apart; use a larger bandwidth, and check the spacing");
    }
    for (size_t m = 0; m < intensity.size(); ++m) {
        const double below = static_cast<double>(lowest[m]) - zero[m];
        const double above = static_cast<double>(highest[m]) - zero[m];
        if (std::max(std::abs(below), std::abs(above)) / theta_beta[m] <= numerics::MAX_SPAN)
            continue;
        if (theta_position.empty())
            throw CapacityError("feature " + std::to_string(m) +
                                " spans more than a million bandwidths");
        throw CapacityError("theta_beta " + printed(theta_beta[m]) + " of modality " +
                            std::to_string(m) +
                            " is less than a millionth of its range of intensities; use a larger "
                            "bandwidth, or normalize the "
                            "intensities");
    }
}

void piece_features(const BilateralInput& input, int64_t grid, const int32_t* coordinate,
                    int64_t length, float* features, int64_t stride) {
    const Voxels& voxels = *input.voxels;
    const int num_modalities = static_cast<int>(input.intensity.size());
    const int num_axes = static_cast<int>(input.theta_position.size());
    for (int m = 0; m < num_modalities; ++m) {
        const float* intensity = input.intensity[m];
        const float zero = input.zero[m];
        const float scale = static_cast<float>(1.0 / input.theta_beta[m]);
        for (int64_t i = 0; i < length; i += kLanes)
            store_some(features + m * stride + i,
                       (load_some(intensity + grid + i, length - i) - zero) * scale, length - i);
    }
    for (int a = 0; a < num_axes; ++a) {
        const double scale = voxels.spacing[a] / input.theta_position[a];
        float* row = features + (num_modalities + voxels.feature[a]) * stride;
        if (a < num_axes - 1) {
            std::fill(row, row + length,
                      static_cast<float>((input.first[a] + coordinate[a]) * scale));
        } else {
            for (int64_t i = 0; i < length; ++i)
                row[i] = static_cast<float>((input.first[a] + coordinate[a] + i) * scale);
        }
    }
}

void gather_features(const BilateralInput& input, int64_t first, int64_t count, float* features,
                     int64_t stride) {
    input.voxels->for_pieces(
        first, first + count, [&](int64_t voxel, int64_t grid, int64_t box, int64_t length) {
            int64_t place[kMaxAxes];
            input.voxels->coordinates(box, place);
            const std::vector<int32_t> coordinate(place, place + input.voxels->num_axes);
            piece_features(input, grid, coordinate.data(), length, features + (voxel - first),
                           stride);
        });
}

void FeatureColumns::fill(int feature, float* column, ThreadPool& pool) const {
    const double center = this->center(feature), scale = 1 / theta(feature);
    pool.run(num_voxel_blocks(voxels_.num_voxels), [&](int64_t block, int) {
        const int64_t begin = block * kVoxelBlock;
        const int64_t end = std::min(begin + kVoxelBlock, voxels_.num_voxels);
        voxels_.for_pieces(
            begin, end, [&](int64_t voxel, int64_t grid, int64_t box, int64_t length) {
                if (feature < num_modalities()) {
                    const float* values = intensity_[feature] + grid;
                    for (int64_t i = 0; i < length; ++i)
                        column[voxel + i] =
                            static_cast<float>((static_cast<double>(values[i]) - center) * scale);
                    return;
                }
                const int axis = feature - num_modalities();
                const double step = voxels_.spacing[axis];
                int64_t place[kMaxAxes];
                voxels_.coordinates(box, place);
                const int64_t stride = axis == voxels_.num_axes - 1 ? 1 : 0;
                for (int64_t i = 0; i < length; ++i)
                    column[voxel + i] = static_cast<float>(
                        (static_cast<double>(place[axis] + i * stride) * step - center) * scale);
            });
    });
}

double FeatureColumns::center(int feature) const {
    if (feature >= num_modalities()) {
        const int axis = feature - num_modalities();
        return 0.5 * static_cast<double>(voxels_.box_shape[axis] - 1) * voxels_.spacing[axis];
    }
    for (int m = static_cast<int>(mean_.size()); m <= feature; ++m) {
        double total = 0;
        for (const Run& run : voxels_.runs)
            for (int32_t i = 0; i < run.length; ++i)
                total += static_cast<double>(intensity_[m][run.grid + i]);
        mean_.push_back(total / static_cast<double>(voxels_.num_voxels));
    }
    return mean_[feature];
}
}  // namespace crf
