"""The multi-view distribution, held to its definition by recovering every coefficient from the patches."""

import pytest
import torch

import mixfeat as mf


def coefficients(data):
    """(N, P, C, 2): how much of each feature is in each patch."""
    return torch.einsum("npd,cld->npcl", data.input.double(), data.features.double())


def split(data):
    """The coefficients of each sample's own features (N, P, 2), and of all others (N, P, C - 1, 2)."""
    c = coefficients(data)
    own = torch.nn.functional.one_hot(data.target, c.shape[2]).bool()
    num, patches, classes, _ = c.shape
    own_part = c.permute(0, 2, 1, 3)[own]
    return own_part, c.permute(0, 2, 1, 3)[~own].view(num, classes - 1, patches, 2).transpose(1, 2)


def test_shapes_types_and_defaults():
    data = mf.data.multi_view(7)
    assert data.input.shape == (7, 12, 20)
    assert data.target.shape == (7,)
    assert data.features.shape == (10, 2, 20)
    assert data.input.dtype == data.features.dtype == torch.float32
    assert data.target.dtype == torch.int64
    assert mf.data.multi_view(3, 4, 5, 11).input.shape == (3, 5, 11)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_features_are_orthonormal_and_random(dtype, tolerance):
    flat = mf.data.multi_view(1, 6, 2, 17, dtype=dtype).features.double().flatten(0, 1)
    assert (flat @ flat.T - torch.eye(12)).abs().max() < tolerance
    assert not torch.equal(mf.data.multi_view(1).features, mf.data.multi_view(1).features)


def test_signal_patches():
    data = mf.data.multi_view(500, 5, 6, 13, dtype=torch.float64)
    own, other = split(data)
    present = own.abs() > 1e-9
    assert (present.sum((1, 2)) == 2).all()  # one coefficient of each view, in two patches
    assert (present.sum(1) == 1).all()
    assert (present.sum(2) <= 1).all()
    torch.testing.assert_close(own.sum((1, 2)), torch.full((500,), 0.75, dtype=torch.float64))
    value = own.sum(1)
    assert value.min() >= 0.25 - 1e-9
    assert value.max() <= 0.5 + 1e-9
    assert abs(value[:, 0].mean().item() - 0.375) < 6 * 0.25 / 12**0.5 / 500**0.5
    torch.testing.assert_close(other[present.any(2)], torch.zeros(1000, 4, 2, dtype=torch.float64), atol=1e-9, rtol=0)
    position = present.any(2).double().mean(0)  # every position as often as any other: 1/3, 6 standard deviations
    assert (position - 1 / 3).abs().max() < 6 * (2 / 9 / 500) ** 0.5


def test_noise_patches():
    data = mf.data.multi_view(200, 5, 6, 13, noise=(0.2, 0.6), noise_scale=0.5, dtype=torch.float64)
    own, other = split(data)
    noise = other[~(own.abs() > 1e-9).any(2)]  # (200 * 4, C - 1, 2)
    assert len(noise) == 800
    assert noise.min() >= 0.1 - 1e-9
    assert noise.max() <= 0.3 + 1e-9
    assert abs(noise.mean().item() - 0.2) < 6 * 0.2 / 12**0.5 / noise.numel() ** 0.5
    assert len(noise.flatten().unique()) == noise.numel()  # drawn independently for each
    rest = data.input - torch.einsum("npcl,cld->npd", coefficients(data), data.features)
    assert rest.abs().max() < 1e-9  # and nothing outside the features' span


@pytest.mark.parametrize("view", [0, 1])
def test_single_view(view):
    own, _ = split(mf.data.multi_view(100, 5, 6, views=view, dtype=torch.float64))
    assert own[..., 1 - view].abs().max() < 1e-9
    assert ((own[..., view].abs() > 1e-9).sum(1) == 2).all()
    torch.testing.assert_close(own[..., view].sum(1), torch.full((100,), 0.75, dtype=torch.float64))


@pytest.mark.parametrize("num", [0, 1, 3, 10, 57])
def test_classes_are_balanced(num):
    data = mf.data.multi_view(num, 5, 2)
    counts = data.target.bincount(minlength=5)
    assert data.input.shape == (num, 2, 10)
    assert counts.max() - counts.min() <= 1
    assert counts.sum() == num


def test_order_of_classes_is_random():
    assert not torch.equal(mf.data.multi_view(100).target, mf.data.multi_view(100).target)


def test_generator_repeats():
    def draw(seed):
        return mf.data.multi_view(20, generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(draw(1), draw(1), strict=True))
    assert not torch.equal(draw(1).input, draw(2).input)
    assert torch.equal(before, torch.get_rng_state())  # all randomness is the generator's


def test_given_features():
    features = mf.data.multi_view(1, 3, 2, 9, dtype=torch.float64).features
    data = mf.data.multi_view(10, 3, features=features)
    assert torch.equal(data.features, features)
    assert data.input.shape == (10, 12, 9)
    assert data.input.dtype == torch.float64
    assert mf.data.multi_view(10, 3, features=features, dtype=torch.bfloat16).input.dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda():
    cpu = mf.data.multi_view(20, generator=torch.Generator().manual_seed(0))
    gpu = mf.data.multi_view(20, generator=torch.Generator().manual_seed(0), device="cuda")
    assert all(part.is_cuda for part in gpu)
    assert torch.equal(gpu.input.cpu(), cpu.input)
    assert mf.data.multi_view(20, generator=torch.Generator("cuda")).input.is_cuda


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_samples": -1}, ValueError, "num_samples must be at least 0, got -1"),
        ({"num_samples": 2.5}, TypeError, "num_samples must be an integer, got 2.5"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": True}, TypeError, "num_classes must be an integer, got True"),
        ({"num_patches": 1}, ValueError, "num_patches must be at least 2, got 1"),
        ({"patch_dim": 19}, ValueError, r"patch_dim must be at least 2 \* num_classes = 20, got 19"),
        ({"signal": 0.5}, TypeError, r"signal must be a pair \(low, high\), got 0.5"),
        ({"signal": (0.5, 0.25)}, ValueError, r"signal must have low <= high, got \(0.5, 0.25\)"),
        ({"noise": (0.5, float("nan"))}, ValueError, r"noise\[1\] must be finite, got nan"),
        ({"noise": ("a", 1)}, TypeError, r"noise\[0\] must be a number, got 'a'"),
        ({"noise_scale": -0.1}, ValueError, "noise_scale must be at least 0, got -0.1"),
        ({"noise_scale": float("inf")}, ValueError, "noise_scale must be finite, got inf"),
        ({"views": 2}, ValueError, 'views must be "both", 0 or 1, got 2'),
        ({"views": True}, ValueError, 'views must be "both", 0 or 1, got True'),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
        ({"dtype": torch.int64}, ValueError, "dtype must be a floating-point type, got torch.int64"),
        ({"dtype": "float32"}, TypeError, "dtype must be a torch.dtype, got 'float32'"),
        ({"features": 1}, TypeError, "features must be a tensor, got int"),
        (
            {"features": torch.zeros(10, 2, 20).int()},
            TypeError,
            "features must be of a floating-point type, got torch.int",
        ),
        ({"features": torch.eye(20)}, ValueError, r"features must be of shape \(10, 2, patch_dim\), got \(20, 20\)"),
        ({"features": torch.ones(10, 2, 20)}, ValueError, "features must be orthonormal to within 0.0001, got .* 20"),
        ({"features": torch.full((10, 2, 20), torch.nan)}, ValueError, "features must be orthonormal"),
        (
            {"features": torch.eye(20).view(10, 2, 20), "patch_dim": 21},
            ValueError,
            r"patch_dim must be that of features \(20\), got 21",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        mf.data.multi_view(**{"num_samples": 4, **arguments})


@pytest.mark.parametrize(
    ("shape", "size"), [((2, 3, 8, 8), 4), ((1, 1, 6, 4), 2), ((3, 2, 5, 5), 1), ((0, 3, 4, 4), 4)]
)
def test_images_to_patches_tiles(shape, size):
    images = torch.arange(torch.Size(shape).numel()).view(shape).transpose(2, 3).contiguous().transpose(2, 3)
    patches = mf.data.images_to_patches(images, size)
    rows, columns = shape[2] // size, shape[3] // size
    assert patches.shape == (shape[0], rows * columns, shape[1] * size**2)
    for i in range(rows):
        for j in range(columns):
            tile = images[:, :, i * size : (i + 1) * size, j * size : (j + 1) * size]
            assert torch.equal(patches[:, i * columns + j], tile.flatten(1))


@pytest.mark.parametrize(
    ("images", "size", "error", "message"),
    [
        (torch.zeros(3, 8, 8), 4, ValueError, r"images must have 4 dimensions .* got shape \(3, 8, 8\)"),
        ([1], 4, TypeError, "images must be a tensor, got list"),
        (torch.zeros(1, 3, 8, 9), 4, ValueError, "patch_size must divide .* got 4 for 8 x 9"),
        (torch.zeros(1, 3, 8, 8), 0, ValueError, "patch_size must be at least 1, got 0"),
        (torch.zeros(1, 3, 8, 8), 4.0, TypeError, "patch_size must be an integer, got 4.0"),
    ],
)
def test_images_to_patches_bad_arguments(images, size, error, message):
    with pytest.raises(error, match=message):
        mf.data.images_to_patches(images, size)
