// Channel masks for CPU: the norms take one read, the masked weight one read and one write, the
// backward at most two reads of gradient and weight.
#pragma once

#include "array.h"
#include "parallel.h"

namespace pdp::cpu {

// A dense array in storage order is outer x channels x inner: the dimensions of larger strides than
// the channels', the channels, and the dimensions of smaller strides.
struct ChannelLayout {
  int64_t outer;
  int64_t channels;
  int64_t inner;

  int64_t numel() const { return outer * channels * inner; }
  // The fan-in, or 1 if there are no weights, so that it can be divided by.
  double weights_per_channel() const { return outer * inner > 0 ? outer * inner : 1; }
};

// The scalars of a mask: pointers to one double for float64 weights, to one float otherwise.
struct ChannelMask {
  const void* norms;  // one per channel
  const void* threshold;
  const void* tau;
  bool relative;
};

// Writes sqrt(sum of w^2) of each channel, divided by sqrt(fan-in) if rms: doubles for float64
// weights, else floats.
void channel_norms(Array weight, ChannelLayout layout, bool rms, void* norms,
                   ParallelFor parallel_for);

// Writes w_hat = m w, and m of every channel.
void soft_mask_channel(Array weight, ChannelMask given, ChannelLayout layout, Array w_hat,
                       Array mask, ParallelFor parallel_for);

// Writes dW of Eq. 2 with channels. grad_w_hat.data or grad_mask.data may be null (no gradient).
void soft_mask_channel_backward(Array grad_w_hat, Array grad_mask, Array weight, ChannelMask given,
                                ChannelLayout layout, bool rms, Array grad,
                                ParallelFor parallel_for);

}  // namespace pdp::cpu
