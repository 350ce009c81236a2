// Channel masks for CPU: norms of channels in one read, masked weight in one read and one write,
// backward in at most two reads of gradient and weight.
#pragma once

#include "array.h"
#include "parallel.h"

namespace pdp::cpu {

// A dense array in storage order is outer x channels x inner: the dimensions whose strides are
// above that of the channels', the channels, and the dimensions below.
struct ChannelLayout {
  int64_t outer;
  int64_t channels;
  int64_t inner;

  int64_t numel() const { return outer * channels * inner; }
  // The fan-in, or 1 where there are no weights, so that it can divide.
  double weights_per_channel() const { return outer * inner > 0 ? outer * inner : 1; }
};

// The scalars of a mask: pointers to one double for float64 weights, to one float otherwise.
struct ChannelMask {
  const void* norms;  // one per channel
  const void* threshold;
  const void* tau;
  bool relative;
};

// norms = sqrt(sum of w^2), over sqrt(fan-in) if rms; doubles for float64 weights, else floats.
void channel_norms(Array weight, ChannelLayout layout, bool rms, void* norms,
                   ParallelFor parallel_for);

// w_hat = m w, and m of every channel.
void soft_mask_channel(Array weight, ChannelMask given, ChannelLayout layout, Array w_hat,
                       Array mask, ParallelFor parallel_for);

// dW of Eq. 2 with channels; grad_w_hat.data or grad_mask.data may be null (no gradient).
void soft_mask_channel_backward(Array grad_w_hat, Array grad_mask, Array weight, ChannelMask given,
                                ChannelLayout layout, bool rms, Array grad,
                                ParallelFor parallel_for);

}  // namespace pdp::cpu
