"""Layers that hold prunable weights, and modules that read the weights of layers in them."""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pdp_kernels.distributed.shards import is_distributed
from pdp_kernels.pruning.evaluation import evaluation_mode

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
            weight = read_weight(layer, "weight")
            names, _, layers = owners.setdefault(id(weight), ([], weight, []))
            names.append(f"{name}.weight" if name else "weight")
            layers.append(layer)
    yield from owners.values()


def read_weight(layer: nn.Module, name: str) -> Tensor:
    """Return a layer's weight, computed as in evaluation mode if a parametrization computes it.

    In training mode spectral_norm changes its buffers whenever the weight is read.
    """
    if not is_parametrized(layer, name):
        return cast(Tensor, getattr(layer, name))
    parametrizations = cast(nn.ModuleDict, layer.parametrizations)
    with evaluation_mode(parametrizations[name]):
        return cast(Tensor, getattr(layer, name))


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


def may_read_weights(cls: type[nn.Module]) -> bool:
    """Whether the forward of such a module may read the weights of layers in it uncalled.

    The attention of Swin Transformers does, Mamba's mixer, and DoRA of PEFT; two layers of torch.
    """
    if issubclass(cls, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return True
    if issubclass(cls, torch.fx.GraphModule):
        return False  # it writes a new forward into its class when its graph changes
    return not str(getattr(cls.forward, "__module__", None)).startswith("torch.")


def _is_hugging_face_conv1d(layer: nn.Module) -> bool:
    """Whether it is the Conv1D of transformers (GPT-2): a Linear of weight (inputs, outputs)."""
    return any(
        cls.__module__.partition(".")[0] == "transformers" and cls.__name__ == "Conv1D"
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
        "parametrizations after finalize, take fully_shard in place of FullyShardedDataParallel "
        "and of DDP over tensor parallelism, or exclude the layer"
    )
