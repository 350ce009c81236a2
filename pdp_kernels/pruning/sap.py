"""Sparsity-informed Adaptive Pruning (SAP): the PQ Index says how much to prune in each round."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pdp_kernels.functional.pq_index import pq_index
from pdp_kernels.functional.sap_counts import sap_prune_counts
from pdp_kernels.functional.validation import (
    check_optimizer,
    check_plain_weight,
    check_sap_settings,
    check_scope,
)
from pdp_kernels.pruning.layers import layer_weights


class SAPRound(NamedTuple):
    """One round of `SAPPruner`.

    The PQ Index is that of the weights unpruned before the round: `pq_index` of all of them
    together, `pq_indices` by scope: {"global": ...}, or that of each weight by its name, where
    scope "neuron" gives the mean over rows. `pruned` counts the weights pruned in this round, by
    name; the sparsities are shares of all prunable weights.
    """

    round: int
    pq_index: float
    pq_indices: dict[str, float]
    pruned: dict[str, int]
    sparsity_before: float
    sparsity_after: float
    accuracy: float | None


class SAPPruner:
    """Prunes a model in rounds, each by as much as its PQ Index allows.

    Algorithm 1 of arXiv 2302.05601: train, `step`, train again, and so on. A round takes the PQ
    Index of the unpruned weights (`pq_index`), prunes `sap_prune_counts` of them, those of least
    magnitude in each group, and rewinds the others to where they started. The method prunes less
    and less once the index says that little can be spared; it does not stop by itself.

    Of weights tied at the boundary those met first are pruned first: by layer in the order of
    model.named_modules(), then by row-major index. A pruned weight stays pruned.

    Arguments:
        model: the weights of its Linear and Conv1d/2d/3d layers are pruned, shared ones once.
            It must be on its device, with its dtypes, already.
        p, q, eta, gamma, beta: as for `sap_prune_counts`.
        scope: what one group is: "neuron" (each row of dim 0), "layer", or "global", all together.
        rewind: after each round, set all parameters and buffers of the model to their values at
            construction, of which a copy is kept, and the pruned weights to 0.

    Attributes:
        masks: by weight name, bool of the weight's shape; True where kept.
        sparsity: the share of the prunable weights that is pruned.
        history: a list of `SAPRound`.

    Raises:
        TypeError, ValueError: as `sap_prune_counts`; another scope; a weight that `pq_index` does
            not take or that is computed from other parameters; weights on several devices; a model
            with nothing to prune.

    Example:
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
        scope: str = "global",
        rewind: bool = True,
    ):
        check_sap_settings(p, q, eta, gamma, beta)
        check_scope(scope)
        if not isinstance(rewind, bool):
            raise TypeError(f"rewind must be a bool, got {type(rewind).__name__}")
        self._weights = _prunable_weights(model)
        self._settings = {
            "p": float(p), "q": float(q), "eta": float(eta), "gamma": float(gamma),
            "beta": float(beta), "scope": scope, "rewind": rewind,
        }  # fmt: skip
        self._masks = [
            torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
            for weight in self._weights.values()
        ]
        self._state = dict(model.named_parameters()) | dict(model.named_buffers()) if rewind else {}
        self._initial = {name: value.detach().clone() for name, value in self._state.items()}
        self.history: list[SAPRound] = []

    @property
    def masks(self) -> dict[str, Tensor]:
        return dict(zip(self._weights, self._masks, strict=True))

    @property
    def sparsity(self) -> float:
        total = sum(mask.numel() for mask in self._masks)
        return (total - sum(_kept_counts(self._masks))) / total

    @torch.no_grad()
    def step(self, accuracy: float | None = None) -> SAPRound:
        """One round: prunes the trained model, and rewinds what is left.

        The state of an optimizer is not rewound: make a new one for the next round.

        Arguments:
            accuracy: what the model reached before this round, for the history.

        Returns:
            The `SAPRound`, which the history has too.

        Raises:
            TypeError: accuracy is no number.
            ValueError: an unpruned weight is NaN or infinite. The model is left as it is.
        """
        if accuracy is not None and (isinstance(accuracy, bool) or not isinstance(accuracy, Real)):
            raise TypeError(f"accuracy must be a number or None, got {type(accuracy).__name__}")
        weights = [weight.detach() for weight in self._weights.values()]
        p, q = self._settings["p"], self._settings["q"]
        together = pq_index(weights, p, q, mask=self._masks, scope="global")
        overall = float(together)
        if not math.isfinite(overall):
            raise ValueError(f"model must have finite weights, got a PQ Index of {overall}")
        scope = self._settings["scope"]
        indices = together
        if scope != "global":
            indices = pq_index(weights, p, q, mask=self._masks, scope=scope)
        kept_before, sparsity_before = _kept_counts(self._masks), self.sparsity

        self._masks = self._pruned(weights, indices)
        pruned = [
            before - after
            for before, after in zip(kept_before, _kept_counts(self._masks), strict=True)
        ]
        for name, value in self._initial.items():
            self._state[name].copy_(value)
        self.mask_weights()
        done = SAPRound(
            round=len(self.history) + 1,
            pq_index=overall,
            pq_indices=self._summary(indices),
            pruned=dict(zip(self._weights, pruned, strict=True)),
            sparsity_before=sparsity_before,
            sparsity_after=self.sparsity,
            accuracy=None if accuracy is None else float(accuracy),
        )
        self.history.append(done)
        return done

    @torch.no_grad()
    def mask_weights(self) -> None:
        """Sets the pruned weights to 0: to be called after each optimizer step, or see `attach`."""
        for weight, mask in zip(self._weights.values(), self._masks, strict=True):
            weight.masked_fill_(~mask, 0)

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Calls `mask_weights` after each step of the optimizer, until handle.remove().

        Raises:
            TypeError: optimizer is no torch.optim.Optimizer.
        """
        check_optimizer(optimizer)
        return optimizer.register_step_post_hook(lambda *_: self.mask_weights())

    def state_dict(self) -> dict[str, Any]:
        """Masks, initial values, settings and history; the model has a state_dict of its own."""
        return {
            "settings": dict(self._settings),
            "masks": self.masks,
            "initial": dict(self._initial),
            "history": [done._asdict() for done in self.history],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a state; the weights stay as they are until `mask_weights` or `step`.

        Raises:
            TypeError: state_dict is no mapping.
            ValueError: it is of a pruner with other settings or of another model. Nothing changes.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
        own = self.state_dict()
        if state_dict.keys() != own.keys():
            raise ValueError(f"state_dict must have keys {list(own)}, got {list(state_dict)}")
        if state_dict["settings"] != own["settings"]:
            raise ValueError(
                f"state_dict must be of a pruner with settings {own['settings']}, "
                f"got {state_dict['settings']}"
            )
        for part in ("masks", "initial"):
            expected, got = (
                {name: tuple(value.shape) for name, value in state[part].items()}
                for state in (own, state_dict)
            )
            if got != expected:
                raise ValueError(f"state_dict must have {part} of shapes {expected}, got {got}")
        history = [SAPRound(**done) for done in state_dict["history"]]
        self._masks = [
            state_dict["masks"][name].to(weight.device, torch.bool)
            for name, weight in self._weights.items()
        ]
        self._initial = {
            name: state_dict["initial"][name].to(value) for name, value in self._initial.items()
        }
        self.history = history

    def plot(self, path: str | Path) -> None:
        """Draws PQ Index, sparsity and accuracy, all as each round found them. Needs matplotlib.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: there was no round yet.
        """
        if not self.history:
            raise ValueError("history must hold at least one round to plot, got none: call step")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("SAPPruner.plot needs matplotlib: pip install matplotlib") from error
        rounds = [done.round for done in self.history]
        curves = {
            "PQ Index": [done.pq_index for done in self.history],
            "sparsity": [done.sparsity_before for done in self.history],
            "accuracy": [done.accuracy for done in self.history],
        }
        if all(accuracy is None for accuracy in curves["accuracy"]):
            del curves["accuracy"]
        figure = Figure(figsize=(4 * len(curves), 3.5), layout="constrained")
        for axes, (label, values) in zip(
            figure.subplots(1, len(curves)), curves.items(), strict=True
        ):
            axes.plot(rounds, [math.nan if value is None else value for value in values], "o-")
            axes.set(xlabel="round", ylabel=label)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
        figure.savefig(path, dpi=150)

    def _pruned(self, weights: list[Tensor], indices: Tensor | list[Tensor]) -> list[Tensor]:
        """The masks after a round."""
        settings = {name: self._settings[name] for name in ("p", "q", "eta", "gamma", "beta")}
        masks = self._masks
        scope = self._settings["scope"]
        if scope == "global":
            count = sap_prune_counts(indices, sum(_kept_counts(masks)), **settings)
            return _prune_group(weights, masks, count)
        if scope == "layer":
            kept = torch.stack([mask.sum() for mask in masks])
            counts = sap_prune_counts(indices, kept, **settings)
            return [
                _prune_group([weight], [mask], count)[0]
                for weight, mask, count in zip(weights, masks, counts, strict=True)
            ]
        pruned = []
        for weight, mask, index in zip(weights, masks, indices, strict=True):
            counts = sap_prune_counts(index, mask.flatten(1).sum(1), **settings)
            rows = zip(weight, mask, counts, strict=True)
            pruned.append(torch.stack([_prune_group([w], [m], count)[0] for w, m, count in rows]))
        return pruned

    def _summary(self, indices: Tensor | list[Tensor]) -> dict[str, float]:
        if self._settings["scope"] == "global":
            return {"global": float(indices)}
        means = [float(index.mean()) for index in indices]
        return dict(zip(self._weights, means, strict=True))


def _prunable_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of Linear and convolution layers by their first name, each once."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    weights = {names[0]: weight for names, weight, _ in layer_weights(model)}
    for name, weight in weights.items():
        if not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"model must hold {name} as a parameter, got one that is computed from others: "
                "remove the parametrization first"
            )
        check_plain_weight(f"model's {name}", weight)
    weights = {name: weight for name, weight in weights.items() if weight.numel()}
    if not weights:
        raise ValueError(
            "model must have a Linear or Conv1d/2d/3d layer with weights to prune, got a "
            f"{type(model).__name__} without any"
        )
    devices = {weight.device: name for name, weight in weights.items()}
    if len(devices) > 1:
        found = " and ".join(f"{device} for {name}" for device, name in devices.items())
        raise ValueError(f"model must have its weights on one device, got {found}")
    return weights


def _prune_group(weights: Sequence[Tensor], masks: Sequence[Tensor], count: Tensor) -> list[Tensor]:
    """The masks after `count` more of the kept weights are pruned, the least of all together.

    Only kept weights are selected from, so that none comes back.
    """
    candidates = [weight[mask] for weight, mask in zip(weights, masks, strict=True)]
    kept = torch.ops.pdp.hard_mask(torch.cat(candidates), count.view(1))
    parts = kept.split([len(candidate) for candidate in candidates])
    return [mask.masked_scatter(mask, part) for mask, part in zip(masks, parts, strict=True)]


def _kept_counts(masks: Sequence[Tensor]) -> list[int]:
    return torch.stack([mask.sum() for mask in masks]).tolist()
