#include "cpu/kernel_set.h"

#include "cpu/filter.h"
#include "cpu/simd.h"

namespace crf {
namespace {
Buffer<float> filled(int64_t num_voxels, float value, ThreadPool& pool) {
    Buffer<float> values(num_voxels);
    pool.run(num_voxel_blocks(num_voxels), [&](int64_t block, int) {
        std::fill(values.get() + block * kVoxelBlock,
                  values.get() + std::min((block + 1) * kVoxelBlock, num_voxels), value);
    });
    return values;
}
}  // namespace

void normalize_kernel(Kernel& kernel, const Voxels& voxels, Normalization normalization,
                      ThreadPool& pool, Workspace& workspace) {
    const int64_t num_voxels = voxels.num_voxels;
    const float unit = 1;
    const bool symmetric = normalization == Normalization::kSymmetric;
    if (normalization == Normalization::kNone) return;
    kernel.scale = Buffer<float>(num_voxels);
    if (symmetric) kernel.ones = Buffer<float>(num_voxels);
    if (kernel.filter->normalize(symmetric, kernel.scale.get(), kernel.ones.get())) {
        kernel.scales_sent = symmetric;
        return;
    }
    kernel.scale = Buffer<float>();
    kernel.ones = Buffer<float>();
    Buffer<float> degree = filled(num_voxels, 0.0f, pool);
    kernel.filter->accumulate(filled(num_voxels, 1.0f, pool).get(), 1, nullptr, nullptr, &unit,
                              degree.get(), workspace);
    pool.run(num_voxel_blocks(num_voxels), [&](int64_t block, int) {
        float* d = degree.get() + block * kVoxelBlock;
        const int64_t count = std::min(kVoxelBlock, num_voxels - block * kVoxelBlock);
        for (int64_t i = 0; i < count; ++i) d[i] = d[i] > kTiny ? d[i] : kTiny;
        if (symmetric)
            for (int64_t i = 0; i < count; ++i) d[i] = std::sqrt(d[i]);
        for (int64_t i = 0; i < count; ++i) d[i] = 1 / d[i];
    });
    kernel.scale = std::move(degree);
    kernel.scales_sent = symmetric;
}

void find_ones(Kernel& kernel, int64_t num_voxels, ThreadPool& pool, Workspace& workspace) {
    if (kernel.ones || !kernel.scales_sent) return;  // D^-1 K 1 = 1
    const float unit = 1;
    kernel.ones = filled(num_voxels, 0.0f, pool);
    kernel.filter->accumulate(filled(num_voxels, 1.0f, pool).get(), 1, kernel.scale.get(),
                              kernel.scale.get(), &unit, kernel.ones.get(), workspace);
}

std::vector<double> on_box_axes(const Voxels& voxels, const std::vector<double>& per_grid_axis) {
    std::vector<double> values;
    for (int a = 0; a < voxels.num_axes; ++a)
        values.push_back(per_grid_axis[voxels.source_axis[a]]);
    return values;
}

Normalization parse_normalization(const std::string& name) {
    if (name == "symmetric") return Normalization::kSymmetric;
    if (name == "after") return Normalization::kAfter;
    if (name == "none") return Normalization::kNone;
    throw InputError("unknown normalization '" + name + "'");
}

KernelSet::KernelSet(const Voxels& voxels_in, const std::vector<const float*>& image,
                     const KernelSpecs& specs, ThreadPool& pool, Workspace& workspace,
                     const BuildCallback& callback)
    : voxels(voxels_in) {
    const int num_kernels =
        static_cast<int>(specs.bilateral.size() + (specs.theta_gamma.empty() ? 0 : 1));
    const FeatureOrigin* const origin = specs.origin ? &*specs.origin : nullptr;
    const auto add = [&](std::unique_ptr<Filter> filter, const std::string& name) {
        Kernel kernel;
        kernel.filter = std::move(filter);
        normalize_kernel(kernel, voxels, specs.normalization, pool, workspace);
        descriptions.push_back(name + ": " + kernel.filter->description());
        kernels.push_back(std::move(kernel));
    };
    for (size_t k = 0; k < specs.bilateral.size(); ++k) {
        if (callback) callback(static_cast<int>(k), num_kernels);
        const std::vector<double> theta_position = on_box_axes(voxels, specs.bilateral[k].first);
        const std::vector<double>& theta_beta = specs.bilateral[k].second;
        const BilateralInput input(voxels, theta_position, theta_beta, image, pool, origin);
        add(make_bilateral_filter(specs.filter, input, specs.calls, pool),
            "bilateral." + std::to_string(k));
        features.emplace_back(voxels, theta_position, theta_beta, image);
    }
    if (!specs.theta_gamma.empty()) {
        const std::vector<double> theta_gamma = on_box_axes(voxels, specs.theta_gamma);
        add(make_spatial_filter(voxels, theta_gamma, pool), "spatial");
        features.emplace_back(voxels, theta_gamma, std::vector<double>(),
                              std::vector<const float*>());
    }
}

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
        if (in_bandwidths(a, farthest) > kLargestFeature)
            throw CapacityError("theta_alpha " + printed(theta_position[a]) +
                                " is less than a millionth of the volume's extent, " +
                                std::to_string(voxels->box_shape[a]) + " voxels " +
                                printed(voxels->spacing[a]) +
                                " apart; use a larger bandwidth, and check the spacing");
    }
    for (size_t m = 0; m < intensity.size(); ++m) {
        const double below = static_cast<double>(lowest[m]) - zero[m];
        const double above = static_cast<double>(highest[m]) - zero[m];
        if (std::max(std::abs(below), std::abs(above)) / theta_beta[m] <= kLargestFeature) continue;
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
}  // namespace crf
