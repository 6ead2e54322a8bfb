// A stretch of consecutive things, such as the floats of a row that hold numbers.
#pragma once

#include <algorithm>
#include <cstdint>

namespace crf {

// From the first to before the last.
struct Stretch {
    int64_t begin = 0, end = 0;

    bool is_empty() const { return begin >= end; }
    // The smallest stretch around both.
    Stretch with(const Stretch& other) const {
        if (is_empty()) return other;
        if (other.is_empty()) return *this;
        return {std::min(begin, other.begin), std::max(end, other.end)};
    }
    Stretch within(const Stretch& other) const { return {std::max(begin, other.begin), std::min(end, other.end)}; }
};

}  // namespace crf
