"""The data sets of the studies, held in memory: images in [0, 1] with labels, and text.

Each is read from the files in which it is usually distributed. Stand-ins need no download:
scikit-learn's 8 x 8 digits for images, the help texts of Python's standard library for text.
"""

import gzip
import io
import multiprocessing
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CIFAR10_ARCHIVE = "cifar10-jpeg.tar.xz"
DECODED_AT_ONCE = 1000  # images of a task for a process: half a second


class Images(NamedTuple):
    """Inputs: (images, channels, height, width), float32 in [0, 1]. Labels: int64."""

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


class Text(NamedTuple):
    """Characters as int64 indices into `characters`, the sorted characters of the text."""

    train: Tensor
    test: Tensor
    characters: str


def mnist(folder: Path) -> Images:
    """Return MNIST, read from its four gzipped IDX files as in torchvision's `MNIST/raw`."""

    def read(name: str) -> Tensor:
        content = gzip.decompress((folder / f"{name}-ubyte.gz").read_bytes())
        dimensions = content[3]  # IDX: 0, 0, type, number of dimensions, 4 bytes for each size
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
        return torch.from_numpy(values.copy())

    tensors = []
    for prefix in ("train", "t10k"):
        tensors.append(read(f"{prefix}-images-idx3").view(-1, 1, 28, 28).float() / 255)
        tensors.append(read(f"{prefix}-labels-idx1").long())
    return Images(*tensors)


def digits() -> Images:
    """Return scikit-learn's digits, 1437 for training and 360 for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    inputs = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return Images(inputs[train], labels[train], inputs[test], labels[test])


def cifar10(folder: Path) -> Images:
    """Return CIFAR-10, read from `cifar10/{train,test}/<class>/<number>.jpg` or its archive.

    A process for each core decodes: one takes 30 s.
    """
    splits: dict[str, list[tuple[str, bytes]]] = {"train": [], "test": []}
    for path, content in _cifar10_files(folder):
        _, split, label, _ = path.parts
        splits[split].append((label, content))
    labels = sorted({label for label, _ in splits["train"]})
    tensors = []
    for files in splits.values():
        images = _decoded([content for _, content in files])
        tensors.append(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
        tensors.append(torch.tensor([labels.index(label) for label, _ in files]))
    return Images(*tensors)


def _decoded(files: list[bytes]) -> np.ndarray:
    """Return the images of JPEG files, (files, height, width, channels), uint8."""
    parts = [files[i : i + DECODED_AT_ONCE] for i in range(0, len(files), DECODED_AT_ONCE)]
    processes = min(len(parts), len(os.sched_getaffinity(0)))
    if processes < 2:
        return np.concatenate([_decode(part) for part in parts])
    # Forked, because a new interpreter would import torch first. They compute nothing with it.
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return np.concatenate(pool.map(_decode, parts, chunksize=1))


def _decode(files: list[bytes]) -> np.ndarray:
    from PIL import Image

    return np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in files])


def _cifar10_files(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield path and content of each image in sorted order; paths start with `cifar10`."""
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
    """Return Tiny Shakespeare, read from `tinyshakespeare.txt` or nanoGPT's `input.txt`."""
    for name in ("tinyshakespeare.txt", "input.txt"):
        if (folder / name).is_file():
            return split_text((folder / name).read_text())
    raise FileNotFoundError(f"no tinyshakespeare.txt or input.txt in {folder}")


def help_text() -> Text:
    """Return Python's `help()` of all keywords and topics: 465,000 characters in Python 3.11."""
    from pydoc_data.topics import topics

    return split_text("\n".join(topics[name] for name in sorted(topics)))


def split_text(text: str) -> Text:
    """Return the first nine tenths of the text for training, the last for testing, as nanoGPT."""
    characters = "".join(sorted(set(text)))
    index = {character: number for number, character in enumerate(characters)}
    numbers = torch.tensor([index[character] for character in text])
    border = len(text) * 9 // 10
    return Text(numbers[:border], numbers[border:], characters)


def normalized(images: Images) -> Images:
    """Return images whose training set has mean 0 and standard deviation 1 in each channel."""
    mean = images.train_inputs.mean((0, 2, 3), keepdim=True)
    std = images.train_inputs.std((0, 2, 3), keepdim=True)
    return images._replace(
        train_inputs=(images.train_inputs - mean) / std,
        test_inputs=(images.test_inputs - mean) / std,
    )


def first_folder(folder: Path, *names: str) -> Path:
    """Return the first of these subfolders that exists, or else the folder itself."""
    return next((folder / name for name in names if (folder / name).is_dir()), folder)
