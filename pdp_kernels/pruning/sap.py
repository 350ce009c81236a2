"""Sparsity-informed Adaptive Pruning (SAP): the PQ Index sets how much each round prunes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pdp_kernels.functional.pq_index import Scope, pq_index
from pdp_kernels.functional.sap_counts import sap_prune_counts
from pdp_kernels.functional.validation import (
    as_float,
    check_has_values,
    check_plain_weight,
    check_sap_settings,
    check_scope,
)
from pdp_kernels.pruning.freeze import FrozenZeros
from pdp_kernels.pruning.layers import layer_weights
from pdp_kernels.pruning.masked_layer import check_unmasked
from pdp_kernels.pruning.optimizers import torch_optimizer
from pdp_kernels.pruning.plain_data import with_empty_mappings
from pdp_kernels.pruning.plots import new_figure

_MASKED = "finalize its pruner first, or give pruner.pruned_copy()"


class SAPRound(NamedTuple):
    """One round of `SAPPruner`.

    Attributes:
        round: the number of the round, from 1.
        pq_index: the PQ Index, before the round, of all unpruned weights together.
        pq_indices: the PQ Index, before the round, of each group: {"global": ...} for scope
            "global", else the index of each weight by name (for "neuron" the mean over its rows).
        pruned: how many weights the round pruned in each tensor, by name.
        sparsity_before: the fraction of all prunable weights that was pruned before the round.
        sparsity_after: the fraction of them that is pruned after it.
        accuracy: the accuracy given to `SAPPruner.step`.

    Examples:
        >>> pruner = SAPPruner(torch.nn.Linear(64, 8))
        >>> done = pruner.step(accuracy=0.9)
        >>> done.round, done.accuracy, done == pruner.history[-1]
        (1, 0.9, True)
    """

    round: int
    pq_index: float
    pq_indices: dict[str, float]
    pruned: dict[str, int]
    sparsity_before: float
    sparsity_after: float
    accuracy: float | None


class _Settings(NamedTuple):
    p: float
    q: float
    eta: float
    gamma: float
    beta: float
    scope: Scope
    rewind: bool

    def prune_counts(self, index: Tensor, kept: int | Tensor) -> Tensor:
        return sap_prune_counts(
            index, kept, self.p, self.q, eta=self.eta, gamma=self.gamma, beta=self.beta
        )


class SAPPruner:
    """Prune a model in rounds, each by the fraction that its PQ Index allows.

    The algorithm (Algorithm 1 of arXiv 2302.05601) is: train, `step`, train again, and so on. A
    round computes the PQ Index of the unpruned weights (`pq_index`), prunes the `sap_prune_counts`
    smallest magnitudes of each group, and rewinds the other weights to their initial values. Rounds
    prune less and less as the index falls. The method has no stopping rule of its own.

    Weights tied at the boundary are pruned in order: by layer in the order of
    model.named_modules(), then by row-major index. A pruned weight stays pruned.

    Args:
        model: the pruner prunes the weights of its Linear and Conv1d/2d/3d layers. Move the model
            to its device and dtypes first.
        p: the smaller exponent of the PQ Index, 1e-5 <= p < q.
        q: the larger exponent of the PQ Index.
        eta: as for `sap_prune_counts`.
        gamma: as for `sap_prune_counts`.
        beta: as for `sap_prune_counts`.
        scope: the weights of one group: "neuron" (a row of dimension 0), "layer", or "global" (all
            weights).
        rewind: True resets all parameters and buffers of the model after each round to their values
            at construction, and then sets the pruned weights to 0. The pruner keeps a copy of them.

    Attributes:
        masks: a bool mask of each weight's shape, by weight name; True where kept.
        sparsity: the fraction of the prunable weights that is pruned.
        history: a list of `SAPRound`.

    Raises:
        TypeError: as `sap_prune_counts`; rewind is no bool; model is no module; a weight is a
            DTensor, or of a dtype that `pq_index` does not accept.
        ValueError: as `sap_prune_counts`; another scope; a weight is computed from other
            parameters; a weight has no shape yet; weights are on several devices, or on the meta
            device; the model has no weight to prune, or has the masks of a `PDPPruner`.

    Examples:
        >>> model = torch.nn.Linear(6, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[16.0, -1.0, 1.0, 1.0, -1.0, 0.0]]))
        >>> pruner = SAPPruner(model, rewind=False)
        >>> pruner.step(accuracy=0.98).pruned
        {'weight': 2}
        >>> model.weight.detach()
        tensor([[16.,  0.,  1.,  1., -1.,  0.]])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        p: float = 0.5,
        q: float = 1.0,
        eta: float = 0.0,
        gamma: float = 1.0,
        beta: float = 0.9,
        scope: Scope = "global",
        rewind: bool = True,
    ) -> None:
        check_sap_settings(p, q, eta, gamma, beta)
        check_scope(scope)
        if not isinstance(rewind, bool):
            raise TypeError(f"rewind must be a bool, got {type(rewind).__name__}")
        weights = _prunable_weights(model)
        self._model = model
        self._settings = _Settings(
            float(p), float(q), float(eta), float(gamma), float(beta), scope, rewind
        )
        self._names = list(weights)
        self._masks = [
            torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
            for weight in weights.values()
        ]
        state = dict(model.named_parameters()) | dict(model.named_buffers()) if rewind else {}
        self._initial = {name: value.detach().clone() for name, value in state.items()}
        self._shapes = _shapes(dict(model.named_parameters()) | state)
        self.history: list[SAPRound] = []

    @property
    def masks(self) -> dict[str, Tensor]:
        """A bool mask of each weight's shape, by weight name; True where kept."""
        return dict(zip(self._names, self._masks, strict=True))

    @property
    def sparsity(self) -> float:
        """The fraction of the prunable weights that is pruned."""
        total = sum(mask.numel() for mask in self._masks)
        return (total - sum(_kept_counts(self._masks))) / total

    @torch.no_grad()
    def step(self, accuracy: float | None = None) -> SAPRound:
        """Prune the trained model by one round, and rewind the other weights.

        The state of an optimizer is not rewound: make a new optimizer for the next round.

        Args:
            accuracy: the accuracy of the model before this round, for the history.

        Returns:
            The `SAPRound` of this round, which `history` holds too.

        Raises:
            TypeError: accuracy is no number.
            ValueError: an unpruned weight is NaN or infinite; float64 cannot sum the powers |w|^q
                (`pq_index`); or as `mask_weights`. Nothing changes.
        """
        if accuracy is not None and (isinstance(accuracy, bool) or not isinstance(accuracy, Real)):
            raise TypeError(f"accuracy must be a number or None, got {type(accuracy).__name__}")
        accuracy = None if accuracy is None else as_float(accuracy)
        state = self._state()
        weights = [weight.detach() for weight in self._weights()]
        p, q = self._settings.p, self._settings.q
        together = pq_index(weights, p, q, mask=self._masks, scope="global")
        overall = float(together)
        if not math.isfinite(overall):
            _raise_without_index(weights, self._masks, q, overall)
        indices = self._indices(weights, together)
        kept_before, sparsity_before = _kept_counts(self._masks), self.sparsity

        self._masks = self._masks_after(weights, indices)
        pruned = [
            before - after
            for before, after in zip(kept_before, _kept_counts(self._masks), strict=True)
        ]
        for name, value in self._initial.items():
            state[name].copy_(value)
        self.mask_weights()
        done = SAPRound(
            round=len(self.history) + 1,
            pq_index=overall,
            pq_indices=self._summary(indices),
            pruned=dict(zip(self._names, pruned, strict=True)),
            sparsity_before=sparsity_before,
            sparsity_after=self.sparsity,
            accuracy=accuracy,
        )
        self.history.append(done)
        return done

    @torch.no_grad()
    def mask_weights(self) -> None:
        """Set the pruned weights to 0: call it after each optimizer step, or use `attach`.

        Raises:
            ValueError: the model has parameters, or buffers to rewind, of other names or shapes
                than at construction, or the masks of a `PDPPruner`.
        """
        self._state()
        for weight, zeros in self._pruned_weights():
            weight.masked_fill_(zeros, 0)

    def attach(self, optimizer: Optimizer) -> FrozenZeros:
        """Keep the pruned weights at 0 in all steps of the optimizer, those of later rounds too.

        Each step sets their gradients to 0 before it, and the weights to 0 after it. A closure of
        the step, as LBFGS takes one, gives the loss of the pruned model.

        Args:
            optimizer: an optimizer of the model's parameters.

        Returns:
            A `FrozenZeros`, whose remove() ends it. Code that clips gradients by their norm calls
            its mask_gradients() before it.

        Raises:
            TypeError: optimizer is no torch.optim.Optimizer.
        """
        return _PrunedWeights(self, torch_optimizer(optimizer))

    def state_dict(self) -> dict[str, Any]:
        """Return masks, initial values, settings and history, without the model's own state.

        Returns:
            A dict of tensors and plain data, whose structure stays the same as rounds are added.
            torch.distributed.checkpoint needs that, and takes a pruner as it takes a model.
        """
        return {
            "settings": self._settings._asdict(),
            "masks": self.masks,
            "initial": dict(self._initial),
            "history": [tuple(done) for done in self.history],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state. The model's weights do not change before `mask_weights` or `step`.

        Args:
            state_dict: a `state_dict` of a pruner with the same settings, for the same model.

        Raises:
            TypeError: state_dict is no mapping.
            ValueError: it belongs to a pruner with other settings or for another model. The pruner
                does not change.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
        own = self.state_dict()
        state_dict = with_empty_mappings(state_dict, own)
        if state_dict.keys() != own.keys():
            raise ValueError(f"state_dict must have keys {list(own)}, got {list(state_dict)}")
        if state_dict["settings"] != own["settings"]:
            raise ValueError(
                f"state_dict must be of a pruner with settings {own['settings']}, "
                f"got {state_dict['settings']}"
            )
        for key in ("masks", "initial"):
            expected, got = (
                {name: tuple(value.shape) for name, value in state[key].items()}
                for state in (own, state_dict)
            )
            if got != expected:
                raise ValueError(f"state_dict must have {key} of shapes {expected}, got {got}")
        history = [SAPRound(*done) for done in state_dict["history"]]
        self._masks = [
            state_dict["masks"][name].to(mask.device, torch.bool)
            for name, mask in self.masks.items()
        ]
        self._initial = {
            name: state_dict["initial"][name].to(value) for name, value in self._initial.items()
        }
        self.history = history

    def plot(self, path: str | Path) -> None:
        """Plot the PQ Index, the sparsity and the accuracy before each round. Needs matplotlib.

        Args:
            path: the file to write; its suffix selects the format.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: no round has run yet.
        """
        if not self.history:
            raise ValueError("history must hold at least one round to plot, got none: call step")
        rounds = [done.round for done in self.history]
        curves: dict[str, Sequence[float | None]] = {
            "PQ Index": [done.pq_index for done in self.history],
            "sparsity": [done.sparsity_before for done in self.history],
            "accuracy": [done.accuracy for done in self.history],
        }
        if all(accuracy is None for accuracy in curves["accuracy"]):
            del curves["accuracy"]
        figure = new_figure("SAPPruner.plot", 4 * len(curves), 3.5)
        for axes, (label, values) in zip(
            figure.subplots(1, len(curves)), curves.items(), strict=True
        ):
            axes.plot(rounds, [math.nan if value is None else value for value in values], "o-")
            axes.set(xlabel="round", ylabel=label)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
        figure.savefig(path, dpi=150)

    def _state(self) -> dict[str, Tensor]:
        """Return the parameters, and the buffers to rewind, that the model holds now."""
        check_unmasked(self._model, _MASKED)
        state: dict[str, Tensor] = dict(self._model.named_parameters())
        for name, buffer in self._model.named_buffers():
            if name in self._initial:
                state[name] = buffer
        found = _shapes(state)
        if found != self._shapes:
            changed = sorted({name for name, _ in found.items() ^ self._shapes.items()})
            raise ValueError(
                "model must have parameters and buffers of the names and shapes that it had when "
                f"the pruner was made, got others for {', '.join(changed)}: make a new pruner"
            )
        return state

    def _weights(self) -> list[Tensor]:
        """Return the prunable weights that the model holds now."""
        return [self._model.get_parameter(name) for name in self._names]

    def _pruned_weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the prunable weights with masks of what is pruned."""
        return zip(self._weights(), (~mask for mask in self._masks), strict=True)

    def _indices(self, weights: list[Tensor], together: Tensor) -> list[Tensor]:
        """Return the PQ Indices: together's, one () per layer, or one (rows,) per layer."""
        p, q, masks = self._settings.p, self._settings.q, self._masks
        if self._settings.scope == "global":
            return [together]
        if self._settings.scope == "layer":
            return list(pq_index(weights, p, q, mask=masks, scope="layer"))
        return pq_index(weights, p, q, mask=masks, scope="neuron")

    def _masks_after(self, weights: list[Tensor], indices: list[Tensor]) -> list[Tensor]:
        """Return the masks after a round, given the `_indices` before it."""
        masks = self._masks
        if self._settings.scope == "global":
            count = self._settings.prune_counts(indices[0], sum(_kept_counts(masks)))
            return _prune_group(weights, masks, count)
        if self._settings.scope == "layer":
            kept = torch.stack([mask.sum() for mask in masks])
            counts = self._settings.prune_counts(torch.stack(indices), kept)
            return [
                _prune_group([weight], [mask], count)[0]
                for weight, mask, count in zip(weights, masks, counts, strict=True)
            ]
        pruned = []
        for weight, mask, index in zip(weights, masks, indices, strict=True):
            counts = self._settings.prune_counts(index, mask.flatten(1).sum(1))
            rows = zip(weight, mask, counts, strict=True)
            pruned.append(torch.stack([_prune_group([w], [m], count)[0] for w, m, count in rows]))
        return pruned

    def _summary(self, indices: list[Tensor]) -> dict[str, float]:
        """Return the mean of each layer's indices by weight name, or the global one."""
        if self._settings.scope == "global":
            return {"global": float(indices[0])}
        means = [float(index.mean()) for index in indices]
        return dict(zip(self._names, means, strict=True))


class _PrunedWeights(FrozenZeros):
    """Hooks of an optimizer that keep at zero what a pruner has pruned by then."""

    def __init__(self, pruner: SAPPruner, optimizer: Optimizer) -> None:
        super().__init__([], optimizer)
        self._pruner = pruner

    def _masked_weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._pruner._state()
        return self._pruner._pruned_weights()


def _raise_without_index(
    weights: Sequence[Tensor], masks: Sequence[Tensor], q: float, index: float
) -> NoReturn:
    """Raise the error of weights whose PQ Index is not finite."""
    if not all(w[mask].isfinite().all() for w, mask in zip(weights, masks, strict=True)):
        raise ValueError(f"model must have finite weights, got a PQ Index of {index}")
    raise ValueError(
        f"model must have weights whose powers |w|^q float64 can sum, got a PQ Index of {index} "
        f"with q = {q}: scale the weights, or take another q"
    )


def _prunable_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of Linear and convolution layers, each once, by their first name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_unmasked(model, _MASKED)
    weights = {names[0]: weight for names, weight, _ in layer_weights(model)}
    for name, weight in weights.items():
        if not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"model must hold {name} as a parameter, got one that is computed from others: "
                "remove the parametrization first"
            )
        check_plain_weight(f"model's {name}", weight)
    devices = {weight.device: name for name, weight in weights.items()}
    if len(devices) > 1:
        found = " and ".join(f"{device} for {name}" for device, name in devices.items())
        raise ValueError(f"model must have its weights on one device, got {found}")
    for name, weight in weights.items():
        check_has_values(f"model's {name}", weight)
    weights = {name: weight for name, weight in weights.items() if weight.numel()}
    if not weights:
        raise ValueError(
            "model must have a Linear or Conv1d/2d/3d layer with weights to prune, got a "
            f"{type(model).__name__} without any"
        )
    return weights


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _prune_group(weights: Sequence[Tensor], masks: Sequence[Tensor], count: Tensor) -> list[Tensor]:
    """Return the masks without the `count` smallest kept weights of all tensors together."""
    candidates = [weight[mask] for weight, mask in zip(weights, masks, strict=True)]
    kept = torch.ops.pdp.hard_mask(torch.cat(candidates), count.view(1))
    pieces = kept.split([len(candidate) for candidate in candidates])
    return [mask.masked_scatter(mask, piece) for mask, piece in zip(masks, pieces, strict=True)]


def _kept_counts(masks: Sequence[Tensor]) -> list[int]:
    return torch.stack([mask.sum() for mask in masks]).tolist()
