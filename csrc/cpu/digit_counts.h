// One pass of a radix select for CPU, over shards of weights.
#pragma once

#include <cstdint>
#include <vector>

#include "../digits.h"
#include "parallel.h"
#include "radix_select.h"

namespace pdp::cpu {

// Counts, among the keys of each weight whose higher digits equal its prefix, the values of
// `digit`. At the last digit, also finds its least key whose higher digits are above the prefix
// (INT64_MAX if there is none, and at other digits). All weights have one key width.
//
// counts: (weights, digit.bins()); prefixes, above: (weights).
void digit_counts(const std::vector<Weight>& weights, const int64_t* prefixes, Digit digit,
                  int64_t* counts, int64_t* above, ParallelFor parallel_for);

}  // namespace pdp::cpu
