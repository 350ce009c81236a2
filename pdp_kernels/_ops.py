"""The dispatcher operators of namespace ``pdp``: schemas, fakes, vmap rules and backends.

The way of a call: public function -> autograd.Function -> operator -> backend. A backend is chosen
by the dispatcher: native C++ for CPU tensors, CUDA C++ (selection) and Triton (masks) for CUDA
tensors, and the reference for whatever has no kernel here.
"""

import importlib
from importlib.util import find_spec

import torch
from torch import Tensor

from pdp_kernels import _arguments, reference

_library = torch.library.Library("pdp", "DEF")

SCHEMAS = {
    "prune_counts": "(Tensor[] weights, float[] sparsities) -> Tensor",
    "thresholds": "(Tensor[] weights, Tensor prune_counts) -> Tensor",
    "digit_counts": "(Tensor[] weights, Tensor prefixes, int digit) -> (Tensor, Tensor)",
    "hard_mask": "(Tensor weight, Tensor prune_count) -> Tensor",
    "soft_mask": (
        "(Tensor weight, Tensor threshold, Tensor tau, bool relative, ScalarType? out_dtype, "
        "bool return_mask) -> (Tensor, Tensor)"
    ),
    "soft_mask_backward": (
        "(Tensor? grad_w_hat, Tensor? grad_mask, Tensor weight, Tensor threshold, Tensor tau, "
        "bool relative) -> Tensor"
    ),
    "soft_mask_nm": (
        "(Tensor weight, Tensor tau, int m, int pruned, int dim, bool relative, "
        "ScalarType? out_dtype, bool return_mask) -> (Tensor, Tensor)"
    ),
    "soft_mask_nm_backward": (
        "(Tensor? grad_w_hat, Tensor? grad_mask, Tensor weight, Tensor tau, int m, int pruned, "
        "int dim, bool relative) -> Tensor"
    ),
    "hard_mask_nm": "(Tensor weight, int m, int pruned, int dim) -> Tensor",
    "compress_2to4": "(Tensor weight) -> (Tensor, Tensor)",
    "channel_norms": "(Tensor weight, int dim, bool rms) -> Tensor",
    "soft_mask_channel": (
        "(Tensor weight, Tensor norms, Tensor threshold, Tensor tau, int dim, bool relative, "
        "ScalarType? out_dtype) -> (Tensor, Tensor)"
    ),
    "soft_mask_channel_backward": (
        "(Tensor? grad_w_hat, Tensor? grad_mask, Tensor weight, Tensor norms, Tensor threshold, "
        "Tensor tau, int dim, bool relative, bool rms) -> Tensor"
    ),
    "power_sums": ("(Tensor[] weights, Tensor?[] masks, float p, float q, bool per_row) -> Tensor"),
}

for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)

for _name in SCHEMAS:
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


def _load(module: str) -> str | None:
    """Import a module that registers kernels; its error's text if it cannot be loaded."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    return None


# Why each extension module is not live; None where it is.
load_errors = {name: _load(f"pdp_kernels.{name}") for name in ("_C", "_C_cuda")}

has_triton = find_spec("triton") is not None

# The operators that Triton serves, by the file of triton_kernels that has them.
_TRITON = {
    "soft_mask": ("soft_mask", "soft_mask_backward"),
    "soft_mask_nm": ("soft_mask_nm", "soft_mask_nm_backward", "hard_mask_nm"),
    "compress": ("compress_2to4",),
    "soft_mask_channel": ("channel_norms", "soft_mask_channel", "soft_mask_channel_backward"),
}


def _on_first_call(file: str, name: str):
    """The Triton implementation, imported (Triton with it) when it is first called."""
    check = getattr(_arguments, name)

    def call(*args):
        check(*args)
        module = importlib.import_module(f"pdp_kernels.triton_kernels.{file}")
        return getattr(module, name)(*args)

    return call


if has_triton:
    for _file, _names in _TRITON.items():
        for _name in _names:
            _library.impl(_name, _on_first_call(_file, _name), "CUDA")


@torch.library.register_fake("pdp::prune_counts", lib=_library)
def _(weights, sparsities):
    return weights[0].new_empty(len(weights), dtype=torch.int64)


@torch.library.register_fake("pdp::thresholds", lib=_library)
def _(weights, prune_counts):
    return weights[0].new_empty(len(weights), dtype=reference.threshold_dtype(weights))


@torch.library.register_fake("pdp::digit_counts", lib=_library)
def _(weights, prefixes, digit):
    bins = 1 << reference.DIGIT_BITS[weights[0].element_size()][digit]
    return prefixes.new_empty(len(weights), bins), torch.empty_like(prefixes)


@torch.library.register_fake("pdp::hard_mask", lib=_library)
def _(weight, prune_count):
    return weight.new_empty(weight.shape, dtype=torch.bool)


@torch.library.register_fake("pdp::soft_mask", lib=_library)
def _(weight, threshold, tau, relative, out_dtype, return_mask):
    w_hat = torch.empty_like(weight, dtype=out_dtype)
    return w_hat, torch.empty_like(w_hat) if return_mask else w_hat.new_empty(0)


@torch.library.register_fake("pdp::soft_mask_backward", lib=_library)
def _(grad_w_hat, grad_mask, weight, threshold, tau, relative):
    return torch.empty_like(weight)


@torch.library.register_fake("pdp::soft_mask_nm", lib=_library)
def _(weight, tau, m, pruned, dim, relative, out_dtype, return_mask):
    w_hat = torch.empty_like(weight, dtype=out_dtype)
    return w_hat, torch.empty_like(w_hat) if return_mask else w_hat.new_empty(0)


@torch.library.register_fake("pdp::soft_mask_nm_backward", lib=_library)
def _(grad_w_hat, grad_mask, weight, tau, m, pruned, dim, relative):
    return torch.empty_like(weight)


@torch.library.register_fake("pdp::hard_mask_nm", lib=_library)
def _(weight, m, pruned, dim):
    return torch.empty_like(weight, dtype=torch.bool)


@torch.library.register_fake("pdp::compress_2to4", lib=_library)
def _(weight):
    rows, cols = weight.shape
    values = weight.new_empty(rows, cols // 2)
    return values, weight.new_empty(rows, cols // 16, dtype=torch.int16)


@torch.library.register_fake("pdp::channel_norms", lib=_library)
def _(weight, dim, rms):
    return weight.new_empty(weight.shape[dim], dtype=reference.threshold_dtype([weight]))


@torch.library.register_fake("pdp::soft_mask_channel", lib=_library)
def _(weight, norms, threshold, tau, dim, relative, out_dtype):
    w_hat = torch.empty_like(weight, dtype=out_dtype)
    return w_hat, w_hat.new_empty(weight.shape[dim])


@torch.library.register_fake("pdp::soft_mask_channel_backward", lib=_library)
def _(grad_w_hat, grad_mask, weight, norms, threshold, tau, dim, relative, rms):
    return torch.empty_like(weight)


@torch.library.register_fake("pdp::power_sums", lib=_library)
def _(weights, masks, p, q, per_row):
    groups = sum(weight.shape[0] for weight in weights) if per_row else len(weights)
    return weights[0].new_empty(groups, 3, dtype=torch.float64)


def map_over_batch(call, batch_size, in_dims, args):
    """vmap of a call: each example is a layer of its own, so the call runs once for each.

    Returns what the call returns, with tensors stacked along a new dimension 0.
    """
    results = [
        call(*[_example(arg, dim, index) for arg, dim in zip(args, in_dims, strict=True)])
        for index in range(batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def _example(arg, dim, index):
    # What is not batched has dim None, and a tuple of numbers has a tuple of them.
    return arg.select(dim, index) if isinstance(dim, int) else arg


def _examples(tensors, dims, batch_size):
    """Those of a list of tensors as one longer list: all of the first example, then the next."""
    return [
        _example(tensor, dim, index)
        for index in range(batch_size)
        for tensor, dim in zip(tensors, dims, strict=True)
    ]


def _vmap_lists(call):
    """The vmap rule of an operator whose first argument is a list of weights.

    The examples of all weights form one longer list, so that the operator still runs once.
    """

    def rule(info, in_dims, weights, values):
        weight_dims, value_dims = in_dims
        examples = _examples(weights, weight_dims, info.batch_size)
        if isinstance(values, Tensor):
            values = torch.cat(
                [_example(values, value_dims, index) for index in range(info.batch_size)]
            )
        else:
            values = list(values) * info.batch_size
        return call(examples, values).unflatten(0, (info.batch_size, len(weights))), 0

    return rule


def _vmap_power_sums(info, in_dims, weights, masks, p, q, per_row):
    """The vmap rule of power_sums: the examples of all weights form one longer list here too."""
    weights, masks = (
        _examples(tensors, dims, info.batch_size)
        for tensors, dims in zip((weights, masks), in_dims[:2], strict=True)
    )
    sums = torch.ops.pdp.power_sums(weights, masks, p, q, per_row)
    return sums.unflatten(0, (info.batch_size, -1)), 0


def _vmap_each(call):
    """The vmap rule of an operator on one weight."""
    return lambda info, in_dims, *args: map_over_batch(call, info.batch_size, in_dims, args)


for _name in ("prune_counts", "thresholds"):
    _call = getattr(torch.ops.pdp, _name)
    torch.library.register_vmap(f"pdp::{_name}", _vmap_lists(_call), lib=_library)
for _name in ("hard_mask", "hard_mask_nm", "channel_norms"):
    _call = getattr(torch.ops.pdp, _name)
    torch.library.register_vmap(f"pdp::{_name}", _vmap_each(_call), lib=_library)
torch.library.register_vmap("pdp::power_sums", _vmap_power_sums, lib=_library)
