"""Layers that hold prunable weights, and layers that read the weights of others."""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pdp_kernels.distributed.shards import is_distributed
from pdp_kernels.pruning.adapters import base_layer, is_tuner

PRUNABLE_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ATTENTION_INPUTS = ("query", "key", "value")  # of torch.nn.MultiheadAttention, in this order

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class WeightSlot(NamedTuple):
    """A name under which a layer holds a weight, and the weight's dimensions.

    Attributes:
        name: the attribute of the layer.
        outputs: the dimension of the output channels.
        inputs: the dimension of the input channels, over which the layer sums products.
    """

    name: str
    outputs: int
    inputs: int


def layer_weights(
    model: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...] = PRUNABLE_LAYERS
) -> Iterator[tuple[list[str], Tensor, list[nn.Module]]]:
    """Yield each weight of the layers of these types once: its names, the tensor, its layers."""
    owners: dict[int, tuple[list[str], Tensor, list[nn.Module]]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, kinds):
            weight = cast(Tensor, layer.weight)
            names, _, layers = owners.setdefault(id(weight), ([], weight, []))
            names.append(f"{name}.weight" if name else "weight")
            layers.append(layer)
    yield from owners.values()


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a layer is called with, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def weight_slots(layer: nn.Module) -> list[WeightSlot]:
    """Return the weights that a pruner prunes in such a layer by default."""
    if isinstance(layer, PRUNABLE_LAYERS):
        return [WeightSlot("weight", outputs=0, inputs=1)]
    if isinstance(layer, _TRANSPOSED) or _is_hugging_face_conv1d(layer):
        return [WeightSlot("weight", outputs=1, inputs=0)]
    if isinstance(layer, nn.MultiheadAttention):
        # The layer registers absent projections as None. Its output projection is a Linear.
        return [
            WeightSlot(name, outputs=0, inputs=1)
            for name in _PROJECTIONS
            if getattr(layer, name) is not None
        ]
    return []


def layers_read(layer: nn.Module, training: bool) -> list[nn.Module]:
    """Return the child layers whose weights a layer reads in this mode without calling them."""
    if isinstance(layer, nn.MultiheadAttention):
        return [layer.out_proj]
    if isinstance(layer, nn.TransformerEncoderLayer) and not training:
        # Without gradients it computes everything in one fused call.
        return [layer.linear1, layer.linear2, layer.self_attn, layer.self_attn.out_proj]
    if is_tuner(layer):
        return [base_layer(layer)]  # DoRA needs its norm, HRA rotates it
    projection = _timm_projection(layer)
    return [] if projection is None else [projection]


def _timm_projection(layer: nn.Module) -> nn.Module | None:
    """Return the projection of an attention of timm that uses its weight with another bias."""
    children = layer._modules
    if getattr(layer, "q_bias", None) is not None:  # BEiT, EVA, Swin Transformer V2
        projection = children.get("qkv")
    else:
        projection = children.get("qkv_proj")  # MobileViTV2's cross attention reads rows of it
    return projection if projection is not None and _is_of_library(layer, "timm") else None


def _is_hugging_face_conv1d(layer: nn.Module) -> bool:
    """Whether it is the Conv1D of transformers (GPT-2): a Linear of weight (inputs, outputs)."""
    return _is_of_library(layer, "transformers", "Conv1D")


def _is_of_library(layer: nn.Module, library: str, name: str | None = None) -> bool:
    """Whether a library defines the layer's class, or a base of it; of this name, if one is given.

    The library need not be installed.
    """
    return any(
        cls.__module__.partition(".")[0] == library and name in (None, cls.__name__)
        for cls in type(layer).__mro__
    )


def parameter_of(layer: nn.Module, name: str) -> Tensor:
    """Return a layer's Parameter of this name, which is trained and pruned."""
    weight = layer._parameters.get(name)
    if weight is None:
        raise not_a_parameter(layer, name)
    return weight


def is_quantized(weight: Tensor) -> bool:
    """Whether a library keeps the weight in a form of its own, as torchao and bitsandbytes do."""
    cls = type(weight)
    if cls in (Tensor, nn.Parameter) or is_distributed(weight):
        return False
    return is_traceable_wrapper_subclass(weight) or cls.__module__.startswith("bitsandbytes.")


def quantized(what: str, weight: Tensor) -> RuntimeError:
    """Return the error of a masked weight that other code has quantized."""
    return RuntimeError(
        f"{what} has masks of PDPPruner and was quantized ({type(weight).__name__}): call finalize "
        "first and quantize the pruned model, or quantize pruner.pruned_copy()"
    )


def not_a_parameter(layer: nn.Module, name: str) -> RuntimeError:
    """Return the error of a masked weight that other code replaces or computes."""
    return RuntimeError(
        f"the {name} of a {type(layer).__name__.replace('Masked', '')} that PDPPruner masks must "
        "stay a Parameter: apply weight_norm, spectral_norm, torch.nn.utils.prune and "
        "parametrizations after finalize, or exclude the layer"
    )
