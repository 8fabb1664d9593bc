"""Image data sets: archives missing and damaged, what torchvision is given and, where it is installed, what it reads.

The archives are tiny and made here. A stand-in for torchvision lists what it is given, and returns other data.
"""

import gzip
import hashlib
import importlib
import io
import pickle
import random
import struct
import sys
import tarfile
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mixfeat.experiments import datasets
from mixfeat.experiments.datasets import DATASETS, DatasetError

IMAGES = "{}-images-idx3-ubyte.gz"
LABELS = "{}-labels-idx1-ubyte.gz"


def integers(high, *shape):
    return torch.randint(high, shape, dtype=torch.uint8).numpy()


def idx(array):
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(head + array.tobytes())


def python2_pickle(data, key, labels):
    """As Python 2 and its NumPy wrote the official files: protocol 2, 8-bit texts, numpy.core."""
    rows, columns = (b"J" + struct.pack("<i", size) for size in data.shape)
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    values = b"T" + struct.pack("<i", data.size) + data.tobytes()
    array = empty + b"(K\x01" + rows + columns + b"\x86" + dtype + b"\x89" + values + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U" + bytes([len(key)]) + key.encode() + numbers + b"u."


def archive(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture
def make_official(monkeypatch):
    """A function that writes an archive into a folder and has its checksum taken for the official one."""

    def make(name, file, content, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
        (place,) = (place for place in DATASETS[name].md5 if Path(place).name == file)
        md5 = {**DATASETS[name].md5, place: hashlib.md5(content).hexdigest()}
        monkeypatch.setitem(DATASETS, name, DATASETS[name]._replace(md5=md5))

    return make


@pytest.fixture
def torchvision():
    """torchvision.datasets; the test is skipped where it cannot be imported."""
    try:
        return datasets._module("torchvision.datasets", "images")
    except DatasetError as error:
        pytest.skip(str(error))


@pytest.fixture
def stand_in(monkeypatch):
    """Stand-ins for torchvision's classes: they return ``data[train]``, and list in ``calls`` what they are given."""
    calls, data = [], {}

    def reader(name):
        def read(root, train, download):
            files = {str(p.relative_to(root)): p.read_bytes() for p in Path(root).rglob("*") if p.is_file()}
            calls.append((name, Path(root), train, download, files))
            return SimpleNamespace(data=data[train][0], targets=data[train][1])

        return read

    readers = {name: reader(name) for name in ("FashionMNIST", "CIFAR10", "CIFAR100")}
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchvision.datasets", SimpleNamespace(**readers))
    return SimpleNamespace(calls=calls, data=data)


def normalised(name, images):
    mean, std = (np.array(values)[:, None, None] for values in (DATASETS[name].mean, DATASETS[name].std))
    return torch.from_numpy((images / 255 - mean) / std).float()


@pytest.fixture
def fashion(tmp_path, make_official):
    """The files of a tiny Fashion-MNIST in the test's folder, and what they hold."""
    parts = {part: (integers(256, n, 28, 28), integers(10, n))
             for part, n in (("train", 7), ("t10k", 4))}  # fmt: skip
    for part, arrays in parts.items():
        for file, array in zip((IMAGES, LABELS), arrays, strict=True):
            make_official("fashion-mnist", file.format(part), idx(array), tmp_path)
    return parts


@pytest.fixture
def write_cifar(tmp_path, make_official):
    """A function that writes a tiny CIFAR into the test's folder; it returns the members, the rows and the labels."""

    def write(name):
        prefix, parts, key = {
            "cifar10": ("cifar-10-batches-py/", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], "labels"),
            "cifar100": ("cifar-100-python/", ["train", "test"], "fine_labels"),
        }[name]
        rows = {part: integers(256, 3, 3072) for part in parts}
        labels = {part: integers(DATASETS[name].num_classes, 3).tolist() for part in parts}
        members = {prefix + part: python2_pickle(rows[part], key, labels[part]) for part in parts}
        file, names = {"cifar10": ("batches.meta", "label_names"), "cifar100": ("meta", "fine_label_names")}[name]
        members[prefix + file] = pickle.dumps({names: ["cat"]}, 2)
        (archive_file,) = DATASETS[name].md5
        make_official(name, archive_file, archive(members), tmp_path)
        return members, rows, labels

    return write


def test_digits_split_is_the_same_everywhere(tmp_path):
    sklearn = pytest.importorskip("sklearn.datasets")
    train, test = datasets.load("digits", tmp_path)
    everything = sklearn.load_digits()
    assert train.images.dtype == torch.float32
    assert train.target.dtype == torch.int64
    assert len(train.target) + len(test.target) == len(everything.target) == 1797
    assert train.images.shape[1:] == (1, 8, 8)
    assert (train.images.min(), train.images.max()) == (0, 1)
    for c in range(10):
        images = torch.from_numpy(everything.images[everything.target == c]).float() / 16
        kept = [i for i in range(len(images)) if i % 5 != 4]
        assert torch.equal(train.images[train.target == c, 0], images[kept])
        assert torch.equal(test.images[test.target == c, 0], images[4::5])


def test_mnist1d(tmp_path):
    """The package's own data, of the authors' seed; nothing outside sees that it seeds global generators."""
    pytest.importorskip("mnist1d")
    random.seed(0)
    np.random.seed(0)
    expected = random.random(), np.random.rand()
    random.seed(0)
    np.random.seed(0)
    train, test = datasets.load("mnist1d", tmp_path)
    assert (random.random(), np.random.rand()) == expected
    for split, n in ((train, 4000), (test, 1000)):
        assert split.images.shape == (n, 1, 1, 40)
        assert (split.images.dtype, split.target.dtype) == (torch.float32, torch.int64)
    assert torch.equal(torch.cat([train.target, test.target]).bincount(), torch.full((10,), 500))
    both = torch.cat([train.images, test.images])
    assert abs(both.mean()) < 1e-4
    assert abs(both.std() - 1) < 1e-4
    assert train.target[:10].tolist() == [2, 6, 4, 5, 6, 6, 6, 0, 3, 1]
    torch.testing.assert_close(train.images[0, 0, 0, :3], torch.tensor([-0.332, -0.472, -0.779]), rtol=0, atol=1e-3)


@pytest.mark.usefixtures("torchvision")
def test_fashion_mnist(fashion, tmp_path):
    for split, (images, labels) in zip(datasets.load("fashion-mnist", tmp_path), fashion.values(), strict=True):
        torch.testing.assert_close(split.images, normalised("fashion-mnist", images[:, None]))
        assert split.images.dtype == torch.float32
        assert (split.target.dtype, split.target.tolist()) == (torch.int64, labels.tolist())


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name, write_cifar, torchvision, tmp_path, monkeypatch):
    members, rows, labels = write_cifar(name)
    sums = {place.partition("/")[2]: hashlib.md5(content).hexdigest() for place, content in members.items()}
    kind = getattr(torchvision, name.upper())
    for files in ("train_list", "test_list"):
        monkeypatch.setattr(kind, files, [(file, sums[file]) for file, _ in getattr(kind, files)])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums[kind.meta["filename"]]})
    train, test = datasets.load(name, tmp_path)
    *training, testing = rows
    expected = np.concatenate([rows[part] for part in training]).reshape(-1, 3, 32, 32)
    torch.testing.assert_close(train.images, normalised(name, expected))
    torch.testing.assert_close(test.images, normalised(name, rows[testing].reshape(-1, 3, 32, 32)))
    assert train.target.tolist() == [label for part in training for label in labels[part]]
    assert test.target.tolist() == labels[testing]
    assert (train.images.dtype, train.target.dtype) == (torch.float32, torch.int64)
    assert train.images.is_contiguous()


def test_torchvision_finds_fashion_mnist_unpacked(fashion, stand_in, tmp_path):
    """It reads a temporary folder, and nothing is written into the data's."""
    stand_in.data.update({True: fashion["train"], False: fashion["t10k"]})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    train, test = datasets.load("fashion-mnist", tmp_path)
    for split, (images, labels) in ((train, fashion["train"]), (test, fashion["t10k"])):
        torch.testing.assert_close(split.images, normalised("fashion-mnist", images[:, None]))
        assert (split.target.dtype, split.target.tolist()) == (torch.int64, labels.tolist())
    files = {f"FashionMNIST/raw/{path.stem}": gzip.decompress(content) for path, content in before.items()}
    assert [(call[0], *call[2:]) for call in stand_in.calls] == [
        ("FashionMNIST", train, False, files) for train in (True, False)
    ]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not any(root.exists() or root.is_relative_to(tmp_path) for _, root, *_ in stand_in.calls)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_torchvision_finds_cifar_unpacked(name, write_cifar, stand_in, tmp_path):
    members, _, _ = write_cifar(name)
    images = integers(256, 4, 32, 32, 3)  # channels last, as torchvision has them
    stand_in.data.update({True: (images, [1, 2, 3, 4]), False: (images[:1], [5])})
    train, test = datasets.load(name, tmp_path)
    torch.testing.assert_close(train.images, normalised(name, images.transpose(0, 3, 1, 2)))
    assert train.images.is_contiguous()
    assert (train.target.tolist(), test.target.tolist()) == ([1, 2, 3, 4], [5])
    assert [call[0] for call in stand_in.calls] == [name.upper()] * 2
    assert all(call[4] == members for call in stand_in.calls)


def test_root_folder_of_torchvision(fashion, stand_in, tmp_path):
    """Its archives may lie where torchvision's own download leaves them."""
    stand_in.data.update({True: fashion["train"], False: fashion["t10k"]})
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in [path for path in tmp_path.iterdir() if path.is_file()]:
        path.rename(raw / path.name)
    assert len(datasets.load("fashion-mnist", tmp_path)[0].target) == 7
    path = raw / LABELS.format("t10k")
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused("fashion-mnist", tmp_path, f"{path} is not the official file")


def assert_refused(name, folder, *messages):
    with pytest.raises(DatasetError) as caught:
        datasets.load(name, folder)
    text = str(caught.value)
    assert "\n" not in text
    for message in messages:
        assert message in text


@pytest.mark.parametrize(
    ("name", "file", "url"),
    [
        ("fashion-mnist", "train-images-idx3-ubyte.gz", "fashion-mnist.s3-website.eu-central-1.amazonaws.com"),
        ("cifar10", "cifar-10-python.tar.gz", "www.cs.toronto.edu/~kriz"),
        ("cifar100", "cifar-100-python.tar.gz", "www.cs.toronto.edu/~kriz"),
    ],
)
def test_missing_and_unofficial_files(name, file, url, tmp_path):
    assert_refused(name, tmp_path, f"{tmp_path / file} is missing: download http", f"{url}/{file}", "--data-dir")
    assert_refused(name, tmp_path / "nowhere", f"{tmp_path / 'nowhere' / file} is missing")
    (tmp_path / file).write_bytes(b"something else")
    found = hashlib.md5(b"something else").hexdigest()
    (official,) = (md5 for place, md5 in DATASETS[name].md5.items() if Path(place).name == file)
    assert_refused(
        name, tmp_path, f"{tmp_path / file} is not the official file, or not all of it (md5 {found}, not {official})",
        f"{url}/{file} again",
    )  # fmt: skip
    (tmp_path / file).unlink()
    (tmp_path / file).mkdir()
    assert_refused(name, tmp_path, f"{tmp_path / file} cannot be read: Is a directory")


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
@pytest.mark.parametrize("name", ["fashion-mnist", "cifar100"])
def test_damaged_archives(name, share, fashion, write_cifar, stand_in, tmp_path):
    """One that is cut off, or has one bit changed, is refused before it is unpacked."""
    write_cifar("cifar100")
    path = tmp_path / {"fashion-mnist": IMAGES.format("t10k"), "cifar100": "cifar-100-python.tar.gz"}[name]
    content = path.read_bytes()
    place = int(share * len(content))
    for damaged in (content[:place], content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]):
        path.write_bytes(damaged)
        assert_refused(name, tmp_path, f"{path} is not the official file, or not all of it")
    assert not stand_in.calls


def test_full_disk(fashion, stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert_refused("fashion-mnist", tmp_path, "train-images-idx3-ubyte.gz cannot be unpacked: ", "nowhere")


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("digits", "sklearn", "images"), ("mnist1d", "mnist1d", "mnist1d"), ("fashion-mnist", "torchvision", "images")],
)
def test_missing_package(name, package, extra, fashion, tmp_path, monkeypatch):
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    assert_refused(name, tmp_path, f"{package} is missing: pip install 'mixfeat[{extra}]'")


def test_torchvision_for_another_torch(fashion, tmp_path, monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(importlib, "import_module", broken)
    message = f"torchvision cannot be imported with torch {torch.__version__}: operator torchvision::nms does not exist"
    assert_refused("fashion-mnist", tmp_path, message)
