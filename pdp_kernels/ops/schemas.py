"""The schema of every operator, registered with its reference implementation and its fake."""

import torch

from pdp_kernels.ops import fakes, reference

library: torch.library.Library = torch.library.Library("pdp", "DEF")

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
    "soft_mask_list": (
        "(Tensor[] weights, Tensor thresholds, Tensor taus, bool relative, "
        "ScalarType? out_dtype) -> Tensor[]"
    ),
    "soft_mask_list_backward": (
        "(Tensor?[] grads, Tensor[] weights, Tensor thresholds, Tensor taus, bool relative) "
        "-> Tensor[]"
    ),
    "soft_mask_nm": (
        "(Tensor weight, Tensor tau, int m, Tensor pruned, int dim, bool relative, "
        "ScalarType? out_dtype, bool return_mask) -> (Tensor, Tensor)"
    ),
    "soft_mask_nm_backward": (
        "(Tensor? grad_w_hat, Tensor? grad_mask, Tensor weight, Tensor tau, int m, Tensor pruned, "
        "int dim, bool relative) -> Tensor"
    ),
    "hard_mask_nm": "(Tensor weight, int m, Tensor pruned, int dim) -> Tensor",
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
    "power_sums": "(Tensor[] weights, Tensor?[] masks, float p, float q, bool per_row) -> Tensor",
}

# An operator, its reference and its fake have the same name.
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
    library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    _fake = fakes.on_one_device(getattr(fakes, _name))
    torch.library.register_fake(f"pdp::{_name}", _fake, lib=library)
