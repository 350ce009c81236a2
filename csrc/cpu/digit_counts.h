// One pass of a radix select for CPU, over parts of weights.
#pragma once

#include <cstdint>
#include <vector>

#include "../digits.h"
#include "parallel.h"
#include "radix_select.h"

namespace pdp::cpu {

// Of each weight: among its keys whose digits above `digit` are its prefix, how many have each
// value of that digit; and, at the last digit, its least key whose digits above are larger than the
// prefix (INT64_MAX if none is, and at other digits). The weights' keys have one width.
// counts: (weights, digit.bins()); prefixes, above: (weights).
void digit_counts(const std::vector<Weight>& weights, const int64_t* prefixes, Digit digit,
                  int64_t* counts, int64_t* above, ParallelFor parallel_for);

}  // namespace pdp::cpu
