// Numbers in messages.
#pragma once

#include <cstdio>
#include <string>

namespace crf {

// Digits count from the first that is not 0: a tiny number is not 0.
inline std::string printed(double value, int digits = 6) {
    char text[32];
    std::snprintf(text, sizeof text, "%.*g", digits, value);
    return text;
}

}  // namespace crf
