"""Models of PEFT: tuner layers, which wrap a base layer and add adapters to what it computes.

The names are those of peft.tuners.tuners_utils. This module recognizes them without an import.
"""

from typing import Any, NamedTuple

from torch import nn


class Adapted(NamedTuple):
    """What PEFT has put around the layers of a model.

    Attributes:
        tuners: for the id of each layer inside a base layer, the tuner layers that wrap it.
        instead_of: for the id of each layer that the base model does not have, or that PEFT has put
            out of use, the layer that it adapts or gave way to; None if there is no such layer.
    """

    tuners: dict[int, list[nn.Module]]
    instead_of: dict[int, nn.Module | None]


def find_adapted(model: nn.Module) -> Adapted:
    """Return the tuner layers of a model and the adapters in them."""
    found = Adapted({}, {})
    layer: Any
    for layer in model.modules():
        if is_tuner(layer):
            base = base_layer(layer)
            for each in base.modules():
                found.tuners.setdefault(id(each), []).append(layer)
            _note(found, base, _children(layer, but="base_layer"))
        elif _is_of_peft(type(layer), "ModulesToSaveWrapper"):
            copies = list(layer.modules_to_save.children())
            if copies:
                _note(found, copies[0], [layer.original_module])
        elif _is_of_peft(type(layer), "PeftModel"):
            _note(found, None, _children(layer, but="base_model"))
    return found


def is_tuner(layer: nn.Module) -> bool:
    """Whether it is a layer of PEFT that wraps another and adapts it, by LoRA for example."""
    return "base_layer" in layer._modules and is_tuner_class(type(layer))


def is_tuner_class(cls: type) -> bool:
    return _is_of_peft(cls, "BaseTunerLayer")


def base_layer(tuner: nn.Module) -> nn.Module:
    """Return the layer that a tuner layer wraps, through other tuner layers if there are any."""
    layer = tuner
    while is_tuner(layer):
        layer = layer.base_layer  # type: ignore[assignment]
    return layer


def rewrites_base(tuner: nn.Module) -> bool:
    """Whether its forward replaces the Parameter of the base layer, by merging for example."""
    is_of_parameter = _is_of_peft(type(tuner), "ParamWrapper")
    return is_of_parameter or isinstance(base_layer(tuner), nn.MultiheadAttention)


def merged_adapters(tuner: nn.Module) -> list[str]:
    """Return the names of the adapters that are part of the base layer's weight now."""
    return list(getattr(tuner, "merged_adapters", ()))


def _is_of_peft(cls: type, name: str) -> bool:
    return any(each.__name__ == name and each.__module__[:5] == "peft." for each in cls.__mro__)


def _children(layer: nn.Module, but: str) -> list[nn.Module]:
    return [child for name, child in layer.named_children() if name != but]


def _note(found: Adapted, adapted: nn.Module | None, layers: list[nn.Module]) -> None:
    for layer in layers:
        found.instead_of.update((id(each), adapted) for each in layer.modules())
