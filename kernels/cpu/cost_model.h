// Which algorithm computes the bilateral messages.
#pragma once

#include <string>

#include "cpu/filter.h"

namespace crf {

// What "auto" stands for: the cheapest by estimated time for `num_filterings` filterings of `num_channels` channels, the build included.
// Any other name is returned as it is.
std::string choose_filter(const std::string& requested, const BilateralInput& input, int num_channels, int num_filterings,
                          bool may_be_grid);

// requested: "auto", "exact", "truncated", "grid" or "lattice".
std::unique_ptr<Filter> make_bilateral_filter(const std::string& requested, const BilateralInput& input, int num_channels,
                                              int num_filterings, ThreadPool& pool);

}  // namespace crf
