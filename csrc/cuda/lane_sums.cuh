// One lane's part of the sums of a tile: sum_packets for float32 and 16-bit weights and the powers
// 1/2, 1 and 2; sum_each for every weight and power.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../convert.h"
#include "../magnitude.h"
#include "../powers.h"
#include "block.cuh"

namespace pdp {

// Returns 1 / sqrt(x) for a normal x > 0, with a relative error below 2^-22.9 (PTX ISA, rsqrt).
__device__ inline float reciprocal_root(float x) {
#ifdef __CUDACC__
  float root;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return host_cuda::reciprocal_root(x);
#endif
}

__device__ inline double load_weight(const double* address) { return __ldg(address); }
__device__ inline float load_weight(const float* address) { return __ldg(address); }
__device__ inline BFloat16 load_weight(const BFloat16* address) { return {__ldg(&address->bits)}; }
__device__ inline Half load_weight(const Half* address) { return {__ldg(&address->bits)}; }

// 16 bytes of weights.
template <typename Weight>
struct WeightPacket {
  static constexpr int kSize = 16 / sizeof(Weight);
  uint32_t words[4];

  // Returns the bits of |w_j| as a float. A NaN is above infinity.
  __device__ uint32_t magnitude_bits(int j) const {
    if (std::is_same_v<Weight, float>) return words[j] & 0x7FFFFFFF;
    const uint32_t word = words[j / 2];
    if (std::is_same_v<Weight, BFloat16>) return (j % 2 == 0 ? word << 16 : word) & 0x7FFF0000;
    const uint32_t magnitudes = word & 0x7FFF7FFF;
    return bit_cast<uint32_t>(widen(Half{static_cast<uint16_t>(magnitudes >> (j % 2 * 16))}));
  }
};

constexpr uint32_t kFloatToDouble = 1 << 29;

// Returns |w| 2^-896. A float's bits times 2^29 are a double whose exponent has another bias, even
// if the float is subnormal or 0. Infinity and NaN become finite: at least 2^128 2^-896.
__device__ inline double scaled_magnitude(uint32_t bits, uint32_t float_to_double) {
#ifdef __CUDACC__
  uint64_t wide;  // one instruction; nvcc makes two shifts of a product with a constant
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(wide) : "r"(bits), "r"(float_to_double));
#else
  const uint64_t wide = uint64_t{bits} * float_to_double;
#endif
  return bit_cast<double>(wide);
}

// The sums of a lane's weights, if all are below 2^63. A root takes 9 instructions, 4 of float64.
//
// Let x = |w| 2^-896 (exact), y = (1 + e) / sqrt(x) with |e| < 2^-22.9, s = x y, and z = s y, which
// is (1 + e)^2. The root is s / sqrt(z). The parabola kFactor ((z - kCentre)^2 + kOffset) has the
// value and the slope of 1 / sqrt(z) at z = 1. Half its second derivative is kFactor = 128/341, not
// 3/8: so kCentre and kOffset have few bits, and fit into an instruction. The errors of a root,
// relative to it:
//
//   of the parabola  (3/8 - 128/341) (2e)^2 + 5/16 (2e)^3  below 2.5e-17
//   of rounding      s, z - kCentre, square plus kOffset    below 2^-53 + 2^-55 + 2^-53
//
// So a root has an error below 2.8e-16. A lane adds up to 64 roots of a tile to each of two sums,
// with an error of up to 2^-53 each time. The error of a tile's sums is below 8e-15, and in
// practice far smaller, since errors of rounding cancel.
template <Norms kNorms>
class PacketSums {
 public:
  __device__ explicit PacketSums(uint32_t float_to_double) : float_to_double_(float_to_double) {}

  // Adds the weights of a packet. flags: 0 for a pruned one.
  template <bool kMasked, typename Weight>
  __device__ void add(const WeightPacket<Weight>& packet, const uint8_t* flags) {
#pragma unroll
    for (int j = 0; j < packet.kSize; ++j) {
      const uint32_t bits = packet.magnitude_bits(j);
      if (kMasked) count_ += flags[j] != 0;
      add(j, kMasked && flags[j] == 0 ? 0 : bits);
    }
  }

  // Adds the first weight of a packet.
  template <typename Weight>
  __device__ void add_first(const WeightPacket<Weight>& packet, bool counts) {
    count_ += counts;
    add(0, counts ? packet.magnitude_bits(0) : 0);
  }

  __device__ PowerSums sums() const {
    constexpr double kOfP = kNorms == Norms::kOneTwo ? 0x1p896 : 0x1p448 * kFactor;
    constexpr double kOfQ = kNorms == Norms::kHalfOne ? 0x1p896 : 0x1p-208;
    return {static_cast<double>(count_), (p_[0] + p_[1]) * kOfP, (q_[0] + q_[1]) * kOfQ};
  }

  // Whether every weight was below 2^63. If not, sum |w|^q is at least (2^63)^q.
  static __device__ bool fit(PowerSums sums) {
    return sums.q < (kNorms == Norms::kHalfOne ? 0x1p63 : 0x1p126);
  }

 private:
  static constexpr double kCentre = 853 / 512.0;
  static constexpr double kOffset = 582087 / 262144.0;  // 4 (kCentre - 1) - (kCentre - 1)^2
  static constexpr double kFactor = 128 / 341.0;        // 1 / (4 (kCentre - 1))

  // Adds to one of two independent sums.
  __device__ void add(int j, uint32_t bits) {
    double& p = p_[j % 2];
    double& q = q_[j % 2];
    const double x = scaled_magnitude(bits, float_to_double_);
    p = kNorms == Norms::kOneTwo ? p + x : add_root(bits, x, p);
    const double in_range = x * 0x1p1000;  // its square is
    q = kNorms == Norms::kHalfOne ? q + x : std::fma(in_range, in_range, q);
  }

  // Returns sum + sqrt(x) / kFactor.
  static __device__ double add_root(uint32_t bits, double x, double sum) {
    // A normal float for every weight below 2^64, that of 0 too: 2^-126 rounds away for all others.
    const float argument = std::fma(bit_cast<float>(bits), 0x1p64f, 0x1p-126f);
    // The root times 2^480, by the same change of bias.
    constexpr uint64_t kScale = uint64_t{896 + 480} << 52;
    const uint64_t root_bits = bit_cast<uint32_t>(reciprocal_root(argument));
    const double y = bit_cast<double>(root_bits * kFloatToDouble + kScale);
    const double s = x * y;
    const double from_centre = std::fma(s, y, -kCentre);
    return std::fma(s, std::fma(from_centre, from_centre, kOffset), sum);
  }

  uint32_t float_to_double_;
  int count_ = 0;
  double p_[2] = {}, q_[2] = {};
};

template <typename Weight>
using PacketFlags = std::conditional_t<sizeof(Weight) == 4, uint32_t, uint64_t>;

// Adds up to kInFlight packets, the lane's of the first `count`.
template <bool kMasked, int kInFlight, typename Weight, typename Sums>
__device__ void add_round(const uint4* packets, const PacketFlags<Weight>* masks, int count,
                          Sums& sums) {
  using Flags = PacketFlags<Weight>;
  const int mine = count - static_cast<int>(threadIdx.x % kWarp);
  uint4 loaded[kInFlight] = {};
  Flags flags[kInFlight] = {};
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (i * kWarp < mine) {
      loaded[i] = __ldg(&packets[i * kWarp]);
      if (kMasked) flags[i] = __ldg(&masks[i * kWarp]);
    }
  }
  // This branch needs all packets: the compiler cannot delay a load until the one before is used.
  Flags any = 0;
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    any |= flags[i] | loaded[i].x | loaded[i].y | loaded[i].z | loaded[i].w;
  }
  if (any == 0) return;
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const auto flag = bit_cast<Packet<uint8_t, sizeof(Flags)>>(flags[i]);
    sums.template add<kMasked>(bit_cast<WeightPacket<Weight>>(loaded[i]), flag.at);
  }
}

// Adds `count` packets, of 16 bytes at multiples of 16.
template <bool kMasked, typename Weight, typename Sums>
__device__ void add_aligned(const Weight* weights, const uint8_t* kept, int count, Sums& sums) {
  constexpr int kInFlight = kMasked ? kPacketsInFlight / 2 : kPacketsInFlight;
  constexpr int kRound = kWarp * kInFlight;
  const int lane = threadIdx.x % kWarp;
  const auto* packets = reinterpret_cast<const uint4*>(weights) + lane;
  const auto* masks = reinterpret_cast<const PacketFlags<Weight>*>(kept) + lane;
  for (; count > kWarp; count -= kRound, packets += kRound, masks += kRound) {
    add_round<kMasked, kInFlight, Weight>(packets, masks, count, sums);
  }
  if (count > 0) add_round<kMasked, 1, Weight>(packets, masks, count, sums);
}

// The same at any address. kept: null if no weight is pruned.
template <typename Weight, typename Sums>
__device__ void add_unaligned(const Weight* weights, const uint8_t* kept, int count, Sums& sums) {
  constexpr int kPerPacket = 16 / sizeof(Weight);
  for (int packet = threadIdx.x % kWarp; packet < count; packet += kWarp) {
    const Weight* unaligned = weights + packet * kPerPacket;
    Packet<Weight> loaded;
    Packet<uint8_t, kPerPacket> flags;
#pragma unroll
    for (int j = 0; j < kPerPacket; ++j) {
      loaded.at[j] = load_weight(&unaligned[j]);
      flags.at[j] = kept == nullptr ? 1 : __ldg(&kept[packet * kPerPacket + j]);
    }
    sums.template add<true>(bit_cast<WeightPacket<Weight>>(loaded), flags.at);
  }
}

// Returns a lane's sums of a tile: packets of weights in turn, and one of the last weights, which
// fill no packet. So equal weights give equal bits, whatever their alignment.
template <Norms kNorms, typename Weight>
__device__ PowerSums sum_packets(const Weight* weights, const uint8_t* kept, int size,
                                 uint32_t float_to_double) {
  constexpr int kPerPacket = 16 / sizeof(Weight);
  const int lane = threadIdx.x % kWarp, rest = size % kPerPacket;
  PacketSums<kNorms> sums(float_to_double);
  const bool aligned = reinterpret_cast<uintptr_t>(weights) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(kept) % kPerPacket == 0;
  if (!aligned) {
    add_unaligned(weights, kept, size / kPerPacket, sums);
  } else if (kept == nullptr) {
    add_aligned<false>(weights, kept, size / kPerPacket, sums);
  } else {
    add_aligned<true>(weights, kept, size / kPerPacket, sums);
  }
  if (lane < rest) {
    const int i = size - rest + lane;
    const Packet<Weight> last = {{load_weight(&weights[i])}};
    sums.add_first(bit_cast<WeightPacket<Weight>>(last), kept == nullptr || __ldg(&kept[i]) != 0);
  }
  PowerSums result = sums.sums();
  if (kept == nullptr) result.count = lane == 0 ? size : 0;
  return result;
}

// Returns a lane's sums of a tile: every 32nd weight, in order.
template <Norms kNorms, int kUnroll, typename MagnitudeAt>
__device__ PowerSums sum_each(MagnitudeAt magnitude_at, const uint8_t* kept, int size, double p,
                              double q) {
  int count = 0;
  double sum_p = 0, sum_q = 0;
#pragma unroll kUnroll
  for (int i = threadIdx.x % kWarp; i < size; i += kWarp) {
    const bool counts = kept == nullptr || kept[i] != 0;
    const double of_weight = magnitude_at(i);
    const double magnitude = counts ? of_weight : 0.0;
    count += counts;
    sum_p += power_p<kNorms>(magnitude, p);
    sum_q += power_q<kNorms>(magnitude, q);
  }
  return {static_cast<double>(count), sum_p, sum_q};
}

}  // namespace pdp
