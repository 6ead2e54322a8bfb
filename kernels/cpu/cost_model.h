// Which algorithm computes the bilateral messages.
#pragma once

#include <string>

#include "cpu/filter.h"

namespace crf {

// Resolves "auto": the filter with the smallest estimated time, or a more accurate one that is hardly slower. Any other name is returned
// unchanged. num_filterings: number of filterings of `num_channels` channels, besides the normalization's two of one channel.
std::string choose_filter(const std::string& requested, const BilateralInput& input, int num_channels, int num_filterings,
                          bool may_be_grid);

// requested: "auto", "exact", "truncated", "grid" or "lattice".
std::unique_ptr<Filter> make_bilateral_filter(const std::string& requested, const BilateralInput& input, int num_channels,
                                              int num_filterings, ThreadPool& pool);

}  // namespace crf
