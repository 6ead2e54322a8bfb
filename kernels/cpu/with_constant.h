// Choosing code that is compiled for a number, such as one of labels, where loops of known length stay in registers.
#pragma once

#include <type_traits>

namespace crf {

// Calls body with the constant that equals `value`, as a std::integral_constant; the last one stands for all other values.
template <int First, int... Others, class Body>
void with_constant(int value, Body&& body) {
    if constexpr (sizeof...(Others) > 0) {
        if (value != First) return with_constant<Others...>(value, body);
    }
    body(std::integral_constant<int, First>());
}

}  // namespace crf
