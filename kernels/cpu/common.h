// What most files use: headers of the standard library, errors, and numbers in messages.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "numerics.h"

namespace crf {
// Errors that a caller can handle; the Python module maps each to its own class, apart from
// exceptions of a progress callback.

// The problem is larger than an algorithm can hold; the message gives the sizes.
struct CapacityError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// An argument cannot be used: not finite, empty, of the wrong shape or kind.
struct InputError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// How many units hold `count`, and the size of these units together.
constexpr int64_t divided_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }
constexpr int64_t whole(int64_t count, int64_t unit) { return divided_up(count, unit) * unit; }

// Digits count from the first that is not 0: a tiny number is not 0.
inline std::string printed(double value, int digits = 6) {
    char text[32];
    std::snprintf(text, sizeof text, "%.*g", digits, value);
    return text;
}
}  // namespace crf
