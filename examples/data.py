"""The data sets of the examples, held in memory: images in [0, 1] with labels, and text.

Each is read from the files it is usually distributed as, and has a stand-in that is installed
already: scikit-learn's 8 x 8 digits, and the help texts of Python's standard library.
"""

import gzip
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CIFAR10_ARCHIVE = "cifar10-jpeg.tar.xz"


class Images(NamedTuple):
    """Inputs: (images, channels, height, width), float32 in [0, 1]. Labels: int64."""

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


class Text(NamedTuple):
    """Characters as int64 indices into the sorted characters of the whole text."""

    train: Tensor
    test: Tensor
    characters: str


def mnist(folder: Path) -> Images:
    """MNIST from its four gzipped IDX files, as torchvision's `MNIST/raw` holds them."""

    def read(name: str) -> Tensor:
        content = gzip.decompress((folder / f"{name}-ubyte.gz").read_bytes())
        dimensions = content[3]  # IDX: 0, 0, type, dimensions, then a 4-byte size of each
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
        return torch.from_numpy(values.copy())

    parts = []
    for prefix in ("train", "t10k"):
        parts.append(read(f"{prefix}-images-idx3").view(-1, 1, 28, 28).float() / 255)
        parts.append(read(f"{prefix}-labels-idx1").long())
    return Images(*parts)


def digits() -> Images:
    """scikit-learn's digits: 1437 to train with, 360 to test with."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    inputs = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return Images(inputs[train], labels[train], inputs[test], labels[test])


def cifar10(folder: Path) -> Images:
    """CIFAR-10 as `cifar10/{train,test}/<class>/<number>.jpg`, in the folder or its archive."""
    from PIL import Image

    splits: dict[str, list[tuple[str, bytes]]] = {"train": [], "test": []}
    for path, content in _cifar10_files(folder):
        _, split, label, _ = path.parts
        splits[split].append((label, content))
    labels = sorted({label for label, _ in splits["train"]})
    parts = []
    for files in splits.values():
        images = np.stack([np.asarray(Image.open(io.BytesIO(content))) for _, content in files])
        parts.append(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
        parts.append(torch.tensor([labels.index(label) for label, _ in files]))
    return Images(*parts)


def _cifar10_files(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Each image's path, from `cifar10` on, and content, in an order that is always the same."""
    if (folder / "cifar10").is_dir():
        for path in sorted((folder / "cifar10").glob("*/*/*.jpg")):
            yield path.relative_to(folder), path.read_bytes()
        return
    with tarfile.open(folder / CIFAR10_ARCHIVE) as archive:
        contents = {
            member.name: archive.extractfile(member).read()
            for member in archive
            if member.name.endswith(".jpg")
        }
    for name in sorted(contents):
        yield Path(name), contents[name]


def shakespeare(folder: Path) -> Text:
    """Tiny Shakespeare, under the name it is kept by here or the one nanoGPT gives it."""
    for name in ("tinyshakespeare.txt", "input.txt"):
        if (folder / name).is_file():
            return split_text((folder / name).read_text())
    raise FileNotFoundError(f"no tinyshakespeare.txt or input.txt in {folder}")


def help_text() -> Text:
    """What Python's `help()` says of its keywords and topics: 465,000 characters in Python 3.11."""
    from pydoc_data.topics import topics

    return split_text("\n".join(topics[name] for name in sorted(topics)))


def split_text(text: str) -> Text:
    """The first nine tenths to train with, the last to test with, as nanoGPT does."""
    characters = "".join(sorted(set(text)))
    index = {character: number for number, character in enumerate(characters)}
    numbers = torch.tensor([index[character] for character in text])
    border = len(text) * 9 // 10
    return Text(numbers[:border], numbers[border:], characters)


def normalized(images: Images) -> Images:
    """Every channel with the mean 0 and the standard deviation 1 of the training images."""
    mean = images.train_inputs.mean((0, 2, 3), keepdim=True)
    std = images.train_inputs.std((0, 2, 3), keepdim=True)
    return images._replace(
        train_inputs=(images.train_inputs - mean) / std,
        test_inputs=(images.test_inputs - mean) / std,
    )


def first_folder(folder: Path, *names: str) -> Path:
    """The first of these subfolders that exists, else the folder itself."""
    return next((folder / name for name in names if (folder / name).is_dir()), folder)
