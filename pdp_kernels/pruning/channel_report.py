"""Which channels of a model are dead."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from pdp_kernels.pruning.layers import PRUNABLE_LAYERS


class ChannelReport(NamedTuple):
    """Which channels of one layer are dead.

    biased: those dead output channels whose bias is not zero. They still put out a constant, which
    removing them would drop.
    """

    name: str
    channels: int
    dead: list[int]
    biased: list[int]


def channel_report(model: nn.Module, dim: int = 0) -> list[ChannelReport]:
    """The dead channels of every Linear and convolution layer: those whose weights are zero.

    What a structural pruning library needs to remove them for good. Reads the weights back to the
    host.

    Arguments:
        dim: 0 for output channels, 1 for input channels, which the layer does not read: whatever
            makes them can go. Grouped convolutions are left out of the latter.

    Returns:
        One report per layer, in the order of `model.named_modules()`; weights that layers share
        are reported for each.

    Raises:
        TypeError: model is no torch.nn.Module.
        ValueError: dim is neither 0 nor 1.

    Example:
        >>> layer = torch.nn.Linear(2, 3, bias=False)
        >>> layer.weight.data[1] = 0
        >>> channel_report(layer)
        [ChannelReport(name='', channels=3, dead=[1], biased=[])]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(dim, bool) or dim not in (0, 1):
        raise ValueError(f"dim must be 0 (outputs) or 1 (inputs), got {dim!r}")
    return list(_channel_reports(model, dim))


def _channel_reports(model: nn.Module, dim: int) -> Iterator[ChannelReport]:
    for name, layer in model.named_modules():
        if not isinstance(layer, PRUNABLE_LAYERS) or (dim == 1 and getattr(layer, "groups", 1) > 1):
            continue
        live = layer.weight.detach().transpose(0, dim).flatten(1).count_nonzero(1)
        dead = (live == 0).nonzero().flatten().tolist()
        has_bias = dim == 0 and layer.bias is not None
        bias = layer.bias.detach().tolist() if has_bias else [0.0] * len(live)
        yield ChannelReport(name, len(live), dead, [c for c in dead if bias[c] != 0])
