"""Which layers of a model have weights to prune, and who reads them."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

PRUNABLE_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class WeightSlot(NamedTuple):
    """A name under which a layer holds a weight, and the weight's dimensions."""

    name: str
    outputs: int  # the dimension of the output channels
    inputs: int  # that of the input channels, along which products are summed


def layer_weights(
    model: nn.Module, kinds=PRUNABLE_LAYERS
) -> Iterator[tuple[list[str], Tensor, list[nn.Module]]]:
    """The weights of all layers of these kinds, each once: its names, itself, its layers."""
    owners = {}
    for name, layer in model.named_modules():
        if isinstance(layer, kinds):
            weight = layer.weight
            names, _, layers = owners.setdefault(id(weight), ([], weight, []))
            names.append(f"{name}.weight" if name else "weight")
            layers.append(layer)
    yield from owners.values()


def weight_slots(layer: nn.Module) -> list[WeightSlot]:
    """The weights that a pruner prunes in a layer of this type unless told otherwise."""
    if isinstance(layer, PRUNABLE_LAYERS):
        return [WeightSlot("weight", 0, 1)]
    if isinstance(layer, _TRANSPOSED) or _is_hugging_face_conv1d(layer):
        return [WeightSlot("weight", 1, 0)]
    if isinstance(layer, nn.MultiheadAttention):
        # Those it does not have are registered as None. Its output projection is a Linear.
        return [WeightSlot(name, 0, 1) for name in _PROJECTIONS if getattr(layer, name) is not None]
    return []


def layers_read(layer: nn.Module, training: bool) -> list[nn.Module]:
    """The parts whose weights a layer reads itself in this mode, instead of calling them."""
    if isinstance(layer, nn.MultiheadAttention):
        return [layer.out_proj]
    if isinstance(layer, nn.TransformerEncoderLayer) and not training:
        # Without gradients it computes all of itself in one call.
        return [layer.linear1, layer.linear2, layer.self_attn, layer.self_attn.out_proj]
    return []


def _is_hugging_face_conv1d(layer: nn.Module) -> bool:
    """A Linear with a transposed weight, (inputs, outputs), as in GPT-2 of transformers."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__.partition(".")[0] == "transformers"
        for cls in type(layer).__mro__
    )
