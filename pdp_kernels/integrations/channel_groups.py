"""Channels that can only be removed together, found by Torch-Pruning, and which of them matter.

A channel does not matter to a layer that reads it if the layer's weights for it are all zero, or if
the channel is zero for every input: all layers that compute it have zero weights for it, and what
biases, batch norms and activations make of that is zero too. Functions between the layers may read
it all the same: `remove_dead_channels` runs the model to see.
"""

from collections.abc import Iterable
from typing import Any

import torch_pruning as tp  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch_pruning._helpers import _HybridIndex  # type: ignore[import-untyped]

from pdp_kernels.integrations.channel_graph import Reads, has_channels, trace
from pdp_kernels.integrations.channel_values import Channels
from pdp_kernels.pruning.layers import parameter_of, weight_slots

_CONVOLUTION = nn.modules.conv._ConvNd
_OPTYPE = tp.ops.OPTYPE

# Types of nodes that compute each channel from the same channel.
_BY_CHANNEL = {
    _OPTYPE.BN,
    _OPTYPE.IN,
    _OPTYPE.PRELU,
    _OPTYPE.CONCAT,
    _OPTYPE.SPLIT,
    _OPTYPE.SLICE,
    _OPTYPE.RESHAPE,
    _OPTYPE.ELEMENTWISE,
}


class ChannelGroups:
    """The groups of coupled channels of a model as it is now.

    Args:
        model: a model in evaluation mode.
        example_inputs: what it is called with.
        reads: which inputs of each layer are not always zero, from `run_and_record`.

    Attributes:
        reads: as given; newer ones when layers have lost channels.
        names: of all layers.
        kept: for the name of a layer and "output" or "input", why each dead channel that
            `removable` has seen stays.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, reads: Reads) -> None:
        self.names: dict[nn.Module, str] = {layer: name for name, layer in model.named_modules()}
        self.kept: dict[tuple[str, str], dict[int, str]] = {}
        self.reads = reads
        self._owners: dict[Tensor, int] = {}
        for layer in model.modules():
            for parameter in layer._parameters.values():
                if parameter is not None:
                    self._owners[parameter] = self._owners.get(parameter, 0) + 1
        self._graph = trace(model, example_inputs)

    def layers(self) -> list[nn.Module]:
        """Return the layers that compute channels."""
        return [module for module in self._graph.module2node if self._computes(module)]

    def group(self, layer: nn.Module, outputs: Iterable[int]) -> Any:
        """Return the Torch-Pruning group that removes these outputs of a layer."""
        pruner = self._graph.get_pruner_of_module(layer)
        return self._graph.get_pruning_group(layer, pruner.prune_out_channels, sorted(outputs))

    def removable(self, layer: nn.Module) -> list[int]:
        """Return the outputs of a layer that can be removed with all that is coupled with them.

        Records in `kept` why the other dead channels of the group stay.
        """
        left = set(range(self._graph.get_out_channels(layer)))
        whole = self.group(layer, left)
        refusal = self._refusal(whole)
        if refusal is not None:
            self._record(whole, dict.fromkeys(left, refusal))
            return []
        dead = self._dead_roots(whole)
        reasons: dict[int, str] = {}
        while left:
            group = whole if len(left) == len(whole[0].idxs) else self.group(layer, left)
            found = self._needed(group, dead)
            if not found:
                break
            reasons |= found
            left -= found.keys()
        self._record(whole, reasons)
        return sorted(left)

    def keep(self, layer: nn.Module, outputs: Iterable[int], reason: str) -> None:
        """Record that these outputs of a layer and all that is coupled with them stay."""
        outputs = list(outputs)
        self._record(self.group(layer, outputs), dict.fromkeys(outputs, reason))

    def covers(self, layer: nn.Module) -> set[nn.Module]:
        """Return the layers whose outputs are all coupled with those of this layer."""
        whole = self.group(layer, range(self._graph.get_out_channels(layer)))
        return {
            item.dep.target.module
            for item in filter(self._is_output, whole.items)
            if len(item.idxs) == self._graph.get_out_channels(item.dep.target.module)
        }

    def outputs_of(self, group: Any) -> dict[str, tuple[list[int], int]]:
        """Return the outputs that a group removes from each layer, and how many the layer has."""
        return {
            self.names[item.dep.target.module]: (
                item.idxs,
                self._graph.get_out_channels(item.dep.target.module),
            )
            for item in filter(self._is_output, group.items)
        }

    def sides(self, group: Any) -> tuple[Channels, Channels]:
        """Return the outputs that a group removes from layers, and the inputs."""
        sides = [filter(on_side, group.items) for on_side in (self._is_output, self._is_input)]
        outputs, inputs = ({item.dep.target.module: item.idxs for item in side} for side in sides)
        return outputs, inputs

    def modules(self, group: Any) -> list[nn.Module]:
        """Return the model's modules that a group changes."""
        return [m for m in (item.dep.target.module for item in group.items) if m in self.names]

    def _computes(self, module: object) -> bool:
        return isinstance(module, nn.Module) and has_channels(module)

    def _is_input(self, item: Any) -> bool:
        """Whether a member of a group removes inputs of a layer that reads all its channels."""
        module = item.dep.target.module
        if not self._computes(module) or _is_depthwise(module):
            return False
        return bool(item.dep.handler == self._graph.get_pruner_of_module(module).prune_in_channels)

    def _is_output(self, item: Any) -> bool:
        return self._computes(item.dep.target.module) and not self._is_input(item)

    def _dead(self, item: Any) -> Tensor:
        """Return which channels, of the side that a member of a group removes, have no weights."""
        layer = item.dep.target.module
        return ~(_read_inputs(layer) if self._is_input(item) else _live_outputs(layer))

    def _refusal(self, group: Any) -> str | None:
        """Return why nothing of a group can be removed, or None."""
        for item in group.items:
            node = item.dep.target
            module, name = node.module, self.names.get(node.module, "")
            if self._computes(module):
                if _is_grouped(module):
                    return f"{name} is a grouped convolution"
                dead = self._dead(item)
                if max(item.idxs) >= len(dead):
                    return f"Torch-Pruning does not see how {name} divides them"
                weight = module._parameters["weight"]
                if type(weight) is not nn.Parameter or not weight.is_floating_point():
                    return f"the weight of {name} is a {type(weight).__name__} of {weight.dtype}"
            elif node.type == _OPTYPE.OUTPUT:
                return "they are outputs of the model"
            elif node.type == _OPTYPE.PARAMETER:
                return f"they are coupled with {self._graph._param_to_name[module]}"
            elif node.type not in _BY_CHANNEL:
                return f"{name or node.type.name.lower()} computes with several of them at once"
            elif node.type == _OPTYPE.ELEMENTWISE and self._is_input_of_model(node):
                return "they are coupled with inputs of the model"
            if isinstance(module, nn.Module):
                shared = [p for p in module.parameters(recurse=False) if self._owners.get(p, 1) > 1]
                if shared:
                    return f"{name} shares its weight with another layer"
        if not any(map(self._is_input, group.items)):
            return "no layer reads them"
        return None

    def _dead_roots(self, group: Any) -> set[int]:
        """Return the roots of a group for which a layer has no nonzero weight."""
        dead = set()
        for item in filter(self._is_output, group.items):
            is_dead = self._dead(item)
            roots = zip(item.idxs, item.root_idxs, strict=True)
            dead |= {root for index, root in roots if is_dead[index]}
        return dead

    def _needed(self, group: Any, dead: set[int]) -> dict[int, str]:
        """Return the roots of a group that some layer reads, and why they stay."""
        needed: dict[int, str] = {}
        for item in filter(self._is_input, group.items):
            layer, name = item.dep.target.module, self.names[item.dep.target.module]
            roots = dict(zip(item.idxs, item.root_idxs, strict=True))
            is_read = _read_inputs(layer).tolist()
            read = [index for index in roots if is_read[index]]
            half_dead = [index for index in read if roots[index] in dead]
            computed = self._computed(item.dep.target, half_dead)
            is_zero = ~self.reads[layer]
            for index in read:
                root = roots[index]
                if root not in dead:
                    needed[root] = f"{name} reads them"
                elif index in computed:
                    needed[root] = f"{name} reads them, and another layer computes them too"
                elif not is_zero[index]:
                    needed[root] = f"{name} reads the constant that they are, by a bias or a norm"
            if not needed and len(roots) == len(is_read):
                needed[roots[min(roots)]] = f"{name} must have at least one input"
        for item in filter(self._is_output, group.items):
            layer = item.dep.target.module
            if not needed and len(item.idxs) == len(self._dead(item)):
                first = item.root_idxs[item.idxs.index(min(item.idxs))]
                needed[first] = f"{self.names[layer]} must have at least one output"
        return needed

    def _computed(self, node: Any, inputs: list[int]) -> set[int]:
        """Return which of these inputs of a node depend on something other than dead channels."""
        computed: set[int] = set()
        seen: dict[Any, set[Any]] = {}
        stack = [(node, [_HybridIndex(idx=index, root_idx=index) for index in inputs])]
        while stack:
            node, channels = stack.pop()
            before = seen.setdefault(node, set())
            channels = [channel for channel in channels if channel not in before]
            before.update(channels)
            trigger = self._graph.get_pruner_of_module(node.module).prune_in_channels
            for dep in node.dependencies:
                if not channels or dep.target not in node.inputs or dep.trigger != trigger:
                    continue
                sources = channels
                for mapping in dep.index_mapping:
                    sources = sources if mapping is None else mapping(sources)
                live = self._live(dep.target, sources)
                if self._ends_at(dep.target):
                    computed.update(channel.root_idx for channel in live)
                else:
                    stack.append((dep.target, live))
        return computed

    def _live(self, node: Any, channels: list[Any]) -> list[Any]:
        """Return the channels of a node's output without those that its own weights make zero."""
        if not self._computes(node.module):
            return channels
        live = _live_outputs(node.module)
        return [channel for channel in channels if live[channel.idx]]

    def _ends_at(self, node: Any) -> bool:
        """Whether a node makes its output of other channels, or of inputs of the model."""
        if self._computes(node.module):
            return not _is_depthwise(node.module) or not node.inputs
        return self._is_input_of_model(node)

    def _is_input_of_model(self, node: Any) -> bool:
        """Whether a node computes with no other node, and not with parameters alone."""
        if node.inputs:
            return False
        functions = [function for function, _ in node.grad_fn.next_functions]
        return any(getattr(each, "variable", None) not in self._owners for each in functions)

    def _record(self, group: Any, reasons: dict[int, str]) -> None:
        """Record for the dead channels of a group's layers why they stay."""
        for item in group.items:
            layer = item.dep.target.module
            if not self._computes(layer) or _is_grouped(layer):
                continue
            is_dead = self._dead(item)
            side = "input" if self._is_input(item) else "output"
            of_layer = self.kept.setdefault((self.names[layer], side), {})
            for index, root in zip(item.idxs, item.root_idxs, strict=True):
                if root in reasons and index < len(is_dead) and is_dead[index]:
                    of_layer.setdefault(index, reasons[root])


def _is_depthwise(module: nn.Module) -> bool:
    if not isinstance(module, _CONVOLUTION) or module.groups == 1:
        return False
    return module.groups == module.in_channels == module.out_channels


def _is_grouped(module: nn.Module) -> bool:
    return isinstance(module, _CONVOLUTION) and module.groups > 1 and not _is_depthwise(module)


def _live_outputs(layer: nn.Module) -> Tensor:
    """Return which outputs of a layer have a nonzero weight, on the CPU."""
    slot = weight_slots(layer)[0]
    dim = 0 if _is_depthwise(layer) else slot.outputs
    return _nonzero(layer, dim)


def _read_inputs(layer: nn.Module) -> Tensor:
    """Return which inputs of a layer have a nonzero weight, on the CPU."""
    return _nonzero(layer, weight_slots(layer)[0].inputs)


def _nonzero(layer: nn.Module, dim: int) -> Tensor:
    weight = parameter_of(layer, "weight").detach()
    return weight.movedim(dim, 0).flatten(1).ne(0).any(1).cpu()
