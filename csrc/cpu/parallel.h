// Threads, instruction sets and prefetching of the CPU kernels. The caller provides the threads,
// the dynamic loader picks the instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace pdp::cpu {

// parallel_for(count, grain, body) calls body(begin, end) on disjoint ranges that cover
// [0, count), at least `grain` long but for the last. The binding passes PyTorch's.
using RangeBody = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = void (*)(int64_t count, int64_t grain, const RangeBody& body);

}  // namespace pdp::cpu

// Compiles a function once per x86-64 level (AVX-512, AVX2, SSE2); the dynamic loader picks one. A
// function it calls is compiled for that level only if it is inlined. GCC knows the levels from
// version 12 on. Before, it can choose by one feature alone: AVX2 then has no fused multiply-add,
// and AVX-512 has one in some loops and not in their remainders, so that equal weights get masks
// that differ. Clang gets none: its versions differ in what they pick.
#ifndef PDP_MULTIVERSION  // The tests define it empty, to run each level by itself.
#if !defined(__x86_64__) || !defined(__linux__) || !defined(__GNUC__) || defined(__clang__)
#define PDP_MULTIVERSION
#elif __GNUC__ >= 12
#define PDP_MULTIVERSION \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PDP_MULTIVERSION __attribute__((target_clones("avx2", "default")))
#endif
#endif
// Stands after the parameters of a lambda and makes it inline.
#define PDP_LAMBDA __attribute__((always_inline))
#define PDP_INLINE inline __attribute__((always_inline))

namespace pdp::cpu {

// Prefetches `count` values 8 KiB ahead, because the CPU's own prefetching stops at each page. It
// is best called for a few cache lines at a time, between the additions of a sum: the PQ Index of
// 25 million float32 weights takes one thread 0.50 ns each with it and 0.69 ns without.
template <typename Value>
PDP_INLINE void prefetch_ahead(const Value* values, int count) {
  constexpr int kAhead = 8192, kCacheLine = 64;
  const char* ahead = reinterpret_cast<const char*>(values) + kAhead;
  for (size_t byte = 0; byte < count * sizeof(Value); byte += kCacheLine) {
    __builtin_prefetch(ahead + byte);
  }
}

// Adds up independent sums, a power of two of them.
template <int kLanes>
PDP_INLINE double add_lanes(double (&lanes)[kLanes]) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

}  // namespace pdp::cpu
