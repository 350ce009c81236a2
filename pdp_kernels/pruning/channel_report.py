"""Dead channels: those whose weights are all zero."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from pdp_kernels.functional.validation import check_has_values, check_not_distributed
from pdp_kernels.pruning.layers import PRUNABLE_LAYERS, read_weight


class ChannelReport(NamedTuple):
    """The dead channels of one layer.

    Attributes:
        name: the layer's name in the model.
        channels: the number of channels along the dimension.
        dead: the indices of the channels whose weights are all zero.
        biased: the dead output channels whose bias is not zero. Their output is a constant, which
            is lost when they are removed.

    Examples:
        >>> layer = torch.nn.Linear(2, 3)
        >>> layer.weight.data[1], layer.bias.data[1] = 0, 0.5
        >>> report = channel_report(layer)[0]
        >>> report.dead, report.biased
        ([1], [1])
    """

    name: str
    channels: int
    dead: list[int]
    biased: list[int]


def channel_report(model: nn.Module, dim: int = 0) -> list[ChannelReport]:
    """Return the dead channels of every Linear and Conv1d/2d/3d layer.

    A structural pruning library can remove these channels. The function copies the counts of
    nonzero weights to the host.

    Args:
        model: a module.
        dim: 0 for output channels; 1 for input channels, which the layer ignores, so that the layer
            that computes them can drop them. dim = 1 leaves out grouped convolutions.

    Returns:
        One `ChannelReport` per layer, in the order of `model.named_modules()`. Layers that share a
        weight have a report each.

    Raises:
        TypeError: model is no torch.nn.Module; a weight is a DTensor; dim is no int.
        ValueError: dim is neither 0 nor 1; a weight of a lazy layer without a shape, or on the meta
            device.

    Examples:
        >>> layer = torch.nn.Linear(2, 3, bias=False)
        >>> layer.weight.data[1] = 0
        >>> channel_report(layer)
        [ChannelReport(name='', channels=3, dead=[1], biased=[])]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {type(dim).__name__}")
    if dim not in (0, 1):
        raise ValueError(f"dim must be 0 (outputs) or 1 (inputs), got {dim!r}")
    return list(_channel_reports(model, dim))


def _channel_reports(model: nn.Module, dim: int) -> Iterator[ChannelReport]:
    for name, layer in model.named_modules():
        if not isinstance(layer, PRUNABLE_LAYERS) or (dim == 1 and getattr(layer, "groups", 1) > 1):
            continue
        weight_name = f"{name}.weight" if name else "weight"
        weight = read_weight(layer, "weight")
        check_not_distributed(f"model's {weight_name}", weight)
        check_has_values(f"model's {weight_name}", weight)
        live = weight.detach().transpose(0, dim).flatten(1).count_nonzero(1)
        dead = (live == 0).nonzero().flatten().tolist()
        bias = [0.0] * len(live)
        if dim == 0 and layer.bias is not None:
            bias = layer.bias.detach().tolist()
        yield ChannelReport(name, len(live), dead, [c for c in dead if bias[c] != 0])
