"""The readers of image data sets, on tiny files of the official formats made here, whole and damaged in every way."""

import gzip
import hashlib
import io
import pickle
import random
import struct
import sys
import tarfile

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


def sums(folder):
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def load(name, folder):
    return datasets.load(name, folder, md5=sums(folder))


def normalised(name, images):
    mean, std = (np.array(values)[:, None, None] for values in (DATASETS[name].mean, DATASETS[name].std))
    return torch.from_numpy((images / 255 - mean) / std).float()


@pytest.fixture
def fashion(tmp_path):
    """The files of a tiny Fashion-MNIST in the test's folder, and what they hold."""
    parts = {part: (integers(256, n, 28, 28), integers(10, n))
             for part, n in (("train", 7), ("t10k", 4))}  # fmt: skip
    for part, (images, labels) in parts.items():
        (tmp_path / IMAGES.format(part)).write_bytes(idx(images))
        (tmp_path / LABELS.format(part)).write_bytes(idx(labels))
    return parts


def cifar_members(name, labels=None):
    prefix, parts, key = {
        "cifar10": ("cifar-10-batches-py/", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], "labels"),
        "cifar100": ("cifar-100-python/", ["train", "test"], "fine_labels"),
    }[name]
    rows = {part: integers(256, 3, 3072) for part in parts}
    classes = {part: labels or integers(DATASETS[name].num_classes, 3).tolist() for part in parts}
    members = {prefix + part: python2_pickle(rows[part], key, classes[part]) for part in parts}
    return members, rows, classes


def write_cifar(folder, name, members):
    (folder / f"cifar-{name.removeprefix('cifar')}-python.tar.gz").write_bytes(archive(members))


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


def test_fashion_mnist(fashion, tmp_path):
    for split, (images, labels) in zip(load("fashion-mnist", tmp_path), fashion.values(), strict=True):
        torch.testing.assert_close(split.images, normalised("fashion-mnist", images[:, None]))
        assert split.images.dtype == torch.float32
        assert split.target.tolist() == labels.tolist()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name, tmp_path):
    members, rows, labels = cifar_members(name)
    write_cifar(tmp_path, name, members)
    train, test = load(name, tmp_path)
    *training, testing = rows
    expected = np.concatenate([rows[part] for part in training]).reshape(-1, 3, 32, 32)
    torch.testing.assert_close(train.images, normalised(name, expected))
    torch.testing.assert_close(test.images, normalised(name, rows[testing].reshape(-1, 3, 32, 32)))
    assert train.target.tolist() == [label for part in training for label in labels[part]]
    assert test.target.tolist() == labels[testing]
    assert train.images.dtype == torch.float32


def test_nothing_is_written(fashion, tmp_path):
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    load("fashion-mnist", tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def assert_refused(name, folder, *messages, md5=None):
    with pytest.raises(DatasetError) as caught:
        datasets.load(name, folder, md5=sums(folder) if md5 is None else md5)
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
    assert_refused(name, tmp_path / "nowhere", f"{tmp_path / 'nowhere' / file} is missing", md5={})
    (tmp_path / file).write_bytes(b"something else")
    found = hashlib.md5(b"something else").hexdigest()
    official = DATASETS[name].md5[file]
    assert_refused(
        name, tmp_path, f"{tmp_path / file} is not the official file, or not all of it (md5 {found}, not {official})",
        f"{url}/{file} again", md5={},
    )  # fmt: skip
    (tmp_path / file).unlink()
    (tmp_path / file).mkdir()
    assert_refused(name, tmp_path, f"{tmp_path / file} cannot be read: Is a directory", md5={})


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("digits", "sklearn", "images"), ("mnist1d", "mnist1d", "mnist1d")]
)
def test_missing_package(name, package, extra, tmp_path, monkeypatch):
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    assert_refused(name, tmp_path, f"{package} is missing: pip install 'mixfeat[{extra}]'")


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.5, 0.9])
@pytest.mark.parametrize("name", ["fashion-mnist", "cifar100"])
def test_truncated_files(name, share, fashion, tmp_path):
    """Whoever vouches for its checksum, part of a file is refused."""
    write_cifar(tmp_path, "cifar100", cifar_members("cifar100")[0])
    path = tmp_path / {"fashion-mnist": IMAGES.format("t10k"), "cifar100": "cifar-100-python.tar.gz"}[name]
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert_refused(name, tmp_path, f"{path} is not of the format of {name}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not compressed", "Not a gzipped file"),
        (gzip.compress(b""), "no idx file of 3 dimensions of bytes"),
        (gzip.compress(b"\0\0\x0d\3" + bytes(100)), "no idx file of 3 dimensions of bytes"),
        (idx(np.zeros((4, 28), np.uint8)), "no idx file of 3 dimensions of bytes"),
        (gzip.compress(gzip.decompress(idx(np.zeros((4, 28, 28), np.uint8)))[:-1]), "3135 values, not 4 x 28 x 28"),
        (gzip.compress(gzip.decompress(idx(np.zeros((4, 28, 28), np.uint8))) + b"\0"), "3137 values, not 4 x 28 x 28"),
        (gzip.compress(b"\0\0\x08\3" + b"\xff" * 12), "0 values, not 4294967295 x 4294967295 x 4294967295"),
    ],
)
def test_no_idx_files(content, message, fashion, tmp_path):
    path = tmp_path / IMAGES.format("t10k")
    path.write_bytes(content)
    assert_refused("fashion-mnist", tmp_path, f"{path} is not of the format of fashion-mnist: ", message)


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        (IMAGES, np.zeros((3, 28, 28), np.uint8), "3 images but 4 labels"),
        (IMAGES, np.zeros((4, 28, 27), np.uint8), "images of 1 x 28 x 27, not 1 x 28 x 28"),
        (LABELS, np.array([0, 1, 2, 10], np.uint8), "labels from 0 to 10, not from 0 to 9"),
    ],
)
def test_files_that_do_not_fit(file, array, message, fashion, tmp_path):
    (tmp_path / file.format("t10k")).write_bytes(idx(array))
    assert_refused("fashion-mnist", tmp_path, f"{tmp_path} does not hold fashion-mnist: {message}")


def test_no_images(tmp_path, fashion):
    (tmp_path / IMAGES.format("t10k")).write_bytes(idx(np.zeros((0, 28, 28), np.uint8)))
    (tmp_path / LABELS.format("t10k")).write_bytes(idx(np.zeros(0, np.uint8)))
    assert_refused("fashion-mnist", tmp_path, "does not hold fashion-mnist: no images")


GOOD = python2_pickle(np.zeros((2, 3072), np.uint8), "fine_labels", [0, 1])


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('run')",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Ran out of input"),
        (GOOD[: len(GOOD) // 2], "pickle data was truncated"),
        (GOOD[:40], ""),
        (b"text", ""),
        (pickle.dumps([1]), "has no data and fine_labels"),
        (pickle.dumps({"data": 1}), "has no data and fine_labels"),
        (pickle.dumps({"data": [1], "fine_labels": [1]}), "has no rows of 3072 bytes"),
        (python2_pickle(np.zeros((2, 3071), np.uint8), "fine_labels", [0, 1]), "has no rows of 3072 bytes"),
        (GOOD.replace(b"](K\0K\1e", b"](K\0Ne"), "has no list of integers as fine_labels"),
        (pickle.dumps(Malicious()), "asks for builtins.exec, which is not data"),
        (b"cos\nsystem\n(S'exit 1'\ntR.", "asks for os.system, which is not data"),
        (b"cnumpy\nload\n(S'x'\ntR.", "asks for numpy.load, which is not data"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.", "asks for numpy.ndarray.dumps, which is not data"),
    ],
)
def test_pickles_that_are_not_the_data(content, message, tmp_path):
    members, _, _ = cifar_members("cifar100")
    write_cifar(tmp_path, "cifar100", {**members, "cifar-100-python/test": content})
    path = tmp_path / "cifar-100-python.tar.gz"
    assert_refused("cifar100", tmp_path, f"{path} is not of the format of cifar100: ", message)


def test_archives_that_are_not_the_data(tmp_path):
    members, _, _ = cifar_members("cifar100")
    path = tmp_path / "cifar-100-python.tar.gz"
    write_cifar(tmp_path, "cifar100", {"cifar-100-python/train": members["cifar-100-python/train"]})
    assert_refused("cifar100", tmp_path, f"{path} is not of the format of cifar100: ", "cifar-100-python/test")
    path.write_bytes(gzip.compress(b"no archive" * 100))
    assert_refused("cifar100", tmp_path, f"{path} is not of the format of cifar100: ")
    with tarfile.open(path, "w:gz") as tar:
        folder = tarfile.TarInfo("cifar-100-python/train")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert_refused("cifar100", tmp_path, "cifar-100-python/train is no file")


def test_labels_out_of_range(tmp_path):
    write_cifar(tmp_path, "cifar10", cifar_members("cifar10", labels=[0, 10, 1])[0])
    assert_refused("cifar10", tmp_path, f"{tmp_path} does not hold cifar10: labels from 0 to 10, not from 0 to 9")
