"""Which layers of a model have weights to prune."""

from collections.abc import Iterator

from torch import Tensor, nn

PRUNABLE_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


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
