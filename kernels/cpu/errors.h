// Errors that a caller can handle. The Python module maps each to its own class, so that other exceptions, such as those of a progress
// callback, are not mistaken for them.
#pragma once

#include <stdexcept>

namespace crf {

// The problem is larger than an algorithm can hold; the message gives the sizes.
struct CapacityError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// An argument cannot be used: not finite, empty, of the wrong shape or kind.
struct InputError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace crf
