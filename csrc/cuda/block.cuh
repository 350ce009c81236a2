// Operations that all threads of a block perform together: read a range of memory, reduce over
// threads, find the bin that holds a rank, and detect the last block to finish.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../magnitude.h"

namespace pdp {

using Count = unsigned long long;  // the 64-bit integer that CUDA has atomics for

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFF;

// Elements that are read or written at once; 16 bytes are the widest access of one thread.
template <typename Element, int kElements = 16 / sizeof(Element)>
struct alignas(sizeof(Element) * kElements) Packet {
  Element at[kElements];
};

// Packets that a thread loads before it uses the first. Not yet measured on a GPU.
constexpr int kPacketsInFlight = 4;

// The most elements that a block of `threads` visits between two calls of end_round.
template <typename Element>
constexpr int round_elements(int threads) {
  constexpr int kPerPacket = 16 / sizeof(Element);
  return threads * kPacketsInFlight * kPerPacket + 2 * (kPerPacket - 1);
}

// Weights may be loaded through the read-only path, since no kernel writes them. What an earlier
// kernel has written must not be: a kernel that begins before that one ends could find a stale
// cache line there.
enum class Memory { kWeights, kWorkspace };

template <Memory kMemory, typename Value>
__device__ Value load(const Value* address) {
  return kMemory == Memory::kWeights ? __ldg(address) : *address;
}

// Calls visit(element) for every element of data[begin, end), in no particular order, from a block
// of kThreads. data needs the alignment of an element only, and nothing may write it meanwhile. All
// threads of the block call end_round() together after each round of packets.
template <int kThreads, Memory kMemory = Memory::kWeights, typename Element, typename Visit,
          typename EndRound>
__device__ void for_each(const Element* data, int64_t begin, int64_t end, Visit visit,
                         EndRound end_round) {
  constexpr int kPerPacket = 16 / sizeof(Element);
  const int thread = threadIdx.x;

  const auto address = reinterpret_cast<uintptr_t>(data + begin);
  const auto misaligned = static_cast<int64_t>((16 - address % 16) % 16 / sizeof(Element));
  const int head = static_cast<int>(min(misaligned, end - begin));
  if (thread < head) visit(data[begin + thread]);
  begin += head;
  const int tail = static_cast<int>((end - begin) % kPerPacket);
  if (thread < tail) visit(data[end - tail + thread]);

  const auto* packets = reinterpret_cast<const uint4*>(data + begin) + thread;
  constexpr int kRound = kThreads * kPacketsInFlight;
  for (int64_t count = (end - begin) / kPerPacket; count > 0; count -= kRound, packets += kRound) {
    const int mine = static_cast<int>(min(count, int64_t{kRound})) - thread;
    // Without a value for threads that load none, all packets would stay live between rounds.
    uint4 loaded[kPacketsInFlight] = {};
#pragma unroll
    for (int i = 0; i < kPacketsInFlight; ++i) {
      if (i * kThreads < mine) loaded[i] = load<kMemory>(&packets[i * kThreads]);
    }
#pragma unroll
    for (int i = 0; i < kPacketsInFlight; ++i) {
      if (i * kThreads < mine) {
        const auto packet = bit_cast<Packet<Element>>(loaded[i]);
#pragma unroll
        for (int j = 0; j < kPerPacket; ++j) visit(packet.at[j]);
      }
    }
    end_round();
  }
}

template <int kThreads, Memory kMemory = Memory::kWeights, typename Element, typename Visit>
__device__ void for_each(const Element* data, int64_t begin, int64_t end, Visit visit) {
  for_each<kThreads, kMemory>(data, begin, end, visit, [] {});
}

template <typename Value, typename Combine>
__device__ Value warp_reduce(Value value, Combine combine) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// Returns the sum of a value over the lower lanes of the warp. Called by all lanes.
template <typename Sum>
__device__ Sum sum_of_lower_lanes(Sum mine) {
  Sum inclusive = mine;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const Sum lower = __shfl_up_sync(kAllLanes, inclusive, distance);
    if (threadIdx.x % kWarp >= distance) inclusive += lower;
  }
  return inclusive - mine;
}

// The sum of a value over the lower lanes of the warp, and over all lanes.
struct WarpSums {
  uint32_t lower, all;
};

// Called by all lanes.
__device__ inline WarpSums sum_over_lanes(uint32_t mine) {
  const uint32_t lower = sum_of_lower_lanes(mine);
  return {lower, __shfl_sync(kAllLanes, lower + mine, kWarp - 1)};
}

struct RankScratch {
  Count warp_sums[kWarp];
  Count below;
  Count count;
  int32_t bin;
  uint32_t next;
};

// Every thread of a block handles a run of this many bins. Blocks have a power of two threads.
__device__ inline int32_t bins_per_thread(int32_t bins) {
  const auto threads = static_cast<int32_t>(blockDim.x);
  return (bins + threads - 1) >> (__ffs(threads) - 1);
}

// Returns the sum of a value over the threads below. Called by all threads; it has one barrier,
// before it reads the sums of warps.
template <typename Sum>
__device__ Sum sum_of_lower_threads(Sum mine, Sum (&warp_sums)[kWarp]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Sum lower = sum_of_lower_lanes(mine);
  if (lane == kWarp - 1) warp_sums[warp] = lower + mine;
  __syncthreads();
  const Sum of_lower_warp = lane < warp ? warp_sums[lane] : 0;
  return lower + warp_reduce(of_lower_warp, [](Sum a, Sum b) { return a + b; });
}

// Finds the bin that holds the element of a 0-based rank, given that each bin holds count(bin)
// elements. Writes that bin, the number of elements below it and the number in it to scratch.
// Called by all threads.
template <typename CountOf>
__device__ void find_rank(CountOf count, int32_t bins, Count rank, RankScratch& scratch) {
  const int thread = threadIdx.x;
  const int32_t run = bins_per_thread(bins);
  const int32_t begin = min(thread * run, bins);
  const int32_t size = min(run, bins - begin);

  // Where runs are a power of two long, each thread starts at another place of its run:
  // neighbouring threads then use different banks of shared memory.
  Count mine = 0;
  int32_t place = size > 0 && (size & (size - 1)) == 0 ? thread & (size - 1) : 0;
#pragma unroll 4
  for (int32_t i = 0; i < size; ++i) {
    mine += count(begin + place);
    if (++place == size) place = 0;
  }

  Count below = sum_of_lower_threads(mine, scratch.warp_sums);
  if (below <= rank && rank < below + mine) {
    int32_t bin = begin;
    Count here = count(bin);
    while (below + here <= rank) {
      below += here;
      here = count(++bin);
    }
    scratch.bin = bin;
    scratch.below = below;
    scratch.count = here;
  }
  __syncthreads();
}

// The same for a rank that may be beyond the elements: then it returns false.
template <typename CountOf>
__device__ bool try_find_rank(CountOf count, int32_t bins, Count rank, RankScratch& scratch) {
  if (threadIdx.x == 0) scratch.bin = -1;
  find_rank(count, bins, rank, scratch);
  return scratch.bin >= 0;
}

// Sets scratch.next to the first bin above scratch.bin that is not empty, or to `bins` if there is
// none. Called by all threads, after find_rank.
template <typename CountOf>
__device__ void find_next_bin(CountOf count, int32_t bins, RankScratch& scratch) {
  if (threadIdx.x == 0) scratch.next = bins;
  __syncthreads();
  const int thread = threadIdx.x;
  const int32_t run = bins_per_thread(bins);
  const int32_t end = min((thread + 1) * run, bins);
  int32_t bin = max(thread * run, scratch.bin + 1);
  while (bin < end && count(bin) == 0) ++bin;
  if (bin < end) atomicMin(&scratch.next, static_cast<uint32_t>(bin));
  __syncthreads();
}

// Adds to a counter in device memory and returns what it was. Releases what the block has written,
// and acquires what others have released. Fences on both sides of a plain atomic do so too, but
// they are two and sequentially consistent ones, and before a fence nvcc makes every atomic return
// its old value.
__device__ inline Count arrive(Count* done, Count mine) {
#ifdef __CUDA_ARCH__
  Count before;
  asm volatile("atom.add.acq_rel.gpu.global.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(done), "l"(mine)
               : "memory");
  return before;
#else
  __threadfence();
  const Count before = atomicAdd(done, mine);
  __threadfence();
  return before;
#endif
}

// Returns true in the block that brings *done to `total`. That block then sees everything that the
// others wrote before they arrived: one thread releases and acquires for its block, since barriers
// order all threads' accesses before and after its own. Called by all threads.
__device__ inline bool last_to_arrive(Count* done, Count mine, Count total, bool& scratch) {
  __syncthreads();
  if (threadIdx.x == 0) {
    scratch = arrive(done, mine) + mine == total;
  }
  __syncthreads();
  return scratch;
}

}  // namespace pdp
