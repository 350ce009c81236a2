"""Structural removal of dead channels, by means of Torch-Pruning.

Pruning of channels sets weights to zero and leaves every shape as it was. `remove_dead_channels`
makes the layers smaller, so that the model needs less memory and time on any hardware::

    from pdp_kernels.integrations.torch_pruning import remove_dead_channels

    pruner.finalize()
    print(remove_dead_channels(model, inputs))

Torch-Pruning (https://github.com/VainF/Torch-Pruning) finds which channels of which layers belong
together. This module decides which of them do not matter, and checks that the outputs stay.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pdp_kernels.distributed.shards import is_distributed
from pdp_kernels.integrations.channel_values import replaced
from pdp_kernels.pruning.evaluation import evaluated, run_model
from pdp_kernels.pruning.macs import count_macs
from pdp_kernels.pruning.masked_layer import check_unmasked

try:
    from pdp_kernels.integrations.channel_graph import has_channels, run_and_record
    from pdp_kernels.integrations.channel_groups import ChannelGroups
except ImportError as _error:
    raise ImportError(
        "remove_dead_channels needs Torch-Pruning: pip install 'pdp_kernels[channels]', or "
        "pip install torch-pruning"
    ) from _error

_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)  # of a model's call
_VALUES_MATTER = "the outputs of the model change with their values"
_ROUNDING = 1000  # differences of the outputs that pass for rounding, in eps of the largest output


class KeptChannels(NamedTuple):
    """Dead channels that stay.

    Attributes:
        layer: the name of the layer.
        side: "output" or "input", of the layer.
        channels: the indices of the dead channels, in the model after the removal.
        reason: why they stay.

    Examples:
        >>> layers = torch.nn.Linear(8, 4), torch.nn.Linear(4, 2)
        >>> model = torch.nn.Sequential(*layers)
        >>> model[0].weight.data[0] = 0  # its bias is a constant input of the second layer
        >>> kept = remove_dead_channels(model, torch.randn(2, 8)).kept[0]
        >>> kept.layer, kept.side, kept.channels
        ('0', 'output', [0])
    """

    layer: str
    side: str
    channels: list[int]
    reason: str


class ChannelRemoval(NamedTuple):
    """The result of `remove_dead_channels`.

    Attributes:
        removed: for the name of each layer that lost outputs, their indices in the layer as it was.
        kept: the dead channels that stay, and why.
        parameters_before: the number of parameters before.
        parameters_after: the number of parameters now.
        macs_before: multiply-accumulates of one inference on the example inputs before.
        macs_after: multiply-accumulates now.
        difference: the largest change of an output, relative to the largest output: rounding.

    Examples:
        >>> layers = torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)
        >>> model = torch.nn.Sequential(*layers)
        >>> model[2].weight.data[:, :12] = 0
        >>> report = remove_dead_channels(model, torch.randn(2, 8))
        >>> report.removed["0"] == list(range(12)), report.macs_before, report.macs_after
        (True, 384, 96)
    """

    removed: dict[str, list[int]]
    kept: list[KeptChannels]
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    difference: float

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data that json can write.

        Returns:
            A dict of the attributes.
        """
        return self._asdict() | {"kept": [each._asdict() for each in self.kept]}

    def __str__(self) -> str:
        removed = [f"{name}: {len(each)} outputs removed" for name, each in self.removed.items()]
        kept = [
            f"{each.layer}: {len(each.channels)} dead {each.side}s stay, {each.reason}"
            for each in self.kept
        ]
        totals = [
            f"parameters: {self.parameters_after:,} of {self.parameters_before:,}",
            f"multiply-accumulates: {self.macs_after:,} of {self.macs_before:,}",
        ]
        return "\n".join([*removed, *kept, *totals])


def remove_dead_channels(model: nn.Module, example_inputs: Any) -> ChannelRemoval:
    """Remove the channels of a model that do not change its outputs, in place.

    A channel is removed from all layers that compute it, normalize it or read it, if for each layer
    that reads it

    - the layer's weights for this input are all zero (a dead input), or
    - all layers that compute the channel have zero weights for it (dead outputs), and biases and
      batch norms leave it at zero.

    So the outputs in evaluation mode stay the same, to rounding. A dead output with a bias, or with
    batch norm behind it, is often a constant that matters: such channels stay, and the report names
    them. Prune inputs instead (``channel_dim="input"``). Channels that a residual connection
    couples are removed only if they are dead in all layers that it joins. Channels that stay, too:
    outputs of the model, those that a layer norm, an attention or a maximum computes with together,
    those of convolutions with groups (except depthwise ones), and those of shared or quantized
    weights. One removal may make other channels dead; these are removed too.

    Before each removal the model runs on the example inputs with large random values, of both
    signs, in these channels: if its outputs change, something else than the layers reads them, and
    they stay. After the removal it runs again. If it fails or its outputs differ, the removal is
    taken back and reported. Outputs here are floating point tensors.

    The changed layers have new Parameters: make the optimizer afterwards. The layers keep their
    names. A state_dict of the smaller model loads into any model that was reduced in the same way,
    such as the pruned model of the same weights; or save the whole model with torch.save.

    Args:
        model: a model of Linear, convolution and Hugging Face Conv1D layers, with plain weights. It
            runs in evaluation mode, and its mode is restored.
        example_inputs: what the model is called with: one argument, a tuple of arguments, or a
            mapping of keyword arguments. Random or real values: from constant ones nobody can see
            whether outputs change.

    Returns:
        A `ChannelRemoval` of what was removed, what stays and why, parameters and multiply-
        accumulates; a table as str.

    Raises:
        TypeError: model is no torch.nn.Module; a weight is a DTensor.
        ValueError: the model has the masks of a pruner, or a weight that is computed from others;
            the inputs are constant; the outputs are not finite or do not depend on the weights. The
            model stays as it was.

    Examples:
        >>> layers = torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)
        >>> model = torch.nn.Sequential(*layers)
        >>> model[2].weight.data[:, :12] = 0
        >>> report = remove_dead_channels(model, torch.randn(2, 8))
        >>> model[0]
        Linear(in_features=8, out_features=4, bias=True)
        >>> report.parameters_before, report.parameters_after
        (212, 56)
    """
    example_inputs = _checked(model, example_inputs)
    trained = {name: each.requires_grad for name, each in model.named_parameters()}
    before = _Sizes(model, example_inputs)
    removal = _Removal(model, example_inputs)
    try:
        with evaluated(model), torch.enable_grad():
            for parameter in model.parameters():  # the graph is traced by autograd
                parameter.requires_grad_(parameter.is_floating_point())
            while removal.remove_once():
                pass
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
    after = _Sizes(model, example_inputs)
    return ChannelRemoval(
        removed={name: sorted(outputs) for name, outputs in removal.removed.items()},
        kept=_by_reason(removal.kept),
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        macs_before=before.macs,
        macs_after=after.macs,
        difference=removal.difference,
    )


class _Sizes:
    """The number of parameters and of multiply-accumulates of a model."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.macs, _ = count_macs(model, [], inputs)


class _Removal:
    """Removals from one model, each checked against the outputs of the model as it was.

    Attributes:
        removed: for each layer's name, the outputs that are removed, as indices in the layer as it
            was.
        kept: of the last pass, as in `ChannelGroups`.
        difference: of the last removal.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self._model = model
        self._inputs = inputs
        with evaluated(model):
            outputs, self._reads = run_and_record(model, inputs)
        self._expected = _values(outputs)
        if not all(value.isfinite().all() for value in self._expected):
            raise ValueError("model must have finite outputs for example_inputs, got NaN or inf")
        dtypes = {each.dtype for each in (*self._expected, *model.parameters())}
        eps = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
        self._tolerance = min(_ROUNDING * eps, 0.1)
        self._left: dict[str, list[int]] = {}
        self._failed: dict[nn.Module, tuple[list[int], str]] = {}
        self.removed: dict[str, list[int]] = {}
        self.kept: dict[tuple[str, str], dict[int, str]] = {}
        self.difference = 0.0

    def remove_once(self) -> bool:
        """Remove what can be removed now, in one pass over the layers; return whether anything."""
        groups = ChannelGroups(self._model, self._inputs, self._reads)
        layers = groups.layers()
        if not layers:
            raise ValueError(
                "model must have outputs that depend on the weights of a Linear, convolution or "
                f"Hugging Face Conv1D layer, got a {type(self._model).__name__} without any"
            )
        done: set[nn.Module] = set()
        changed = False
        for layer in layers:
            if layer in done:
                continue
            done |= groups.covers(layer)
            outputs = groups.removable(layer)
            failed, reason = self._failed.get(layer, ([], ""))
            if outputs and outputs == failed:
                groups.keep(layer, outputs, reason)
            elif outputs and self._values_matter(groups, layer, outputs):
                self._failed[layer] = outputs, _VALUES_MATTER
                groups.keep(layer, outputs, _VALUES_MATTER)
            elif outputs:
                changed = True
                if not self._remove(groups, layer, outputs):
                    break  # the graph has lost the channels, and the model has not
                groups.reads = self._reads
        self.kept = groups.kept
        return changed

    def _values_matter(self, groups: ChannelGroups, layer: nn.Module, outputs: list[int]) -> bool:
        """Whether the model's outputs change with what no layer reads of these channels.

        A function of several channels, such as a maximum, may change with them.
        """
        computed, read = groups.sides(groups.group(layer, outputs))
        try:
            for sign in (1, -1):
                with replaced(computed, read, sign), torch.no_grad():
                    found = run_model(self._model, self._inputs)
                if _difference(self._expected, _values(found)) > self._tolerance:
                    return True
        except torch.OutOfMemoryError:
            raise
        except _FAILURES:
            return True
        return False

    def _remove(self, groups: ChannelGroups, layer: nn.Module, outputs: list[int]) -> bool:
        """Remove outputs of a layer, if the model's outputs stay; return whether they do."""
        group = groups.group(layer, outputs)
        lost = groups.outputs_of(group)
        snapshot = {module: _attributes(module) for module in groups.modules(group)}
        try:
            group.prune(record_history=False)
            found, reads = run_and_record(self._model, self._inputs)
            difference = _difference(self._expected, _values(found))
            problem = f"the outputs of the model would change by {difference:.2g} of the largest"
        except torch.OutOfMemoryError:
            _restore(snapshot)
            raise
        except _FAILURES as error:
            difference = math.inf
            problem = f"the model would fail without them: {str(error).strip().splitlines()[0]}"
        if difference > self._tolerance:
            _restore(snapshot)
            self._failed[layer] = outputs, problem
            return False
        self._reads, self.difference = reads, difference
        for name, (indices, channels) in lost.items():
            left = self._left.setdefault(name, list(range(channels)))
            self.removed.setdefault(name, []).extend(left[index] for index in indices)
            self._left[name] = [left[i] for i in sorted(set(range(channels)) - set(indices))]
        return True


def _checked(model: nn.Module, inputs: Any) -> Any:
    """Return the inputs as plain containers, if channels can be removed with them."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_unmasked(model, "finalize its pruner first, or give pruner.pruned_copy()")
    for name, parameter in model.named_parameters():
        if is_distributed(parameter):
            raise TypeError(f"model's {name} must be a plain tensor, got a DTensor")
        if parameter.is_meta:
            raise ValueError(f"model's {name} must have values, got one on the meta device")
    for name, layer in model.named_modules():
        if has_channels(layer) and layer._parameters.get("weight") is None:
            raise ValueError(
                f"model must hold {name}.weight as a parameter, got one that is computed from "
                "others: remove the parametrization first"
            )
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if not tensors:
        raise TypeError(f"example_inputs must hold a tensor, got {type(inputs).__name__}")
    values = [each for each in tensors if each.is_floating_point() and each.numel() > 1]
    if values and all((each == each.flatten()[0]).all() for each in values):
        raise ValueError(
            "example_inputs must vary, such as random ones, to show whether outputs change, got "
            "constants"
        )
    return inputs


def _values(outputs: Any) -> list[Tensor]:
    """Return the floating point tensors of a model's outputs."""
    leaves = tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the largest difference of two outputs, relative to the largest value."""
    largest = 0.0
    for before, after in zip(expected, found, strict=True):
        if before.shape != after.shape:
            raise ValueError(
                f"an output of shape {tuple(before.shape)} would have {tuple(after.shape)}"
            )
        if before.numel():
            change = (after.double() - before.double()).abs().max()
            scale = before.double().abs().max().clamp(min=torch.finfo(torch.double).tiny)
            largest = max(largest, float((change / scale).nan_to_num(math.inf)))
    return largest


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return all that a module holds, so that `_restore` gives it back."""
    own = dict(vars(module))
    return own | {name: dict(own[name]) for name in ("_parameters", "_buffers")}


def _restore(snapshot: dict[nn.Module, dict[str, Any]]) -> None:
    for module, attributes in snapshot.items():
        vars(module).clear()
        vars(module).update(attributes)


def _by_reason(kept: dict[tuple[str, str], dict[int, str]]) -> list[KeptChannels]:
    """Return what is kept, with the channels of one layer and reason together."""
    entries = []
    for (layer, side), reasons in kept.items():
        for reason in dict.fromkeys(reasons.values()):
            channels = sorted(index for index, why in reasons.items() if why == reason)
            entries.append(KeptChannels(layer, side, channels, reason))
    return entries
