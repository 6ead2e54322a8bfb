// The bilateral kernel as a direct sum over a window, brick by brick (brick_pairs.h).

#include "cpu/brick_pairs.h"
#include "cpu/filter_moments.h"

namespace crf {
namespace {
// A pair's weight takes longer than a channel, so that with few voxels the channels of several
// steps are summed together.
constexpr int kMomentChannelsOfManyVoxels = 4;

// A list of more pairs would take over 250 MB, and their sums days.
constexpr double kMostPairs = 1e6;

// Windows with more rows are not counted: they are far too large for any use.
constexpr double kMostRows = 1e6;

class TruncatedFilter final : public Filter {
   public:
    TruncatedFilter(const KernelInput& input, ThreadPool& pool)
        : Filter(traits_of(input)),
          voxels_(*input.voxels),
          has_moments_(has_moments(input)),
          sums_(kernel_of(input), pool) {
        const Extents& grid = sums_.layout().grid;
        first_run_ =
            voxels_.first_runs(grid[0] * grid[1], [&](const Run& run) { return row_of(run); });
    }

    void accumulate(const Filtering& wanted, Workspace&) override {
        sums_.for_bricks([&](const BrickRegion& region, BrickMemory& memory) {
            for (int c = 0; c < wanted.num_channels; c += kChannelGroup) {
                const int count = std::min(kChannelGroup, wanted.num_channels - c);
                const Filtering group = wanted.of_channels(c, count, voxels_.num_voxels);
                scatter(region, group, memory);
                if (sums_.sum(count, region, memory)) gather(region, memory, group);
                memory.clear(count);
            }
        });
    }

    void add_moments(const FilteredPair& pair, const KernelInput& input, double* squared,
                     float* image, MomentSums& sums) override {
        if (!has_moments_) return Filter::add_moments(pair, input, squared, image, sums);
        float* const pull = sums.cleared_pull(input, image);
        add_pairs(pair, squared, pull);
        sums.add_pull(input, image);
    }

    std::string description() const override {
        return "truncated (" + std::to_string(sums_.num_pairs()) + " pairs per voxel)";
    }

   private:
    static FilterTraits traits_of(const KernelInput& input) {
        FilterTraits traits{.keeps_image = true, .shares_weights = true};
        if (has_moments(input) && input.voxels->num_voxels <= kFewVoxels)
            traits.num_moment_channels = PairSum::kMomentChannels;
        return traits;
    }

    // More modalities or axes need the moment form.
    static bool has_moments(const KernelInput& input) {
        return static_cast<int>(input.intensity.size()) <= PairSum::kMomentModalities &&
               input.voxels->num_axes <= PairSum::kMomentAxes;
    }

    // On the box, with leading axes of one voxel up to three.
    static PairKernel kernel_of(const KernelInput& input) {
        if (num_window_pairs(input) > kMostPairs) {
            std::string theta, spacing;
            for (int a = 0; a < input.voxels->num_axes; ++a) {
                theta += (a ? " x " : "") + printed(input.theta_position[a]);
                spacing += (a ? " x " : "") + printed(input.voxels->spacing[a]);
            }
            throw CapacityError(
                "a truncated sum with theta_alpha " + theta + " on voxels of " + spacing +
                " visits over a million pairs for each voxel; use a smaller bandwidth, "
                "or mean_field.filter = \"auto\"");
        }
        const Voxels& voxels = *input.voxels;
        const int leading = std::max(0, 3 - voxels.num_axes);
        PairKernel kernel{.shape = std::vector<int64_t>(leading, 1),
                          .stride = std::vector<int64_t>(leading, 0),
                          .sigma = std::vector<double>(leading, 1.0),
                          .intensity = {},
                          .theta_beta = input.theta_beta,
                          .zero = {}};
        for (int a = 0; a < voxels.num_axes; ++a) {
            kernel.shape.push_back(voxels.box_shape[a]);
            kernel.stride.push_back(voxels.grid_stride[a]);
            kernel.sigma.push_back(input.sigma(a));
        }
        for (const float* intensity : input.intensity) {
            kernel.intensity.push_back(intensity + voxels.grid_corner);
            kernel.zero.push_back(intensity[voxels.runs.front().grid]);
        }
        return kernel;
    }

    // Among the rows of the bricks' grid.
    int64_t row_of(const Run& run) const {
        const int64_t row = run.box / sums_.layout().grid[2], rows = sums_.layout().grid[1];
        return sums_.plane(row / rows) * rows + row % rows;
    }

    // Voxels of a run that are in one vector.
    struct Piece {
        int64_t voxel, length;
        BrickPlace at;
    };

    // Calls body(piece) for the voxels of a region.
    template <class Body>
    void for_pieces(const BrickRegion& region, Body&& body) const {
        const Extents& grid = sums_.layout().grid;
        for (int64_t plane = region.first[0]; plane < region.last[0]; ++plane)
            for (int64_t row = region.first[1]; row < region.last[1]; ++row) {
                const int64_t* const first = &first_run_[plane * grid[1] + row];
                for (int64_t r = first[0]; r < first[1]; ++r) {
                    const Run& run = voxels_.runs[r];
                    const int64_t begin = run.box % grid[2];
                    const int64_t end = std::min(begin + run.length, region.last[2]);
                    for (int64_t x = std::max(begin, region.first[2]); x < end;) {
                        const int64_t next = std::min(end, (x / kLanes + 1) * kLanes);
                        body(Piece{run.voxel + x - begin, next - x, region.place(plane, row, x)});
                        x = next;
                    }
                }
            }
    }

    static bool any(const uint8_t* marked, const Piece& piece) {
        return !marked || std::memchr(marked + piece.voxel, 1, piece.length) != nullptr;
    }

    void scatter(const BrickRegion& region, const Filtering& group, BrickMemory& memory) const {
        for_pieces(region, [&](const Piece& piece) {
            if (any(receivers, piece))
                for (int c = 0; c < group.num_channels; ++c) memory.receive(c, piece.at);
            if (!any(senders, piece)) return;
            const vfloat factor = factor_of(group.pre, piece);
            for (int c = 0; c < group.num_channels; ++c) {
                const float* const from = group.values + c * voxels_.num_voxels + piece.voxel;
                const vfloat sent = load_some(from, piece.length) * factor;
                if (!is_zero_vector(sent)) memory.send(c, piece.at, sent, piece.length);
            }
        });
    }

    void gather(const BrickRegion& region, const BrickMemory& memory,
                const Filtering& group) const {
        for_pieces(region, [&](const Piece& piece) {
            const vfloat factor = factor_of(group.post, piece);
            for (int c = 0; c < group.num_channels; ++c) {
                if (!memory.has_result(c, piece.at)) continue;
                float* const to = group.sum + c * voxels_.num_voxels + piece.voxel;
                const vfloat received = memory.result(c, piece.at) * (factor * group.weight_of(c));
                store_some(to, load_some(to, piece.length) + received, piece.length);
            }
        });
    }

    static vfloat factor_of(const float* factors, const Piece& piece) {
        return factors ? load_some(factors + piece.voxel, piece.length) : splat_lanes(1.0f);
    }

    // The sums of `add_moments`. pull: (modality, voxel), added to, or nullptr.
    void add_pairs(const FilteredPair& pair, double* squared, float* pull) {
        const int64_t num_voxels = voxels_.num_voxels;
        const int num_modalities = sums_.num_modalities();
        const int room =
            num_voxels <= kFewVoxels ? PairSum::kMomentChannels : kMomentChannelsOfManyVoxels;
        // Of a brick: modalities, and the last axes of its grid.
        const int num_sums = num_modalities + PairSum::kMomentAxes;
        std::vector<double> of_brick(sums_.num_bricks() * num_sums);
        sums_.for_bricks([&](const BrickRegion& region, BrickMemory& memory) {
            for (int c = 0; c < pair.num_channels; c += room) {
                const int group = std::min(room, pair.num_channels - c);
                for_pieces(region, [&](const Piece& piece) {
                    memory.send(0, piece.at, vfloat{}, piece.length);
                    for (int i = 0; i < group; ++i) {
                        const int64_t at = (c + i) * num_voxels + piece.voxel;
                        std::copy_n(pair.u + at, piece.length,
                                    sums_.moment_u(memory, i) + piece.at.voxel);
                        std::copy_n(pair.v + at, piece.length,
                                    sums_.moment_v(memory, i) + piece.at.voxel);
                    }
                });
                sums_.add_moments(group, pull != nullptr, region, memory,
                                  of_brick.data() + region.number * num_sums);
                if (pull) add_pulls(region, memory, pull);
                sums_.clear_moments(group, pull != nullptr, memory);
            }
        });
        for (int64_t brick = 0; brick < sums_.num_bricks(); ++brick) {
            const double* const own = of_brick.data() + brick * num_sums;
            // Intensities are scaled to give exponents of 2.
            for (int m = 0; m < num_modalities; ++m) squared[m] += own[m] * 2 / kLog2e;
            for (int a = 0; a < voxels_.num_axes; ++a)
                squared[num_modalities + a] += own[num_sums - voxels_.num_axes + a];
        }
    }

    // From the scale of the intensities.
    void add_pulls(const BrickRegion& region, BrickMemory& memory, float* pull) const {
        const float unscale = static_cast<float>(1 / kSqrtHalfLog2e);
        for_pieces(region, [&](const Piece& piece) {
            for (int m = 0; m < sums_.num_modalities(); ++m) {
                const float* const from = sums_.moment_pull(memory, m) + piece.at.voxel;
                float* const to = pull + m * voxels_.num_voxels + piece.voxel;
                for (int64_t i = 0; i < piece.length; ++i) to[i] += from[i] * unscale;
            }
        });
    }

    const Voxels& voxels_;
    const bool has_moments_;  // there is room for its modalities and axes
    PairSum sums_;
    std::vector<int64_t> first_run_;  // (row of the bricks' grid + 1)
};
}  // namespace

double num_window_pairs(const KernelInput& input) {
    // Rows of the window are counted as a whole: the sum over the last axis has a closed form.
    const int last = input.voxels->num_axes - 1;
    const int64_t* const shape = input.voxels->box_shape;
    std::vector<int64_t> radius, distance(last);
    double rows = 1;
    for (int a = 0; a < last; ++a) {
        radius.push_back(window_radius(input.sigma(a), shape[a]));
        rows *= static_cast<double>(2 * radius[a] + 1);
    }
    if (rows > kMostRows) return rows;
    const double end = static_cast<double>(window_radius(input.sigma(last), shape[last]));
    double pairs = end;  // in the voxel's own row
    while (next_place(radius, distance)) {
        double left = kLargestSquare;
        for (int a = 0; a < last; ++a) {
            const double scaled = static_cast<double>(distance[a]) / input.sigma(a);
            left -= scaled * scaled;
        }
        if (left >= 0)
            pairs += 1 + 2 * std::min(std::floor(std::sqrt(left) * input.sigma(last)), end);
    }
    return pairs;
}

std::unique_ptr<Filter> make_truncated_filter(const KernelInput& input, ThreadPool& pool) {
    return std::make_unique<TruncatedFilter>(input, pool);
}
}  // namespace crf
