// Elements of any storage type that a thread loads and stores at once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../convert.h"
#include "../magnitude.h"

namespace pdp {

// Returns two values as 16-bit elements, the first in the lower half.
template <typename Stored>
__device__ uint32_t narrow_two(float first, float second) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  if constexpr (std::is_same_v<Stored, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  }
  return word;
#else
  Stored low, high;
  narrow(first, low);
  narrow(second, high);
  return static_cast<uint32_t>(high.bits) << 16 | low.bits;
#endif
}

// 8 or 16 bytes of elements.
template <typename Stored, int kElements>
struct StoredPacket {
  static constexpr int kWords = kElements * sizeof(Stored) / 4;
  using Access = std::conditional_t<kWords == 4, uint4, uint2>;

  uint32_t words[kWords];

  // Loads elements that no kernel of this launch writes.
  __device__ void load(const Stored* address) {
    const Access loaded = __ldg(reinterpret_cast<const Access*>(address));
    words[0] = loaded.x;
    words[1] = loaded.y;
    if constexpr (kWords == 4) {
      words[2] = loaded.z;
      words[3] = loaded.w;
    }
  }

  __device__ void store(Stored* address) const {
    *reinterpret_cast<Access*>(address) = bit_cast<Access>(*this);
  }

  __device__ auto get(int i) const {
    if constexpr (std::is_same_v<Stored, double>) {
      return bit_cast<double>(uint64_t{words[2 * i + 1]} << 32 | words[2 * i]);
    } else if constexpr (std::is_same_v<Stored, float>) {
      return bit_cast<float>(words[i]);
    } else if constexpr (std::is_same_v<Stored, BFloat16>) {
      return bit_cast<float>(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xFFFF0000);
    } else {
      return widen(Half{static_cast<uint16_t>(words[i / 2] >> i % 2 * 16)});
    }
  }

  template <typename Real>
  __device__ void set(const Real (&values)[kElements]) {
    if constexpr (std::is_same_v<Stored, Real>) {
      memcpy(words, values, sizeof(words));
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        words[i] = narrow_two<Stored>(values[2 * i], values[2 * i + 1]);
      }
    }
  }
};

}  // namespace pdp
