"""A call of every operator, and what the GPU tests do with calls."""

import torch

from pdp_kernels.ops import reference

# The operators that Triton serves on a GPU.
TRITON = (
    "soft_mask",
    "soft_mask_backward",
    "soft_mask_nm",
    "soft_mask_nm_backward",
    "hard_mask_nm",
    "compress_2to4",
    "channel_norms",
    "soft_mask_channel",
    "soft_mask_channel_backward",
)


def call(name, weight, grad):
    """The results of an operator: all that it can return, from all that it can be given.

    weight: a matrix; for compress_2to4 of bfloat16, with rows in 32s and columns in 64s.
    grad: of the same shape and dtype.
    """
    operator = getattr(torch.ops.pdp, name)
    dtype = reference.threshold_dtype([weight])
    t, tau = (torch.full((), value, dtype=dtype, device=weight.device) for value in (0.7, 0.3))
    counts = torch.full((2,), 5, device=weight.device)
    group = (4, torch.full((), 2, device=weight.device), 1)
    if name == "prune_counts":
        return (operator([weight, weight[0]], [0.3, 1.0]),)
    if name == "thresholds":
        return (operator([weight, grad], counts),)
    if name == "digit_counts":
        return operator([weight, grad], 0 * counts, 0)
    if name == "power_sums":
        return (operator([weight, grad], [grad > 0, None], 0.5, 1.0, True),)
    if name == "hard_mask":
        return (operator(weight, counts[:1]),)
    if name == "soft_mask_list":
        return tuple(operator([weight, grad], t.expand(2), tau.expand(2), True, None))
    if name == "soft_mask_list_backward":
        return tuple(operator([grad, None], [weight, grad], t.expand(2), tau.expand(2), True))
    if name == "soft_mask":
        return operator(weight, t, tau, True, None, True)
    if name == "soft_mask_backward":
        return (operator(grad, grad, weight, t, tau, True),)
    if name == "soft_mask_nm":
        return operator(weight, tau, *group, True, None, True)
    if name == "soft_mask_nm_backward":
        return (operator(grad, grad, weight, tau, *group, True),)
    if name == "hard_mask_nm":
        return (operator(weight, *group),)
    if name == "compress_2to4":
        return operator(weight)
    norms = torch.ops.pdp.channel_norms(weight, 0, True)
    if name == "channel_norms":
        return (norms,)
    if name == "soft_mask_channel":
        return operator(weight, norms, t, tau, 0, True, None)
    assert name == "soft_mask_channel_backward"
    return (operator(grad, grad[:, 0], weight, norms, t, tau, 0, True, True),)


def matrices(name, columns=128):
    """A weight and a gradient for an operator, on the host; of bfloat16 where no other will do."""
    dtype = torch.bfloat16 if name == "compress_2to4" else torch.float32
    return [torch.randn(64, columns).to(dtype) for _ in range(2)]


def side_stream():
    """A stream that begins after all work that was given to the current one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return stream


def captured(function):
    """A CUDA graph of a call, and what it will have returned after a replay.

    The call runs before on a side stream, as torch asks for: kernels are compiled, and memory is at
    hand.
    """
    stream = side_stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results
