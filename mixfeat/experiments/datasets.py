"""Image data sets: scikit-learn's digits, MNIST-1D, and Fashion-MNIST and CIFAR from their original files in memory.

A file is read once, compared with the official checksum, and parsed; nothing is written. Reading a pickle runs no code:
it can only contain lists, dicts, numbers, strings and NumPy arrays.
"""

import gzip
import hashlib
import importlib
import io
import pickle
import random
import tarfile
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["DATASETS", "Dataset", "DatasetError", "Split", "load"]


class DatasetError(Exception):
    """A data set that cannot be loaded; the message is one line that names the file, the reason and the remedy."""


_Arrays = list[tuple[np.ndarray, np.ndarray]]  # images and classes of the training and of the test data
_Parsed = Callable[[str, Callable[[bytes], Any]], Any]  # reads a file and parses its contents


class Split(NamedTuple):
    """Images and their classes."""

    images: Tensor  #: (N, channels, H, W) float32, normalised
    target: Tensor  #: (N,) int64


class Dataset(NamedTuple):
    """The facts about a data set that are known before it is read."""

    num_classes: int
    shape: tuple[int, int, int]  # channels, height, width
    mean: tuple[float, ...]  # per channel, for values in [0, 1], from the authors' code
    std: tuple[float, ...]
    url: str  # folder of the files
    md5: Mapping[str, str]  # checksum of each official file
    read: Callable[[_Parsed], _Arrays]


def load(name: str, folder: Path, *, md5: Mapping[str, str] | None = None) -> tuple[Split, Split]:
    """Load training and test data.

    ``digits`` has no test data: every fifth image of each class is a test image.

    Args:
        name: a key of ``DATASETS``.
        folder: folder that holds the official files, as downloaded.
        md5: checksums that replace the official ones, for other files of the same names and format.

    Returns:
        (train, test).

    Raises:
        DatasetError: a missing package, or a file that is missing, unreadable, damaged or of another format.
    """
    dataset = DATASETS[name]
    sums = {**dataset.md5, **(md5 or {})}

    def parsed(file: str, parse: Callable[[bytes], Any]) -> Any:
        contents = _contents(folder / file, dataset.url + file, sums[file])
        try:
            return parse(contents)
        except Exception as error:  # a damaged pickle can raise any
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DatasetError(f"{folder / file} is not of the format of {name}: {reason}") from None

    try:
        train, test = (_split(dataset, images, target) for images, target in dataset.read(parsed))
    except _FormatError as error:
        raise DatasetError(f"{folder} does not hold {name}: {error}") from None
    return train, test


class _FormatError(Exception):
    """Data of a wrong format."""


def _contents(path: Path, url: str, md5: str) -> bytes:
    try:
        contents = path.read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing: download {url}, or name its folder with --data-dir") from None
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from None
    found = hashlib.md5(contents, usedforsecurity=False).hexdigest()
    if found != md5:
        raise DatasetError(
            f"{path} is not the official file, or not all of it (md5 {found}, not {md5}): download {url} again"
        )
    return contents


def _split(dataset: Dataset, images: np.ndarray, target: np.ndarray) -> Split:
    """Check and normalise images (N, channels, H, W) in [0, 255] or, if floating, [0, 1]."""
    if len(images) != len(target):
        raise _FormatError(f"{len(images)} images but {len(target)} labels")
    if not len(images):
        raise _FormatError("no images")
    if images.shape[1:] != dataset.shape:
        raise _FormatError(f"images of {_by(images.shape[1:])}, not {_by(dataset.shape)}")
    if not 0 <= target.min() <= target.max() < dataset.num_classes:
        raise _FormatError(f"labels from {target.min()} to {target.max()}, not from 0 to {dataset.num_classes - 1}")
    pixels = torch.from_numpy(images.astype(np.float32))
    if images.dtype == np.uint8:
        pixels /= 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (dataset.mean, dataset.std))
    return Split((pixels - mean) / std, torch.from_numpy(target.astype(np.int64)))


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _digits(parsed: _Parsed) -> _Arrays:
    digits = _module("sklearn.datasets", "images").load_digits()
    images, target = digits.images[:, None] / 16, digits.target
    place = np.zeros_like(target)  # index of each image in its class
    for c in range(10):
        place[target == c] = np.arange((target == c).sum())
    test = place % 5 == 4
    return [(images[~test], target[~test]), (images[test], target[test])]


def _mnist1d(parsed: _Parsed) -> _Arrays:
    """Generate the authors' data, 4,000 and 1,000 samples."""
    module = _module("mnist1d.data", "mnist1d")
    with _numpy_seed:  # the package seeds both global generators
        before = random.getstate(), np.random.get_state()
        try:
            data = module.make_dataset()
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
    return [(data["x"][:, None, None], data["y"]), (data["x_test"][:, None, None], data["y_test"])]


_numpy_seed = threading.Lock()


def _module(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise DatasetError(f"{package} is missing: pip install 'mixfeat[{extra}]'") from None


def _fashion_mnist(parsed: _Parsed) -> _Arrays:
    return [
        (parsed(f"{part}-images-idx3-ubyte.gz", _idx_images), parsed(f"{part}-labels-idx1-ubyte.gz", _idx_labels))
        for part in ("train", "t10k")
    ]


def _idx_images(compressed: bytes) -> np.ndarray:
    return _idx(compressed, 3)[:, None]


def _idx_labels(compressed: bytes) -> np.ndarray:
    return _idx(compressed, 1)


def _idx(compressed: bytes, dimensions: int) -> np.ndarray:
    """Read an array of bytes: two zeros, 8 for the type, the number of dimensions, each as 4 bytes, the values."""
    data = gzip.decompress(compressed)
    head = 4 + 4 * dimensions
    if len(data) < head or data[:4] != bytes((0, 0, 8, dimensions)):
        raise _FormatError(f"no idx file of {dimensions} dimensions of bytes")
    shape = np.frombuffer(data, ">u4", dimensions, 4).tolist()
    if len(data) - head != int(np.prod(shape, dtype=object)):
        raise _FormatError(f"{len(data) - head} values, not {_by(shape)}")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def _cifar10(parsed: _Parsed) -> _Arrays:
    names = [f"cifar-10-batches-py/{name}" for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")]
    *train, test = parsed("cifar-10-python.tar.gz", partial(_cifar, names=names, labels="labels"))
    images, target = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return [(images, target), test]


def _cifar100(parsed: _Parsed) -> _Arrays:
    names = ["cifar-100-python/train", "cifar-100-python/test"]
    return parsed("cifar-100-python.tar.gz", partial(_cifar, names=names, labels="fine_labels"))


def _cifar(archive: bytes, names: list[str], labels: str) -> _Arrays:
    """Read each member: a pickled dict with rows of 3 x 32 x 32 bytes and a list of labels."""
    parts = []
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for name in names:
            member = tar.extractfile(name)
            if member is None:
                raise _FormatError(f"{name} is no file")
            content = _Unpickler(member, encoding="latin1").load()
            if not isinstance(content, dict) or not {"data", labels} <= content.keys():
                raise _FormatError(f"{name} has no data and {labels}")
            data, target = content["data"], content[labels]
            if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3 * 32 * 32,):
                raise _FormatError(f"{name} has no rows of 3072 bytes")
            if not isinstance(target, list) or not all(type(label) is int for label in target):
                raise _FormatError(f"{name} has no list of integers as {labels}")
            parts.append((data.reshape(-1, 3, 32, 32), np.array(target, np.int64)))
    return parts


class _Unpickler(pickle.Unpickler):
    """An unpickler that makes NumPy arrays and refuses every other class and function."""

    _ALLOWED = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"its pickle asks for {module}.{name}, which is not data") from None


DATASETS = {
    "digits": Dataset(10, (1, 8, 8), (0.0,), (1.0,), "", {}, _digits),
    "mnist1d": Dataset(10, (1, 1, 40), (0.0,), (1.0,), "", {}, _mnist1d),
    "fashion-mnist": Dataset(
        10, (1, 28, 28), (0.5,), (0.5,), "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        }, _fashion_mnist,
    ),
    "cifar10": Dataset(
        10, (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"}, _cifar10,
    ),
    "cifar100": Dataset(
        100, (3, 32, 32), (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), "https://www.cs.toronto.edu/~kriz/",
        {"cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85"}, _cifar100,
    ),
}  # fmt: skip
