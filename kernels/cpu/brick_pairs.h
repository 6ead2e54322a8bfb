// The truncated sum by bricks: pairs farther apart than kTruncationRadius standard deviations in
// space are left out. Each pair of voxels is visited once, for both directions, where one of them
// sends and the other needs a result.
#pragma once

#include "cpu/bricks.h"

namespace crf {
// Squared distance in standard deviations up to which a voxel belongs to the window, an ellipsoid
// around each voxel: those on its surface, too, however their distance was rounded.
constexpr double kLargestSquare =
    kTruncationRadius * kTruncationRadius * (1 + numerics::RADIUS_MARGIN);

// Voxels of the window on either side along an axis. sigma: standard deviation in voxels; extent:
// of the grid.
inline int64_t window_radius(double sigma, int64_t extent) {
    // Compared as floating point, because a huge bandwidth overflows any integer.
    const double radius = kTruncationRadius * (1 + numerics::RADIUS_MARGIN) * sigma;
    return static_cast<int64_t>(std::min(radius, static_cast<double>(extent - 1)));
}

// The next place of a box from -radius to radius along some axes, the last of them fastest; false
// after the last one. Those after the center are one of each pair of opposite places.
inline bool next_place(const std::vector<int64_t>& radius, std::vector<int64_t>& place) {
    for (size_t a = radius.size(); a-- > 0;) {
        if (++place[a] <= radius[a]) return true;
        place[a] = -radius[a];
    }
    return false;
}

// The kernel and the image, on a grid of at least three axes; the first ones may have one voxel.
struct PairKernel {
    std::vector<int64_t> shape, stride;   // of the grid, and of its voxels in the image
    std::vector<double> sigma;            // voxels, one per axis
    std::vector<const float*> intensity;  // of the grid's first voxel, one per modality
    std::vector<double> theta_beta;       // one per modality
    // One per modality: a typical intensity, near which differences are most precise.
    std::vector<float> zero;
};

// The planes of a grid in one sequence, those of axes before the last three one after another. Gaps
// between these are as wide as the window, so that it is the same planes everywhere.
struct PlaneSequence {
    explicit PlaneSequence(const PairKernel& kernel);

    int64_t num_planes = 1;            // with gaps
    int64_t reach = 0;                 // planes up to the last one of the window
    std::vector<int64_t> distance;     // planes, for a voxel along each axis before the last two
    std::vector<int64_t> number;       // of each plane of the grid in raster order
    std::vector<int64_t> image_place;  // of each plane's first voxel; -1 in gaps
};

class PairSum final : public BrickSum {
   public:
    // What `add_moments` has room for.
    static constexpr int kMomentModalities = 4, kMomentAxes = 3, kMomentChannels = 8;

    PairSum(const PairKernel& kernel, ThreadPool& pool);

    int64_t num_pairs() const { return num_pairs_; }  // of a voxel
    int num_modalities() const { return static_cast<int>(kernel_.intensity.size()); }
    int64_t plane(int64_t of_grid) const { return planes_.number[of_grid]; }

    bool sum(int num_channels, const BrickRegion& region, BrickMemory& memory) const override;

    // The channels of two arrays u and v, and the pull on each modality, which is added to
    // (filter_moments.h): zero between sums. A unit with voxels sends in the memory's first
    // channel.
    float* moment_u(BrickMemory& memory, int channel) const {
        constexpr int kChannels = 2 * kMomentChannels + kMomentModalities;
        return memory.other_channels(num_modalities() + kChannels) +
               (num_modalities() + channel) * layout().channel_length;
    }
    float* moment_v(BrickMemory& memory, int channel) const {
        return moment_u(memory, kMomentChannels + channel);
    }
    float* moment_pull(BrickMemory& memory, int modality) const {
        return moment_v(memory, kMomentChannels + modality);
    }

    // Adds the moments of the pairs from the voxels of a brick: squared[f] of each modality, in
    // exponents of 2, and of kMomentAxes axes; and `pulls`: the pulls, in the scale of the image.
    void add_moments(int num_channels, bool pulls, const BrickRegion& region, BrickMemory& memory,
                     double* squared) const;
    void clear_moments(int num_channels, bool pulls, BrickMemory& memory) const;

   private:
    // A voxel of the window of a voxel of two rows: its distance in memory from that of the first
    // row, and log2 of the spatial part of the weight from that of each row.
    struct Offset {
        int64_t linear;
        float exponent[kPairRows];
    };
    // Its squared distances along the last axes in standard deviations, which only derivatives
    // need.
    struct OffsetDistances {
        float squared[kPairRows][kMomentAxes]{};
    };

    // Channels first, first + step, ...
    struct Channels {
        int count, first, step;
        bool operator==(const Channels&) const = default;
    };

    void list_offsets();
    void load_image(int num_channels, const BrickRegion& region, BrickMemory& memory) const;
    void load_row(int modality, int64_t image_row, const BrickRegion& region, float* to) const;
    void look_ahead(const std::vector<BrickLayout::Units>& marks,
                    std::vector<BrickLayout::Units>& ahead) const;
    void add_rows(int num_channels, int64_t row, BrickMemory& memory) const;
    template <int C, int M>
    void add_pairs(int64_t first_voxel, int64_t num_voxels, const Channels& channels,
                   BrickMemory& memory) const;
    template <int C, int M, bool kPulls>
    void add_moments_of(int64_t voxel, int any_channels, BrickMemory& memory,
                        double* squared) const;

    const PairKernel kernel_;
    const PlaneSequence planes_;
    std::vector<float> scale_;  // (modality) squares of scaled differences are exponents of 2
    // Where both rows have a pair, then where only the first has one, then only the second.
    std::vector<Offset> offsets_;
    int64_t num_of_both_ = 0, num_of_first_ = 0, num_pairs_ = 0;
    std::vector<OffsetDistances> distances_;  // of each offset
};
}  // namespace crf
