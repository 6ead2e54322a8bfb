// Which algorithm computes the bilateral messages.
#pragma once

#include <string>

#include "cpu/filter.h"

namespace crf {

// requested: "auto", "exact", "truncated", "grid" or "lattice". For "auto" the cheapest by estimated time for `num_filterings`
// filterings of `num_channels` channels, the build included.
std::unique_ptr<Filter> make_bilateral_filter(const std::string& requested, const BilateralInput& input, int num_channels,
                                              int num_filterings, ThreadPool& pool);

}  // namespace crf
