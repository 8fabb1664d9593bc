"""Image data sets: scikit-learn's digits, MNIST-1D, and Fashion-MNIST and CIFAR by torchvision, from their archives.

An archive is read once and compared with the official checksum, so torchvision unpickles official files only. They are
unpacked in a temporary folder; nothing is downloaded, and nothing written beside the archives.
"""

import gzip
import hashlib
import importlib
import io
import random
import tarfile
import tempfile
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


_Archives = Mapping[str, bytes]  # contents by place in torchvision's root folder
_Data = list[tuple[Any, Any]]  # images (N, channels, H, W) and classes of the training and of the test data


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
    url: str  # folder of the archives
    md5: Mapping[str, str]  # checksum of each official archive, by its place in torchvision's root folder
    read: Callable[[_Archives], _Data]


def load(name: str, folder: Path) -> tuple[Split, Split]:
    """Load training and test data.

    ``digits`` has no test data: every fifth image of each class is a test image.

    Args:
        name: a key of ``DATASETS``.
        folder: folder that holds the official archives, as downloaded, or torchvision's root folder with them.

    Returns:
        (train, test).

    Raises:
        DatasetError: a missing package, or an archive that is missing, unreadable or damaged.
    """
    dataset = DATASETS[name]
    archives = {file: _contents(dataset, folder, file) for file in dataset.md5}
    train, test = (_split(dataset, images, target) for images, target in dataset.read(archives))
    return train, test


def _contents(dataset: Dataset, folder: Path, file: str) -> bytes:
    path, md5 = folder / file, dataset.md5[file]
    url = dataset.url + path.name
    try:
        if not path.exists():
            path = folder / path.name
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


def _split(dataset: Dataset, images: Any, target: Any) -> Split:
    """Normalise images in [0, 255] or, if floating, [0, 1]."""
    images, target = torch.as_tensor(images), torch.as_tensor(target)
    pixels = images.float() if images.is_floating_point() else images.float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (dataset.mean, dataset.std))
    return Split((pixels - mean) / std, target.long())


def _digits(archives: _Archives) -> _Data:
    digits = _module("sklearn.datasets", "images").load_digits()
    images, target = digits.images[:, None] / 16, digits.target
    place = np.zeros_like(target)  # index of each image in its class
    for c in range(10):
        place[target == c] = np.arange((target == c).sum())
    test = place % 5 == 4
    return [(images[~test], target[~test]), (images[test], target[test])]


def _mnist1d(archives: _Archives) -> _Data:
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
    except (ImportError, RuntimeError) as error:  # torchvision was built for another torch
        package, reason = name.partition(".")[0], str(error).partition("\n")[0]
        raise DatasetError(f"{package} cannot be imported with torch {torch.__version__}: {reason}") from None


def _torchvision(archives: _Archives, reader: str) -> _Data:
    """Read the data by a class of torchvision, from a temporary root folder."""
    kind = getattr(_module("torchvision.datasets", "images"), reader)
    try:
        with tempfile.TemporaryDirectory() as root:
            for file, contents in archives.items():
                _unpack(Path(root, file), contents)
            parts = [kind(root, train=train, download=False) for train in (True, False)]
    except OSError as error:
        raise DatasetError(f"{Path(next(iter(archives))).name} cannot be unpacked: {error}") from None
    return [(_channels_first(torch.as_tensor(part.data)), part.targets) for part in parts]


def _unpack(path: Path, contents: bytes) -> None:
    """Unpack an archive where ``path`` says that it lies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".tar.gz"):
        with tarfile.open(fileobj=io.BytesIO(contents)) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)  # new in Python 3.11.4
            tar.extractall(path.parent)
    else:
        path.with_suffix("").write_bytes(gzip.decompress(contents))


def _channels_first(images: Tensor) -> Tensor:
    """Return images (N, H, W) or (N, H, W, channels) as (N, channels, H, W)."""
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


DATASETS = {
    "digits": Dataset(10, (1, 8, 8), (0.0,), (1.0,), "", {}, _digits),
    "mnist1d": Dataset(10, (1, 1, 40), (0.0,), (1.0,), "", {}, _mnist1d),
    "fashion-mnist": Dataset(
        10, (1, 28, 28), (0.5,), (0.5,), "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "FashionMNIST/raw/train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "FashionMNIST/raw/train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "FashionMNIST/raw/t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "FashionMNIST/raw/t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        }, partial(_torchvision, reader="FashionMNIST"),
    ),
    "cifar10": Dataset(
        10, (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"}, partial(_torchvision, reader="CIFAR10"),
    ),
    "cifar100": Dataset(
        100, (3, 32, 32), (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), "https://www.cs.toronto.edu/~kriz/",
        {"cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85"}, partial(_torchvision, reader="CIFAR100"),
    ),
}  # fmt: skip
