// The features of a kernel: their ranges, those of rows of voxels, and columns of all voxels.
#include "cpu/features.h"

#include "cpu/simd.h"

namespace crf {
KernelInput::KernelInput(const Voxels& voxels_in, std::vector<double> theta,
                         std::vector<double> beta, std::vector<const float*> intensity_in,
                         ThreadPool& pool, const FeatureOrigin* origin)
    : voxels(&voxels_in),
      theta_position(std::move(theta)),
      theta_beta(std::move(beta)),
      intensity(std::move(intensity_in)),
      lowest(intensity.size()),
      highest(intensity.size()) {
    for (size_t m = 0; m < intensity.size(); ++m) {
        const auto add = [&](int64_t begin, int64_t end, LaneRange& range) {
            voxels->for_pieces(begin, end, [&](int64_t, int64_t grid, int64_t, int64_t length) {
                range.add(intensity[m] + grid, length);
            });
        };
        std::tie(lowest[m], highest[m]) =
            range_of_blocks(voxels->num_voxels, kVoxelBlock, pool, add);
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
}

void KernelInput::require_span() const {
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
                            "bandwidth, or normalize the intensities");
    }
}

namespace {
// A feature of a piece: see piece_features.
void piece_feature(const KernelInput& input, int feature, int64_t grid, const int32_t* coordinate,
                   int64_t length, float* to) {
    const int axis = feature - input.num_modalities();
    if (axis < 0) {
        const float* const intensity = input.intensity[feature] + grid;
        const float zero = input.zero[feature];
        const float scale = static_cast<float>(1.0 / input.theta_beta[feature]);
        for (int64_t i = 0; i < length; i += kLanes)
            store_some(to + i, (load_some(intensity + i, length - i) - zero) * scale, length - i);
        return;
    }
    const double scale = input.voxels->spacing[axis] / input.theta_position[axis];
    const int64_t place = input.first[axis] + coordinate[axis];
    if (feature < input.num_features() - 1)
        std::fill_n(to, length, static_cast<float>(place * scale));
    else
        for (int64_t i = 0; i < length; ++i) to[i] = static_cast<float>((place + i) * scale);
}
}  // namespace

void piece_features(const KernelInput& input, int64_t grid, const int32_t* coordinate,
                    int64_t length, float* features, int64_t stride) {
    for (int f = 0; f < input.num_features(); ++f)
        piece_feature(input, f, grid, coordinate, length, features + input.row_of(f) * stride);
}

void gather_feature(const KernelInput& input, int feature, int64_t first, int64_t count,
                    float* to) {
    input.voxels->for_pieces(
        first, first + count, [&](int64_t voxel, int64_t grid, int64_t box, int64_t length) {
            int64_t place[kMaxAxes];
            int32_t coordinate[kMaxAxes];
            input.voxels->coordinates(box, place);
            std::copy_n(place, input.voxels->num_axes, coordinate);
            piece_feature(input, feature, grid, coordinate, length, to + (voxel - first));
        });
}

void KernelInput::fill_column(int feature, float* column, ThreadPool& pool) const {
    std::vector<double> totals(num_voxel_blocks(voxels->num_voxels));
    pool.run_blocks(voxels->num_voxels, kVoxelBlock, [&](int64_t begin, int64_t end, int) {
        gather_feature(*this, feature, begin, end - begin, column + begin);
        totals[begin / kVoxelBlock] = std::accumulate(column + begin, column + end, 0.0);
    });
    const double total = std::accumulate(totals.begin(), totals.end(), 0.0);
    const float mean = static_cast<float>(total / static_cast<double>(voxels->num_voxels));
    pool.run_blocks(voxels->num_voxels, kVoxelBlock, [&](int64_t begin, int64_t end, int) {
        for (int64_t n = begin; n < end; ++n) column[n] -= mean;
    });
}
}  // namespace crf
