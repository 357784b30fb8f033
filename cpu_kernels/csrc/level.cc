// Compiled once for each level, with its instructions: see build.py.

#include <algorithm>
#include <memory>

#include "attention.h"
#include "head.h"
#include "linear.h"
#include "top_k.h"

#define QUIRE_TEXT_OF(x) #x
#define QUIRE_TEXT(x) QUIRE_TEXT_OF(x)

namespace quire::QUIRE_LEVEL {

extern const Kernels kernels;
const Kernels kernels = {QUIRE_TEXT(QUIRE_LEVEL), kHasTiles,  linear,   mlp,
                         head_argmax,             head_top_k, attention};

}  // namespace quire::QUIRE_LEVEL
