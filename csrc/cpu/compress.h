// 2:4 compression for CPU: a matrix pruned to its hard 2:4 form and packed for sparse tensor cores.
#pragma once

#include "../magnitude.h"
#include "parallel.h"

namespace pdp::cpu {

// weight: (rows, cols), row-major, bfloat16 or float16, rows a multiple of 32 and cols of 32.
// values: (rows, cols / 2) of the same type; metadata: rows * cols / 16 words in the order in which
// CUTLASS reads them.
void compress_2to4(const void* weight, WeightType type, int64_t rows, int64_t cols, void* values,
                   uint16_t* metadata, ParallelFor parallel_for);

}  // namespace pdp::cpu
