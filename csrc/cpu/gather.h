// The hot loop of the selection: gathers the keys of a block that are inside a bracket.
#pragma once

#include "../magnitude.h"
#include "parallel.h"

namespace pdp::cpu {

// Writes the keys in [low, high] to the front of `keys` (which has room for `count`), returns their
// number, and adds the number of keys below `low` to `below`.
int gather(const double* data, int count, uint64_t low, uint64_t high, uint64_t* keys,
           int64_t* below);
int gather(const float* data, int count, uint32_t low, uint32_t high, uint32_t* keys,
           int64_t* below);
int gather(const BFloat16* data, int count, uint32_t low, uint32_t high, uint32_t* keys,
           int64_t* below);
int gather(const Half* data, int count, uint32_t low, uint32_t high, uint32_t* keys,
           int64_t* below);

}  // namespace pdp::cpu
