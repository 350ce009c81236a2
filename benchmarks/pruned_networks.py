"""Networks for `benchmarks.gains`, and what pruning leaves of them."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pdp_kernels import PDPConfig, PDPPruner, hard_mask, hard_mask_channel, hard_mask_nm
from studies.data import digits
from studies.networks import AttentionBlock, Bottleneck, mlp, resnet50

DENSE = "dense"
HALF = "half of the hidden units removed"

# Compressors of `benchmarks.storage`. Those of the best level take minutes for ResNet-50.
FAST = ("gzip", "zstd -3")
THOROUGH = ("gzip", "gzip -9", "zstd -3", "xz")

Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Network:
    """A network with random or trained weights.

    Attributes:
        make: Makes the network.
        inputs: The shape of one example.
        examples: Numbers of examples at which the latency is measured.
        trained: Whether sizes are those of weights trained on digits. Others are random normal
            weights; so are all weights whose latency is measured.
        compressed: Names of the compressors of `benchmarks.storage` that its files get.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    examples: tuple[int, ...] = (1, 8)
    trained: bool = False
    compressed: Sequence[str] = FAST

    @property
    def weights(self) -> str:
        return "trained on digits" if self.trained else "random normal"


class Hidden(NamedTuple):
    """Units between two layers: the rows of `producer` and the input channels of `consumer`."""

    producer: Layer
    norm: nn.BatchNorm2d | None
    consumer: Layer


def layers(model: nn.Module) -> dict[str, Layer]:
    """Return the Linear and Conv2d layers by name. Pruning zeroes their weights."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def hidden_units(model: nn.Module) -> Iterator[Hidden]:
    """Yield the hidden units of each bottleneck, attention block and MLP."""
    for module in model.modules():
        if isinstance(module, Bottleneck):
            first, norm1, _, second, norm2, _, third, _ = module.body
            yield Hidden(first, norm1, second)
            yield Hidden(second, norm2, third)
        elif isinstance(module, AttentionBlock):
            yield Hidden(module.expand, None, module.contract)
        elif isinstance(module, nn.Sequential):
            linear = [layer for layer in module if isinstance(layer, nn.Linear)]
            for first, second in pairwise(linear):
                yield Hidden(first, None, second)


def random_network(network: Network) -> nn.Module:
    """Return the network with normal weights, in evaluation mode."""
    torch.manual_seed(0)
    model = network.make().eval().requires_grad_(False)
    for layer in layers(model).values():
        nn.init.kaiming_normal_(layer.weight)
    return model


def zeros(model: nn.Module, sparsity: float) -> nn.Module:
    """Return a copy with this fraction of each layer's weights at 0, those of least magnitude."""
    return _masked(model, lambda layer: hard_mask(layer.weight, sparsity))


def two_of_four(model: nn.Module) -> nn.Module:
    """Return a copy with 2 of every 4 weights at 0, along the inputs. Other layers stay dense."""

    def mask(layer: Layer) -> Tensor | float:
        return hard_mask_nm(layer.weight, 2, 4, dim=1) if layer.weight.shape[1] % 4 == 0 else 1.0

    return _masked(model, mask)


def zeroed_units(model: nn.Module) -> nn.Module:
    """Return a copy in which half of the hidden units are not read, those of least norm."""
    model = copy.deepcopy(model)
    for _, _, consumer in hidden_units(model):
        kept = hard_mask_channel(consumer.weight, 0.5, dim=1)
        consumer.weight.data *= kept.view(1, -1, *[1] * (consumer.weight.dim() - 2))
    return model


def removed_units(model: nn.Module) -> nn.Module:
    """Return a smaller copy without the hidden units that no layer reads."""
    model = copy.deepcopy(model)
    for producer, norm, consumer in hidden_units(model):
        live = consumer.weight.detach().transpose(0, 1).flatten(1).any(1)
        consumer.weight = _parameter(consumer.weight[:, live])
        producer.weight = _parameter(producer.weight[live])
        if producer.bias is not None:
            producer.bias = _parameter(producer.bias[live])
        if norm is not None:
            norm.weight, norm.bias = _parameter(norm.weight[live]), _parameter(norm.bias[live])
            norm.running_mean, norm.running_var = norm.running_mean[live], norm.running_var[live]
            norm.num_features = len(norm.weight)
        name_in, name_out = _size_names(consumer)[0], _size_names(producer)[1]
        setattr(consumer, name_in, consumer.weight.shape[1])
        setattr(producer, name_out, producer.weight.shape[0])
    return model


def _parameter(tensor: Tensor) -> nn.Parameter:
    kept = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return nn.Parameter(tensor.detach().clone(memory_format=kept), requires_grad=False)


def _size_names(layer: Layer) -> tuple[str, str]:
    if isinstance(layer, nn.Linear):
        return "in_features", "out_features"
    return "in_channels", "out_channels"


@torch.no_grad()
def _masked(model: nn.Module, mask: Callable[[Layer], Tensor | float]) -> nn.Module:
    model = copy.deepcopy(model)
    for layer in layers(model).values():
        layer.weight *= mask(layer)
    return model


SPARSITIES = (0.5, 0.8, 0.9, 0.95)

# By name: a copy of a network with random weights, pruned.
PRUNINGS: dict[str, Callable[[nn.Module], nn.Module]] = {
    DENSE: copy.deepcopy,
    **{f"{s:.0%} zeros": partial(zeros, sparsity=s) for s in SPARSITIES},
    "2:4": two_of_four,
    HALF: lambda model: removed_units(zeroed_units(model)),
}

# The same by training, where None is dense.
CONFIGS: dict[str, Callable[[nn.Module, int], PDPConfig] | None] = {
    DENSE: None,
    **{
        f"{s:.0%} zeros": lambda model, epochs, s=s: PDPConfig.for_epochs(s, epochs=epochs)
        for s in SPARSITIES
    },
    "2:4": lambda model, epochs: PDPConfig.for_epochs(None, epochs=epochs, pattern="2:4"),
    HALF: lambda model, epochs: PDPConfig.for_epochs(
        0.5,
        epochs=epochs,
        scope="layer",
        pattern="channel",
        channel_dim="input",
        include=_names(model, [hidden.consumer for hidden in hidden_units(model)]),
    ),
}


def _names(model: nn.Module, chosen: Sequence[nn.Module]) -> list[str]:
    return [name for name, layer in layers(model).items() if any(layer is one for one in chosen)]


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread, so that the trained weights do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def trained_network(network: Network, pruning: str, epochs: int) -> tuple[nn.Module, float]:
    """Return a network that was trained on digits and pruned by `PDPPruner`, and its accuracy.

    Args:
        network: Takes images of 8 x 8 and has 10 outputs.
        pruning: A key of PRUNINGS.
        epochs: Epochs of training.

    Returns:
        The network in evaluation mode, and its accuracy on the test images.
    """
    data = digits()
    torch.manual_seed(0)
    model = network.make()
    config = CONFIGS[pruning]
    pruner = PDPPruner(model, config(model, epochs)) if config else None
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    steps = math.ceil(len(data.train_inputs) / 64)
    for epoch in range(epochs):
        for index, batch in enumerate(torch.randperm(len(data.train_inputs)).split(64), 1):
            outputs = model(data.train_inputs[batch])
            functional.cross_entropy(outputs, data.train_labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if pruner:
                pruner.step(epoch + index / steps)
    if pruner:
        pruner.finalize()
    model.eval().requires_grad_(False)
    if pruning == HALF:
        model = removed_units(model)
    hits = model(data.test_inputs).argmax(1) == data.test_labels
    return model, hits.double().mean().item()


# Sizes are measured on these.
STORED = {
    "MLP 64-512-512-10": Network(
        partial(mlp, 64, 512, 512, 10),
        (1, 8, 8),
        trained=True,
        compressed=THOROUGH,
    ),
    "GPT-2 block": Network(partial(AttentionBlock, 768, 12, 0.0), (64, 768)),
    "ResNet-50": Network(resnet50, (3, 224, 224)),
}

# Latencies are measured on these: an MLP as large as ResNet-50, 64 tokens, an image of 224 x 224.
TIMED = {
    "MLP 1024-4096-4096-1000": Network(partial(mlp, 1024, 4096, 4096, 1000), (1024,), (1, 256)),
    "GPT-2 block": STORED["GPT-2 block"],
    "ResNet-50": replace(STORED["ResNet-50"], examples=(1, 4)),
}

# `--quick` takes small networks of the same kinds for both.
SMALL = {
    "MLP 64-64-32-10": Network(partial(mlp, 64, 64, 32, 10), (1, 8, 8), (1,), True, THOROUGH),
    "attention block": Network(partial(AttentionBlock, 64, 2, 0.0), (4, 64), (2,)),
    "bottleneck": Network(lambda: nn.Sequential(Bottleneck(32, 16, 2)), (32, 8, 8), (2,)),
}
