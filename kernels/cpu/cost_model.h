// Which algorithm computes the bilateral messages.
#pragma once

#include <string>

#include "cpu/filter.h"

namespace crf {

// Estimated nanoseconds on one core, the build included; infinite if a filter does not support the input.
struct FilterCosts {
    double exact, truncated, grid, lattice;
};

// num_filterings: number of filterings of `num_channels` channels. The normalization's two filterings of one channel are added here.
FilterCosts estimate_costs(const BilateralInput& input, int num_channels, int num_filterings);

// Resolves "auto": the filter with the smallest estimated time, or a more accurate one that is hardly slower. Any other name is returned
// unchanged. num_channels, num_filterings: as for estimate_costs.
std::string choose_filter(const std::string& requested, const BilateralInput& input, int num_channels, int num_filterings,
                          bool may_be_grid);

// requested: "auto", "exact", "truncated", "grid" or "lattice".
std::unique_ptr<Filter> make_bilateral_filter(const std::string& requested, const BilateralInput& input, int num_channels,
                                              int num_filterings, ThreadPool& pool);

}  // namespace crf
