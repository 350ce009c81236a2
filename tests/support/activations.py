"""Inputs of layers, as calibration batches."""

import torch


def normal(*shape, seed=0, scale_dim=-1):
    """Return inputs whose channels have very different scales."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randn(shape[scale_dim], generator=generator).mul(2).exp()
    values = torch.randn(shape, generator=generator)
    return (values.transpose(scale_dim, -1) * scales).transpose(scale_dim, -1)
