#include "gather.h"

namespace pdp::cpu {
namespace {

template <typename Stored, typename Key>
PDP_INLINE int gather_block(const Stored* data, int count, Key low, Key high, Key* keys,
                            int64_t* below) {
  int under = 0;
  for (int i = 0; i < count; ++i) {
    keys[i] = magnitude_key(data[i]);
    under += keys[i] < low;
  }
  int gathered = 0;
  for (int i = 0; i < count; ++i) {
    const Key key = keys[i];
    keys[gathered] = key;
    gathered += static_cast<Key>(key - low) <= static_cast<Key>(high - low);
  }
  *below += under;
  return gathered;
}

}  // namespace

// target_clones takes functions, not templates.
#define PDP_GATHER(Stored, Key)                                                            \
  PDP_MULTIVERSION int gather(const Stored* data, int count, Key low, Key high, Key* keys, \
                              int64_t* below) {                                            \
    return gather_block(data, count, low, high, keys, below);                              \
  }
PDP_GATHER(double, uint64_t)
PDP_GATHER(float, uint32_t)
PDP_GATHER(BFloat16, uint32_t)
PDP_GATHER(Half, uint32_t)
#undef PDP_GATHER

}  // namespace pdp::cpu
