// The k-th and k+1-th smallest magnitude from one read of the weights.
//
// One pass counts the keys below a bracket of v_k and at its ends, counts those inside in bins, and
// collects them. If the counts show that v_k is inside, a second kernel selects among the
// candidates of its bin; else a radix select (radix_select.cuh) starts anew. A bracket of at most
// kBracketBins keys, as of 16-bit weights or of ties, has a bin for each: nothing is collected.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "block.cuh"
#include "block_select.cuh"
#include "histogram.cuh"
#include "launch.cuh"
#include "sample.cuh"
#include "selection.cuh"
#include "weight_table.cuh"

namespace pdp {

// The keys inside the bracket that each thread has met lately: a column for each, so that no thread
// waits for another.
template <typename Key>
struct InsideKeys {
  static constexpr int kRows = 128 / sizeof(Key);

  Key differences[kRows][kSelectionThreads];
};

// What the threads of a block add up once they have read a slice. No slice has 2^32 keys.
struct SliceSums {
  uint32_t below, at_low, at_high;
  uint32_t between;
  Count place;  // of its keys between the ends among the candidates
};

template <typename Key>
struct BracketShared {
  Histogram<kBracketBins<Key>> counters;
  SliceSums sums;
  union {
    InsideKeys<Key> inside;
    Count merged[kBracketBins<Key>];  // once the keys inside are counted
  };
  RankScratch rank;
  Slice<Key> slice;
  Search<Key> search;
  bool last;
};

// What all blocks have counted in a tensor.
struct BracketCounts {
  int64_t below, at_low, at_high, inside;
};

template <typename Key>
struct SurvivorsShared {
  static constexpr int32_t kStaged = 2048;

  SelectScratch<Key> select;
  Key staged[kStaged];  // the survivors, if they are few enough
  Slice<Key> slice;
  Search<Key> search;
  bool last;
};

// Counts the keys of a slice below a bracket and inside it. Each thread has one.
template <typename Weight>
class BracketCounter {
 public:
  using Key = typename Magnitude<Weight>::Key;

  __device__ BracketCounter(const Bracket<Key>& bracket, BracketShared<Key>& shared,
                            Key* candidates, int64_t capacity, Count* reserved)
      : bracket_(bracket),
        shared_(shared),
        candidates_(candidates),
        capacity_(static_cast<Count>(capacity)),
        reserved_(reserved),
        column_(&shared.inside.differences[0][threadIdx.x]),
        place_(column_) {}

  // Counts the weights [begin, end). Called by all threads of the block.
  __device__ void count(const Weight* weights, int64_t begin, int64_t end) {
    const auto address = reinterpret_cast<uintptr_t>(weights + begin);
    const auto misaligned = static_cast<int64_t>((16 - address % 16) % 16 / sizeof(Weight));
    const int64_t head = min(misaligned, end - begin);
    if (threadIdx.x < head) count_one(weights[begin + threadIdx.x]);
    begin += head;
    const int64_t tail = (end - begin) % kPerPacket;
    if (threadIdx.x < tail) count_one(weights[end - tail + threadIdx.x]);

    const auto* packets = reinterpret_cast<const uint4*>(weights + begin) + threadIdx.x;
    constexpr int kRound = kSelectionThreads * kPacketsInFlight;
    int64_t left = (end - begin) / kPerPacket;
    for (; left >= kRound; left -= kRound, packets += kRound) {
      uint4 loaded[kPacketsInFlight];
#pragma unroll
      for (int i = 0; i < kPacketsInFlight; ++i) loaded[i] = __ldg(&packets[i * kSelectionThreads]);
#pragma unroll
      for (int i = 0; i < kPacketsInFlight; ++i) count_packet(loaded[i]);
      end_round();
    }
    for (int64_t i = threadIdx.x; i < left; i += kSelectionThreads, packets += kSelectionThreads) {
      count_packet(__ldg(packets));
    }
    end_round();
  }

  // Adds the counts to the tensor's, once for the block: thousands of warps would wait for one
  // another. Called by all threads of the block, with shared.sums zero. All keys are counted
  // when it returns.
  __device__ void finish(SelectionState<Key>& state) {
    SliceSums& sums = shared_.sums;
    const uint32_t between = settle();
    const WarpSums warp = sum_over_lanes(between);
    uint32_t own = 0;
    if (threadIdx.x % kWarp == 0 && warp.all > 0) own = atomicAdd(&sums.between, warp.all);
    own = __shfl_sync(kAllLanes, own, 0) + warp.lower;
    add(below_, sums.below);
    add(at_low_, sums.at_low);
    add(at_high_, sums.at_high);
    __syncthreads();
    if (threadIdx.x == 0) {
      if (sums.between > 0) sums.place = atomicAdd(reserved_, Count{sums.between});
      if (sums.below > 0) atomicAdd(&state.below, Count{sums.below});
      if (sums.at_low > 0) atomicAdd(&state.at_low, Count{sums.at_low});
      if (sums.at_high > 0) atomicAdd(&state.at_high, Count{sums.at_high});
    }
    if constexpr (!kCollects<Key>) return;
    __syncthreads();
    append(between, sums.place + own);
  }

 private:
  static constexpr int kPerPacket = 16 / sizeof(Weight);

  __device__ void count_one(Weight weight) {
    const Key difference = magnitude_key(weight) - bracket_.low;
    below_ += is_negative(difference);
    if (difference <= bracket_.width) take(difference);
  }

  // NaNs may have keys above their own until they are counted: they are above every end of a
  // bracket below infinity anyway.
  __device__ void count_packet(uint4 loaded) {
    if constexpr (kCollects<Key>) {
      const auto packet = bit_cast<Packet<Key>>(loaded);
#pragma unroll
      for (int i = 0; i < kPerPacket; ++i) {
        const Key difference = (packet.at[i] & kHighest<Key>)-bracket_.low;
        below_ += is_negative(difference);
        if (difference <= bracket_.width) take(difference);
      }
    } else {
      // The upper key of a word stays where it is, 16 bits higher.
      const auto words = bit_cast<Packet<uint32_t>>(loaded);
      const uint32_t low = bracket_.low, width = bracket_.width;
#pragma unroll
      for (int i = 0; i < kPerPacket / 2; ++i) {
        const uint32_t first = (words.at[i] & 0x7FFF) - low;
        const uint32_t second = (words.at[i] & 0x7FFF0000) - (low << 16);
        below_ += first >> 31;
        below_ += second >> 31;
        if (first <= width) take(static_cast<Key>(first));
        if (second <= (width << 16 | 0xFFFF)) take(static_cast<Key>(second >> 16));
      }
    }
  }

  // Takes a key inside the bracket.
  __device__ void take(Key difference) {
    *place_ = difference;
    place_ += kSelectionThreads;
  }

  // Counts a key inside the bracket. Returns whether it is between the ends, if bins hold several
  // keys.
  __device__ bool count_inside(Key difference) {
    const bool at_low = bracket_.shift != 0 && difference == 0;
    const bool at_high = bracket_.shift != 0 && difference == bracket_.width;
    at_low_ += at_low;
    at_high_ += at_high;
    if (at_low || at_high) return false;
    shared_.counters.add(static_cast<uint32_t>(difference >> bracket_.shift));
    return bracket_.shift != 0;
  }

  // Called by all threads of the block, after as many keys of each as a round has.
  __device__ void end_round() {
    constexpr int kRound = kPacketsInFlight * kPerPacket;
    static_assert(2 * kRound <= InsideKeys<Key>::kRows, "room for one more round");
    const Key* full = column_ + (InsideKeys<Key>::kRows - kRound) * kSelectionThreads;
    if (__any_sync(kAllLanes, place_ > full)) flush();
  }

  // Counts the keys that the thread has taken. Returns how many are between the ends of the
  // bracket, if those are collected, and keeps these in the first rows of its column.
  __device__ uint32_t settle() {
    uint32_t between = 0;
    for (const Key* taken = column_; taken != place_; taken += kSelectionThreads) {
      constexpr Key kNaN = Magnitude<Weight>::kInfinity + 1;
      const Key difference = min(static_cast<Key>(*taken + bracket_.low), kNaN) - bracket_.low;
      if (count_inside(difference)) column_[between++ * kSelectionThreads] = difference;
    }
    place_ = column_;
    return between;
  }

  // Writes so many settled keys to the candidates from a place on, and none beyond the capacity.
  __device__ void append(uint32_t between, Count place) {
    for (uint32_t i = 0; i < between && place + i < capacity_; ++i) {
      candidates_[place + i] = bracket_.low + column_[i * kSelectionThreads];
    }
  }

  // Makes room in the columns of the warp. Called by all lanes.
  __device__ void flush() {
    const uint32_t between = settle();
    if constexpr (!kCollects<Key>) return;
    const WarpSums sums = sum_over_lanes(between);
    Count place = 0;
    if (threadIdx.x % kWarp == 0 && sums.all > 0) place = atomicAdd(reserved_, Count{sums.all});
    append(between, __shfl_sync(kAllLanes, place, 0) + sums.lower);
  }

  // Whether a difference of two keys is, as these have no bit of the sign.
  static __device__ uint32_t is_negative(Key difference) {
    return static_cast<uint32_t>(difference >> (8 * sizeof(Key) - 1));
  }

  static __device__ void add(uint32_t mine, uint32_t& total) {
    const uint32_t sum = warp_reduce(mine, [](uint32_t a, uint32_t b) { return a + b; });
    if (threadIdx.x % kWarp == 0 && sum > 0) atomicAdd(&total, sum);
  }

  const Bracket<Key> bracket_;
  BracketShared<Key>& shared_;
  Key* candidates_;
  const Count capacity_;
  Count* reserved_;
  Key* const column_;  // of this thread
  Key* place_;         // its end
  uint32_t below_ = 0, at_low_ = 0, at_high_ = 0;
};

// Starts a radix select, as the bracket did not lead to v_k. Called by all threads.
template <typename Key>
__device__ void fall_back(const Selection<Key>& selection, const Slice<Key>& slice) {
  if (!slice.is_whole_tensor()) {
    Count* histogram = histogram_of(selection, slice.tensor, slice.entry);
    for (int32_t bin = threadIdx.x; bin < selection.bins; bin += blockDim.x) histogram[bin] = 0;
  }
  if (threadIdx.x != 0) return;
  SelectionState<Key>& state = selection.states[slice.tensor];
  state.stage = Stage::kDigits;
  state.reserved = 0;
  atomicAdd(selection.unfinished, Count{1});
}

// Finds v_k in a bracket that has a bin for each key. Returns whether v_k and v_{k+1} are inside.
// Called by all threads.
template <typename Key, typename CountOf>
__device__ bool find_in_bins(const Selection<Key>& selection, const Slice<Key>& slice,
                             const Bracket<Key>& bracket, CountOf count, int64_t rank,
                             RankScratch& scratch) {
  SelectionState<Key>& state = selection.states[slice.tensor];
  const int32_t bins = bracket.bins();
  if (!try_find_rank(count, bins, static_cast<Count>(rank), scratch)) return false;
  const auto key_of = [&](uint32_t bin) { return static_cast<Key>(bracket.low + bin); };
  OrderStatistic<Key> kth = {key_of(scratch.bin), rank - static_cast<int64_t>(scratch.below),
                             static_cast<int64_t>(scratch.count)};
  Key next = kth.key;
  if (kth.rank + 1 == kth.count) {
    find_next_bin(count, bins, scratch);
    if (static_cast<int32_t>(scratch.next) == bins) return false;
    next = key_of(scratch.next);
  }
  if (threadIdx.x == 0) store_found(selection, slice.entry, kth, next, state);
  return true;
}

// Finds v_k at an end of the bracket, or the bin that it is in. Returns whether it is inside and
// all candidates are there. Called by all threads.
template <typename Key, typename CountOf>
__device__ bool find_bin(const Selection<Key>& selection, const Slice<Key>& slice,
                         const Bracket<Key>& bracket, const BracketCounts& counts, CountOf count,
                         int64_t rank, RankScratch& scratch) {
  const TableEntry& entry = slice.entry;
  SelectionState<Key>& state = selection.states[slice.tensor];
  const Key high = static_cast<Key>(bracket.low + bracket.width);
  const int64_t at_low = counts.at_low, at_high = counts.at_high, inside = counts.inside;
  if (rank < 0 || inside > candidate_capacity(entry.size)) return false;

  OrderStatistic<Key> kth = {bracket.low, rank, at_low};
  Key next = at_high > 0 ? high : static_cast<Key>(~Key{0});
  int32_t bin = -1;
  bool found = false;
  if (rank < at_low) {
    if (rank + 1 < at_low) next = bracket.low;
    found = rank + 1 < at_low || inside == 0;
    if (found && next > kHighest<Key>) return false;
  } else if (try_find_rank(count, bracket.bins(), static_cast<Count>(rank - at_low), scratch)) {
    bin = scratch.bin;
    kth = {0, rank - at_low - static_cast<int64_t>(scratch.below),
           static_cast<int64_t>(scratch.count)};
    if (kth.count > survivor_capacity(entry.size)) return false;
  } else {
    kth = {high, rank - at_low - inside, at_high};
    if (kth.rank + 1 >= at_high) return false;
    found = true;
  }
  if (threadIdx.x != 0) return true;
  if (found) {
    store_found(selection, entry, kth, next, state);
  } else {
    state.stage = Stage::kSurvivors;
    state.prefix = kth.key;
    state.rank = kth.rank;
    state.count = kth.count;
    state.next = next;
    state.bin = bin;
    state.buffered = inside;
  }
  return true;
}

// Reads the weights.
template <typename Key>
__global__ void __launch_bounds__(kSelectionThreads, kSelectionBlocks)
    bracket_kernel(Selection<Key> selection) {
  wait_for_earlier_kernels();
  auto& shared = shared_memory<BracketShared<Key>>();
  for_each_slice(selection, shared.slice, search_loader(selection, shared), [&] {
    const Slice<Key>& slice = shared.slice;
    const TableEntry& entry = slice.entry;
    SelectionState<Key>& state = selection.states[slice.tensor];
    if (shared.search.stage != Stage::kBracket) return;
    const Bracket<Key> bracket = shared.search.bracket;
    const int32_t bins = bracket.bins();
    shared.counters.clear(bins);
    if (threadIdx.x == 0) shared.sums = {};
    __syncthreads();
    // Without candidates a bracket of fewer bins than keys is of no use.
    const bool useful = kCollects<Key> || bracket.shift == 0;
    if (useful) {
      with_weights<Key>(entry, [&](const auto* weights) {
        BracketCounter<std::decay_t<decltype(*weights)>> counter(
            bracket, shared, selection.candidates_of(entry), candidate_capacity(entry.size),
            &state.reserved);
        counter.count(weights, slice.weights_begin(), slice.weights_end());
        counter.finish(state);
      });
    }

    Count* histogram = histogram_of(selection, slice.tensor, entry);
    const bool whole = slice.is_whole_tensor();
    if (!whole) merge_counters(shared.counters, histogram, bins);
    if (!last_to_arrive(&state.tiles_done, static_cast<Count>(slice.tiles),
                        static_cast<Count>(entry.tiles), shared.last)) {
      return;
    }
    // Loaded together with the histogram.
    const BracketCounts counts = {
        static_cast<int64_t>(state.below), static_cast<int64_t>(state.at_low),
        static_cast<int64_t>(state.at_high), static_cast<int64_t>(state.reserved)};
    if (!whole) {
      constexpr int kEach = kBracketBins<Key> / kSelectionThreads;
      copy_histogram<kSelectionThreads, kEach>(histogram, bins, shared.merged);
    }
    __syncthreads();  // all threads have read what fall_back writes
    const auto count = [&](int32_t bin) {
      return whole ? shared.counters[bin] : shared.merged[bin];
    };
    const int64_t rank = shared.search.rank - counts.below;
    bool found = false;
    if (bracket.shift == 0) {
      found = find_in_bins(selection, slice, bracket, count, rank, shared.rank);
    } else if (kCollects<Key>) {
      found = find_bin(selection, slice, bracket, counts, count, rank, shared.rank);
    }
    if (!found) fall_back(selection, slice);
    // An atomic, as every access to this counter by a block is.
    if (threadIdx.x == 0) atomicExch(&state.tiles_done, Count{0});
  });
}

// Reads the candidates, keeps those of v_k's bin, and selects among them.
template <typename Key>
__global__ void __launch_bounds__(kSelectionThreads, kSelectionBlocks)
    survivors_kernel(Selection<Key> selection) {
  wait_for_earlier_kernels();
  auto& shared = shared_memory<SurvivorsShared<Key>>();
  for_each_slice(selection, shared.slice, search_loader(selection, shared), [&] {
    const Slice<Key>& slice = shared.slice;
    const TableEntry& entry = slice.entry;
    SelectionState<Key>& state = selection.states[slice.tensor];
    if (shared.search.stage != Stage::kSurvivors) return;
    const Bracket<Key> bracket = shared.search.bracket;
    const int32_t bin = shared.search.bin;
    Key* survivors = selection.survivors_of(entry);
    WideKey<Key> next = ~WideKey<Key>{0};
    const auto keep = [&](Key key) {
      const auto own = static_cast<int32_t>((key - bracket.low) >> bracket.shift);
      if (own == bin) survivors[atomicAdd(&state.survivors, Count{1})] = key;
      if (own > bin) next = min(next, WideKey<Key>{key});
    };
    const auto range = slice.range_of(shared.search.buffered);
    for_each<kSelectionThreads, Memory::kWorkspace>(selection.candidates_of(entry), range.begin,
                                                    range.end, keep);
    next = warp_reduce(next, [](WideKey<Key> a, WideKey<Key> b) { return min(a, b); });
    if (threadIdx.x % kWarp == 0 && ~next != 0) atomic_min(&state.next, next);
    if (!last_to_arrive(&state.tiles_done, static_cast<Count>(slice.tiles),
                        static_cast<Count>(entry.tiles), shared.last)) {
      return;
    }

    OrderStatistic<Key> kth = {shared.search.prefix, shared.search.rank, shared.search.count};
    auto above = static_cast<Key>(state.next);
    if (bin >= 0) {
      const int64_t size = kth.count;
      // Each digit reads the keys again, which takes longer from device memory.
      const bool few = size <= SurvivorsShared<Key>::kStaged;
      if (few) {
#pragma unroll
        for (int32_t i = 0; i < SurvivorsShared<Key>::kStaged; i += kSelectionThreads) {
          const int32_t place = i + static_cast<int32_t>(threadIdx.x);
          if (place < size) shared.staged[place] = survivors[place];
        }
      }
      const Key* keys = few ? shared.staged : survivors;
      const auto key_at = [&](int64_t i) { return keys[i]; };
      const Key low = static_cast<Key>(bracket.low + (static_cast<Key>(bin) << bracket.shift));
      const auto low_bits_at = [&](int64_t i) { return static_cast<Key>(keys[i] - low); };
      kth = select_in_block(low_bits_at, size, kth.rank, bracket.shift, shared.select);
      kth.key = static_cast<Key>(kth.key + low);
      const bool tied = kth.rank + 1 < kth.count;
      above = tied ? kth.key : least_above(kth.key, key_at, size, above, shared.select);
    }
    if (threadIdx.x != 0) return;
    store_found(selection, entry, kth, above, state);
    // An atomic, as every access to this counter by a block is.
    atomicExch(&state.tiles_done, Count{0});
  });
}

}  // namespace pdp
