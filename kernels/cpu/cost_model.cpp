#include "cpu/cost_model.h"

#include "cpu/grid.h"

#include <stdexcept>

namespace crf {

std::unique_ptr<Filter> make_bilateral_filter(const std::string& requested, const BilateralInput& input, int num_channels,
                                              int num_filterings, ThreadPool& pool) {
    (void)num_channels;
    (void)num_filterings;
    if (requested == "exact") return make_exact_filter(input, pool);
    if (requested == "grid") return make_grid_filter(input, grid_size(input), pool);
    if (requested == "lattice") return make_lattice_filter(input, pool);
    if (requested == "truncated" || requested == "auto") return make_truncated_filter(input, pool);
    throw std::invalid_argument("unknown filter '" + requested + "'");
}

}  // namespace crf
