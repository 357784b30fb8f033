// Which of the levels in this library serves: the best that the processor has, or the one asked for.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace quire {

// The levels that this build has and this processor can run, the best first.
const std::vector<const Kernels*>& levels();

// Empty: the best. Null when there is none of that name here.
const Kernels* find_level(const std::string& name);

}  // namespace quire
