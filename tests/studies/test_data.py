"""Data sets are read from the files in which they are distributed."""

import gzip
import tarfile

import pytest
import torch

from studies import data
from studies.train_image import crop, draw_crops, load_images, prepare


def test_mnist_files(tmp_path):
    images = torch.randint(256, (3, 28, 28), dtype=torch.uint8)
    for prefix in ("train", "t10k"):
        header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in images.shape)
        content = header + images.numpy().tobytes()
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
        content = bytes([0, 0, 8, 1]) + (3).to_bytes(4, "big") + bytes([7, 0, 9])
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))
    loaded = data.mnist(tmp_path)
    assert torch.equal(loaded.train_inputs, images.unsqueeze(1) / 255)
    assert loaded.test_labels.tolist() == [7, 0, 9]


@pytest.fixture
def cifar10_folder(tmp_path):
    """Four training images in two classes and two test images, each of one color."""
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 2), ("test", 1)):
        for label, value in (("cat", 50), ("dog", 200)):
            folder = tmp_path / "cifar10" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                color = (value + number, value, value)
                image.new("RGB", (32, 32), color).save(folder / f"{number}.jpg")
    return tmp_path


def test_cifar10_folder_and_archive(cifar10_folder):
    loaded = data.cifar10(cifar10_folder)
    assert loaded.train_inputs.shape == (4, 3, 32, 32)
    assert loaded.train_labels.tolist() == [0, 0, 1, 1]
    assert loaded.test_inputs.mean((1, 2, 3)).mul(255).round().tolist() == [50, 200]
    archived = cifar10_folder / "archived"
    archived.mkdir()
    with tarfile.open(archived / data.CIFAR10_ARCHIVE, "w:xz") as archive:
        archive.add(cifar10_folder / "cifar10", "cifar10")
    for part, other in zip(loaded, data.cifar10(archived), strict=True):
        assert torch.equal(part, other)


def test_processes_decode_as_one_does(cifar10_folder, monkeypatch):
    alone = data.cifar10(cifar10_folder)
    monkeypatch.setattr(data, "DECODED_AT_ONCE", 1)
    monkeypatch.setattr(data.os, "sched_getaffinity", lambda process: {0, 1, 2})
    for part, other in zip(alone, data.cifar10(cifar10_folder), strict=True):
        assert torch.equal(part, other)


def test_prepared_images_are_the_loaded_ones(cifar10_folder, monkeypatch, tmp_path):
    loaded = load_images("resnet20", cifar10_folder)
    into = prepare("resnet20", cifar10_folder, tmp_path / "prepared")
    monkeypatch.setattr(data, "cifar10", None)  # neither read again nor prepared again
    assert prepare("resnet20", cifar10_folder, into) == into
    for part, other in zip(loaded, load_images("resnet20", into), strict=True):
        assert torch.equal(part, other)
        assert part.stride() == other.stride()
    assert prepare("mlp", None, into) is None


def test_crop_and_flip():
    images = torch.arange(2 * 3 * 6 * 5).view(2, 3, 6, 5) + 1.0
    shifts = set()
    for seed in range(40):
        moved = crop(images, *draw_crops(2, 6, 5, torch.Generator().manual_seed(seed)))
        for image, result in zip(images, moved, strict=True):
            padded = torch.nn.functional.pad(image, [4] * 4)
            matches = [
                (row, column, flip)
                for row in range(9)
                for column in range(9)
                for flip in (False, True)
                if torch.equal(
                    result,
                    padded[:, row : row + 6, column : column + 5].flip([2] if flip else []),
                )
            ]
            assert len(matches) == 1
            shifts.add(matches[0])
    assert {flip for *_, flip in shifts} == {False, True}
    assert {row for row, *_ in shifts} == {column for _, column, _ in shifts} == set(range(9))
