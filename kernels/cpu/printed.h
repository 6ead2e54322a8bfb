// Numbers in messages.
#pragma once

#include <cstdio>
#include <string>

namespace crf {

// Six digits, as "%g" gives them: a tiny number is not 0.
inline std::string printed(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", value);
    return text;
}

}  // namespace crf
