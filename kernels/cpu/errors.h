// The errors that a caller can act on. The Python module gives each a class of its own, so that no other exception, such as one that a
// progress callback raises, is taken for one of these.
#pragma once

#include <stdexcept>

namespace crf {

// The problem is larger than an algorithm can hold; the message has the numbers.
struct CapacityError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// An argument cannot be used: not finite, empty, of the wrong shape or kind.
struct InputError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace crf
