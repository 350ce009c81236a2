"""The weights to measure on: single tensors, layer lists of networks, a small trained network."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from studies.networks import mlp

Layer = tuple[tuple[int, ...], Callable[..., Tensor]]


def resnet50() -> Iterator[Layer]:
    """Yield ResNet-50 without biases: 25,502,912 weights, initialised as in torchvision."""
    kaiming = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
    yield (64, 3, 7, 7), kaiming
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield (width, inputs, 1, 1), kaiming
            yield (width, width, 3, 3), kaiming
            yield (4 * width, width, 1, 1), kaiming
            if block == 0:
                yield (4 * width, inputs, 1, 1), kaiming
            inputs = 4 * width
    bound = 1 / math.sqrt(inputs)
    yield (1000, inputs), partial(nn.init.uniform_, a=-bound, b=bound)


def mobilenet_v1() -> Iterator[Layer]:
    """Yield MobileNet v1 without biases: 4,209,088 weights, initialised as in TF-Slim."""
    normal = _truncated_normal(0.09)
    yield (32, 3, 3, 3), normal
    widths = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    for inputs, outputs in pairwise(widths):
        yield (inputs, 1, 3, 3), normal
        yield (outputs, inputs, 1, 1), normal
    yield (1000, 1024), normal


def bert_base() -> Iterator[Layer]:
    """Yield BERT base, 12 blocks and the pooler without embeddings: 85,524,480 weights."""
    normal = _truncated_normal(0.02)
    for _ in range(12):
        for _ in ("query", "key", "value", "attention output"):
            yield (768, 768), normal
        yield (3072, 768), normal
        yield (768, 3072), normal
    yield (768, 768), normal


def gpt2() -> Iterator[Layer]:
    """Yield GPT-2 124M, the output layer (tied embedding) and 12 blocks: 123,532,032 weights.

    Blocks store their weights as (in, out). The two projections that add to the residual stream
    start smaller.
    """
    normal = partial(nn.init.normal_, std=0.02)
    residual = partial(nn.init.normal_, std=0.02 / math.sqrt(2 * 12))
    yield (50257, 768), normal
    for _ in range(12):
        yield (768, 2304), normal
        yield (768, 768), residual
        yield (768, 3072), normal
        yield (3072, 768), residual


def llama_7b() -> Iterator[Layer]:
    """Yield Llama 2 7B, 32 blocks and the output layer: 6,607,077,376 weights."""
    normal = partial(nn.init.normal_, std=0.02)
    for _ in range(32):
        for _ in ("query", "key", "value", "attention output"):
            yield (4096, 4096), normal
        for shape in ((11008, 4096), (11008, 4096), (4096, 11008)):
            yield shape, normal
    yield (32000, 4096), normal


def llama_7b_block() -> Iterator[Layer]:
    """Yield one block of Llama 2 7B: 202,375,168 weights."""
    return itertools.islice(llama_7b(), 7)


def convolution(*shape: int) -> Iterator[Layer]:
    """Yield one convolution of this shape."""
    yield shape, partial(nn.init.kaiming_normal_, mode="fan_in", nonlinearity="linear")


def _truncated_normal(std: float) -> Callable[..., Tensor]:
    return partial(nn.init.trunc_normal_, std=std, a=-2 * std, b=2 * std)


NETWORKS: dict[str, Callable[[], Iterator[Layer]]] = {
    "resnet50": resnet50,
    "mobilenet-v1": mobilenet_v1,
    "bert-base": bert_base,
    "gpt2": gpt2,
    "llama-7b": llama_7b,
    "llama-7b-block": llama_7b_block,
    "conv-1x1": partial(convolution, 2048, 1024, 1, 1),
    "conv-3x3": partial(convolution, 512, 512, 3, 3),
}


@functools.cache
def trained_digits() -> tuple[Tensor, ...]:
    """Return the weights of an MLP 64-256-128-10 trained for 30 epochs on scikit-learn's digits."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = images.float() / 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = mlp(64, 256, 128, 10)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(30):
            for index in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[index]), labels[index]).backward()
                optimizer.step()
        accuracy = (model(images).argmax(dim=1) == labels).double().mean().item()
    if accuracy < 0.95:
        raise RuntimeError(f"the digits network did not train: accuracy {accuracy:.3f}")
    return tuple(weight.detach() for weight in model.parameters() if weight.dim() == 2)


def make_weights(name: str, generator: torch.Generator) -> list[Tensor]:
    """Return the float32 weights of one input.

    Args:
        name: A key of NETWORKS, "digits", or the size of a single weight.
        generator: Its device is that of the weights.
    """
    if name == "digits":
        return [weight.to(generator.device) for weight in trained_digits()]
    if name in NETWORKS:
        layers = NETWORKS[name]()
    else:
        layers = [((int(name),), partial(nn.init.normal_, std=0.02))]
    return [
        initialise(torch.empty(shape, device=generator.device), generator=generator)
        for shape, initialise in layers
    ]
