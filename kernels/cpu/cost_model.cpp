// Chooses the filter of `auto`: an estimate of the time that each takes for a run.
#include "cpu/filter.h"
#include "cpu/lattice_build.h"

namespace crf {
namespace {
// Nanoseconds on one core of an AMD EPYC 9005 (AVX-512). Only their ratios matter, which differ
// little between processors; but a pair of the exact sum takes 0.2 with AVX-512 and over 3 without,
// so its price is between these.
constexpr double kExactPair = 0.35, kExactPairFeature = 0.07;
constexpr double kTruncatedPair = 0.04, kTruncatedPairModality = 0.035,
                 kTruncatedPairChannel = 0.03;
constexpr double kGridVoxel[] = {6.0, 14.0}, kGridCell = 4.0;
constexpr double kLatticeBuildCorner = 9.0, kLatticeBuildNeighbor = 16.0;
constexpr double kLatticeCorner = 1.5, kLatticeCornerChannel = 0.25, kLatticeStep = 1.2,
                 kLatticeStepChannel = 0.5;

// Shorter times are imperceptible; then the most accurate filter is chosen: exact, truncated, grid,
// lattice, in this order.
constexpr double kUnnoticed = 50e6;

struct Work {
    double voxels;
    int num_features, num_modalities;
    ExpectedCalls calls;

    // Sum of cost(channels of a group) over the groups of all filterings, and over the two of a
    // single channel for the normalization.
    template <class Cost>
    double filterings(Cost&& cost) const {
        double once = 0;
        for (int c = 0; c < calls.num_channels; c += kChannelGroup)
            once += cost(std::min(kChannelGroup, calls.num_channels - c));
        return calls.num_filterings * once + 2 * cost(1);
    }
};

double exact_cost(const Work& work) {
    return work.filterings([&](int) {
        return work.voxels * work.voxels * (kExactPair + kExactPairFeature * work.num_features);
    });
}

double truncated_cost(const Work& work, double pairs) {
    return work.filterings([&](int channels) {
        return work.voxels * pairs *
               (kTruncatedPair + kTruncatedPairModality * work.num_modalities +
                kTruncatedPairChannel * channels);
    });
}

double grid_cost(const Work& work, const GridSize& size) {
    return work.filterings([&](int channels) {
        return channels *
               (work.voxels * kGridVoxel[work.num_modalities - 1] + size.num_cells * kGridCell);
    });
}

double lattice_cost(const Work& work, double vertices) {
    const double corners = work.voxels * (work.num_features + 1);
    const double steps = vertices * (work.num_features + 1);
    const double build = corners * kLatticeBuildCorner + steps * kLatticeBuildNeighbor;
    return build + work.filterings([&](int channels) {
        return corners * (kLatticeCorner + kLatticeCornerChannel * channels) +
               steps * (kLatticeStep + kLatticeStepChannel * channels);
    });
}

std::string cheapest(const KernelInput& input, const ExpectedCalls& calls) {
    const Work work{static_cast<double>(input.voxels->num_voxels), input.num_features(),
                    static_cast<int>(input.intensity.size()), calls};
    const double exact = std::max(exact_cost(work), kUnnoticed);
    const double truncated = std::max(truncated_cost(work, num_window_pairs(input)), kUnnoticed);
    const GridSize size = grid_size(input);
    const double grid = fits_grid(input, size) ? std::max(grid_cost(work, size), kUnnoticed)
                                               : std::numeric_limits<double>::infinity();
    const double direct = std::min({exact, truncated, grid});
    // Estimating the number of a lattice's vertices takes time, so it is done only if it can change
    // the choice.
    const auto with_vertices = [&](double a_voxel) {
        return std::max(numerics::LATTICE_HANDICAP * lattice_cost(work, a_voxel * work.voxels),
                        kUnnoticed);
    };
    const int most = work.num_features + 1;
    if (work.num_features <= kMaxLatticeFeatures && with_vertices(0.1) < direct) {
        const double vertices = with_vertices(most) < direct && fits_lattice(input)
                                    ? most
                                    : estimate_vertices_per_voxel(input);
        if (with_vertices(vertices) < direct) return "lattice";
    }
    if (exact <= direct) return "exact";
    return truncated <= direct ? "truncated" : "grid";
}
}  // namespace

std::string choose_filter(const std::string& requested, const KernelInput& input,
                          const ExpectedCalls& calls) {
    return requested == "auto" ? cheapest(input, calls) : requested;
}

std::unique_ptr<Filter> make_bilateral_filter(const std::string& requested,
                                              const KernelInput& input, const ExpectedCalls& calls,
                                              ThreadPool& pool) {
    const std::string chosen = choose_filter(requested, input, calls);
    if (chosen == "exact") return make_exact_filter(input, pool);
    if (chosen == "truncated") return make_truncated_filter(input, pool);
    if (chosen == "grid") return make_grid_filter(input, grid_size(input), pool);
    if (chosen == "lattice") return make_lattice_filter(input, pool);
    throw InputError("unknown filter '" + requested + "'");
}
}  // namespace crf
