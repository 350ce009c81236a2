// Magnitudes as integers: an IEEE float without its sign bit is an unsigned integer with the order
// of |w|. So the k-th magnitude can be found by counting digits, with no arithmetic on the values
// and no rounding. For CPU and CUDA kernels.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define PDP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PDP_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace pdp {

enum class WeightType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

constexpr PDP_HOST_DEVICE int bytes_of(WeightType type) {
  return type == WeightType::kFloat64 ? 8 : type == WeightType::kFloat32 ? 4 : 2;
}

// 16-bit weights are stored as their bits; the type says how to read them.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename To, typename From>
PDP_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of one size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// For each weight type: the type and the number of bits of its keys, the key of infinity, the type
// of a threshold, and the value of a key.
template <typename Weight>
struct Magnitude;

template <>
struct Magnitude<double> {
  using Key = uint64_t;
  using Threshold = double;
  static constexpr int kBits = 63;
  static constexpr Key kInfinity = 0x7FF0000000000000;
  static PDP_HOST_DEVICE double value(Key key) { return bit_cast<double>(key); }
};

template <>
struct Magnitude<float> {
  using Key = uint32_t;
  using Threshold = float;
  static constexpr int kBits = 31;
  static constexpr Key kInfinity = 0x7F800000;
  static PDP_HOST_DEVICE double value(Key key) { return bit_cast<float>(key); }
};

template <>
struct Magnitude<BFloat16> {
  using Key = uint16_t;
  using Threshold = float;
  static constexpr int kBits = 15;
  static constexpr Key kInfinity = 0x7F80;
  static PDP_HOST_DEVICE double value(Key key) {
    return bit_cast<float>(static_cast<uint32_t>(key) << 16);
  }
};

template <>
struct Magnitude<Half> {
  using Key = uint16_t;
  using Threshold = float;
  static constexpr int kBits = 15;
  static constexpr Key kInfinity = 0x7C00;
  // A normal half, moved up to float's exponent, is a float 2^112 times too small. A subnormal
  // counts units of 2^-24: as an integer it survives a CPU that flushes subnormal operands.
  static PDP_HOST_DEVICE double value(Key key) {
    if (key > kInfinity) return Magnitude<float>::value(Magnitude<float>::kInfinity + 1);
    if (key == kInfinity) return Magnitude<float>::value(Magnitude<float>::kInfinity);
    if (key < 0x400) return key * 0x1p-24;
    return bit_cast<float>(static_cast<uint32_t>(key) << 13) * 0x1p112;
  }
};

// Returns the key of a weight: the bits of its magnitude. Every NaN gets the key just above
// infinity's, so that NaNs are equal to each other and above everything else, as in torch.sort.
template <typename Weight>
PDP_HOST_DEVICE typename Magnitude<Weight>::Key magnitude_key(Weight weight) {
  using Key = typename Magnitude<Weight>::Key;
  constexpr Key kSignless = static_cast<Key>((Key{1} << Magnitude<Weight>::kBits) - 1);
  constexpr Key kNaN = Magnitude<Weight>::kInfinity + 1;
  const Key key = bit_cast<Key>(weight) & kSignless;
  return key < kNaN ? key : kNaN;
}

// Returns (a + b) / 2 for 0 <= a <= b, rounded once. If b > 1, both are halved first, so that the
// sum cannot overflow; else the sum is halved, so that no bit of a subnormal is lost.
PDP_HOST_DEVICE double midpoint(double a, double b) {
  return b > 1 ? 0.5 * a + 0.5 * b : 0.5 * (a + b);
}

// Returns the threshold between the k-th and the k+1-th of n magnitudes (-inf keeps all weights,
// +inf prunes all; without weights it is -inf). For weights narrower than double the midpoint is
// exact in double, or rounding it twice is innocuous (53 >= 2 * 24 + 2), so t is the midpoint
// correctly rounded to float.
template <typename Weight>
PDP_HOST_DEVICE typename Magnitude<Weight>::Threshold threshold_between(
    typename Magnitude<Weight>::Key kth, typename Magnitude<Weight>::Key next, int64_t k,
    int64_t n) {
  using Threshold = typename Magnitude<Weight>::Threshold;
  const double infinity = Magnitude<double>::value(Magnitude<double>::kInfinity);
  if (k <= 0 || n == 0) return static_cast<Threshold>(-infinity);
  if (k >= n) return static_cast<Threshold>(infinity);
  return static_cast<Threshold>(
      midpoint(Magnitude<Weight>::value(kth), Magnitude<Weight>::value(next)));
}

}  // namespace pdp
