"""The multi-view distribution, held to its definition by recovering every coefficient from the patches; images."""

import pickle

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

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


@pytest.mark.gpu
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
            "features must be a floating-point tensor, got torch.int",
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
    ("shape", "size"),
    [((2, 3, 8, 8), 4), ((1, 1, 6, 4), 2), ((3, 2, 5, 5), 1), ((0, 3, 4, 4), 4), ((2, 2, 3, 8), (3, 2))],
)
def test_images_to_patches_tiles(shape, size):
    images = torch.arange(torch.Size(shape).numel()).view(shape).transpose(2, 3).contiguous().transpose(2, 3)
    patches = mf.data.images_to_patches(images, size)
    down, right = size if isinstance(size, tuple) else (size, size)
    rows, columns = shape[2] // down, shape[3] // right
    assert patches.shape == (shape[0], rows * columns, shape[1] * down * right)
    for i in range(rows):
        for j in range(columns):
            tile = images[:, :, i * down : (i + 1) * down, j * right : (j + 1) * right]
            assert torch.equal(patches[:, i * columns + j], tile.flatten(1))


@pytest.mark.parametrize(
    ("images", "size", "error", "message"),
    [
        (torch.zeros(3, 8, 8), 4, ValueError, r"images must have 4 dimensions .* got shape \(3, 8, 8\)"),
        ([1], 4, TypeError, "images must be a tensor, got list"),
        (torch.zeros(1, 3, 8, 9), 4, ValueError, "patch_size must divide .* got 4 for 8 x 9"),
        (torch.zeros(1, 3, 8, 8), 0, ValueError, "patch_size must be at least 1, got 0"),
        (torch.zeros(1, 3, 8, 8), (4, 3), ValueError, r"patch_size must divide .* got \(4, 3\) for 8 x 8"),
        (torch.zeros(1, 3, 8, 8), (4, 0), ValueError, "patch_size must be at least 1, got 0"),
        (torch.zeros(1, 3, 8, 8), (4, 4, 4), TypeError, r"patch_size must be an integer, got \(4, 4, 4\)"),
        (torch.zeros(1, 3, 8, 8), 4.0, TypeError, "patch_size must be an integer, got 4.0"),
    ],
)
def test_images_to_patches_bad_arguments(images, size, error, message):
    with pytest.raises(error, match=message):
        mf.data.images_to_patches(images, size)


# two features per class


def image_set(num_classes=4, per_class=6, channels=2, dtype=torch.float64):
    """Images that tell which one they are: image i is i + 1 everywhere; classes in random order."""
    target = torch.arange(num_classes).repeat(per_class)[torch.randperm(num_classes * per_class)]
    images = torch.arange(1, len(target) + 1).view(-1, 1, 1, 1).expand(-1, channels, 3, 2).to(dtype)
    return images * torch.tensor([1.0, -1.0, 0.5])[:channels, None, None].to(dtype), target


def test_two_features_are_those_of_the_formulas():
    """Pairing of classes, weights w and 1 - w, label; and mixing with a partner that has a w of its own."""
    images, target = image_set()
    data = mf.data.TwoFeatureImages(images, target)
    index = torch.randint(len(target), (500,))
    input, label = data.batch(index)
    assert input.shape == (500, 4, 3, 2)
    assert input.dtype == torch.float64
    weights = []
    for n, i in enumerate(index.tolist()):
        c = int(target[i])
        assert label[n] == c
        mate = int(data.partner_class[c])
        assert mate != c
        assert data.partner_class[mate] == c
        w = (input[n, 0, 0, 0] / images[i, 0, 0, 0]).item()
        extra = round((input[n, 2, 0, 0] / (1 - w)).item()) - 1  # which image the second half shows
        assert target[extra] == mate
        assert extra == data.partner[i]
        expected = torch.cat([w * images[i], (1 - w) * images[extra]])
        torch.testing.assert_close(input[n], expected)
        weights.append(w)
    weights = torch.tensor(weights)
    assert 0 <= weights.min() < 0.1
    assert 0.9 < weights.max() <= 1
    assert len(weights.unique()) > 450  # drawn for each sample
    assert not torch.equal(data.batch(index)[0], input)  # and at each access

    partner, lam = torch.randint(len(target), (500,)), 0.3
    other, other_label = data.batch(partner)
    both = torch.cat([input, other])
    mixed = mf.mixup(both, torch.arange(1000).roll(500), lam)[:500]
    w, v = (x[:, 0, 0, 0] / images[i, 0, 0, 0] for x, i in ((input, index), (other, partner)))
    for n in range(500):
        i, j = index[n], partner[n]
        first = lam * w[n] * images[i] + (1 - lam) * v[n] * images[j]
        second = lam * (1 - w[n]) * images[data.partner[i]] + (1 - lam) * (1 - v[n]) * images[data.partner[j]]
        torch.testing.assert_close(mixed[n], torch.cat([first, second]))
    logits = torch.randn(500, 4, dtype=torch.float64)
    log_probability = logits.log_softmax(1)
    row = torch.arange(500)
    expected = -(lam * log_probability[row, label] + (1 - lam) * log_probability[row, other_label]).mean()
    torch.testing.assert_close(mf.mixup_cross_entropy(logits, label, other_label, lam), expected)


@pytest.mark.parametrize("weight", [(0.0, 1.0), (0.5, 1.0), (0.25, 0.25)])
def test_weights_are_uniform(weight):
    images, target = image_set(2, 1)
    input, _ = mf.data.TwoFeatureImages(images, target, weight=weight).batch(torch.zeros(4000, dtype=torch.int64))
    low, high = weight
    w = (input[:, 0, 0, 0].sort().values - low) / (high - low or 1)
    if low == high:
        assert torch.equal(w, torch.zeros_like(w))
        return
    assert (w - torch.linspace(0, 1, 4000)).abs().max() < 2.2 / 4000**0.5  # Kolmogorov and Smirnov, p < 1e-4


def test_every_pairing_and_every_image_of_a_class_is_as_likely():
    images, target = image_set(4, 5)
    pairings = torch.stack([mf.data.TwoFeatureImages(images, target, views=0).partner_class for _ in range(600)])
    assert (pairings[:, 0].bincount(minlength=4)[1:] - 200).abs().max() < 6 * (600 * 2 / 9) ** 0.5
    images, target = image_set(2, 5)
    partners = torch.stack([mf.data.TwoFeatureImages(images, target).partner for _ in range(600)])
    for i in range(10):
        counts = partners[:, i].bincount(minlength=10)
        assert (counts[target == target[i]] == 0).all()
        assert (counts[target != target[i]] - 120).abs().max() < 6 * (600 * 4 / 25) ** 0.5


def test_single_features_of_test_images():
    train = mf.data.TwoFeatureImages(*image_set(6))
    images, target = image_set(6, 3)
    first = mf.data.TwoFeatureImages(images, target, views=0, partner_class=train.partner_class)
    second = mf.data.TwoFeatureImages(images, target, views=1, partner_class=train.partner_class)
    index = torch.arange(18)
    input, label = first.batch(index)
    assert torch.equal(input, torch.cat([images, torch.zeros_like(images)], 1))
    assert torch.equal(label, target)
    input, label = second.batch(index)
    assert torch.equal(label, target)
    assert torch.equal(input[:, :2], torch.zeros_like(images))
    assert torch.equal(input[:, 2:], images[second.partner])
    assert torch.equal(target[second.partner], train.partner_class[target])
    # the first feature needs no other class
    some = target < 3
    assert len(mf.data.TwoFeatureImages(images[some], target[some], views=0, partner_class=train.partner_class)) == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_features_in_the_dtype_of_the_images(dtype):
    images, target = image_set(dtype=dtype)
    input, _ = mf.data.TwoFeatureImages(images, target).batch(torch.zeros(1000, dtype=torch.int64))
    assert input.dtype == dtype
    # weights are drawn in float32: a uniform bfloat16 has 256 values
    assert len((input[:, 0, 0, 0] / images[0, 0, 0, 0]).unique()) > 300


def test_access_to_two_features():
    images, target = image_set()
    data = mf.data.TwoFeatureImages(images, target, views=1)
    everything, labels = data.batch(torch.arange(24))
    assert len(data) == 24
    for index, rows in ((slice(2, 9, 3), [2, 5, 8]), ([3, 3], [3, 3]), (torch.tensor([-1]), [23]), ([], [])):
        assert torch.equal(data[index][0], everything[rows])
        assert torch.equal(data[index][1], labels[rows])
    input, label = data[-2]
    assert torch.equal(input, everything[22])
    assert label == labels[22]
    assert label.shape == ()
    assert [label for _, label in data] == labels.tolist()  # iteration ends
    assert data.batch(torch.empty(0, dtype=torch.int64))[0].shape == (0, 4, 3, 2)


def test_two_features_through_a_data_loader():
    images, target = image_set()
    data = mf.data.TwoFeatureImages(images, target, views=1)
    whole = DataLoader(data, sampler=BatchSampler(RandomSampler(data), 7, drop_last=False), batch_size=None)
    for loader in (DataLoader(data, batch_size=7, shuffle=True), whole):
        batches = list(loader)
        assert [len(label) for _, label in batches] == [7, 7, 7, 3]
        inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.equal(labels.sort().values, target.sort().values)
        assert torch.equal(inputs.unique(dim=0), data.batch(torch.arange(24))[0].unique(dim=0))


def test_two_features_repeat_by_generator():
    images, target = image_set()

    def draw(seed):
        data = mf.data.TwoFeatureImages(images, target, generator=torch.Generator().manual_seed(seed))
        return data.partner_class, data.partner, data.batch(torch.arange(24))[0]

    before = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(draw(1), draw(1), strict=True))
    assert not torch.equal(draw(1)[2], draw(2)[2])
    assert torch.equal(before, torch.get_rng_state())
    # the pairing is drawn first: a view of other images has the same one
    data = mf.data.TwoFeatureImages(*image_set(4, 2), views=0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(data.partner_class, draw(1)[0])
    copied = pickle.loads(pickle.dumps(mf.data.TwoFeatureImages(images, target)))
    assert torch.equal(copied.batch(torch.arange(24))[1], target)


@pytest.mark.gpu
def test_two_features_wait_for_no_gpu():
    images, target = (x.cuda() for x in image_set(dtype=torch.float32))
    data = mf.data.TwoFeatureImages(images, target, generator=torch.Generator("cuda").manual_seed(0))
    index = torch.arange(24, device="cuda")
    data.batch(index)
    torch.cuda.set_sync_debug_mode("error")
    try:
        input, _ = data.batch(index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert input.is_cuda


IMAGES, TARGET = torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": [1]}, TypeError, "images must be a tensor, got list"),
        ({"images": torch.zeros(4, 2, 2)}, ValueError, r"images must have 4 dimensions .* got shape \(4, 2, 2\)"),
        ({"images": IMAGES.byte()}, TypeError, "images must be of a floating-point type, got torch.uint8: normalise"),
        ({"target": [0, 1, 2, 3]}, TypeError, "target must be an int64 tensor, got list"),
        ({"target": TARGET.float()}, TypeError, "target must be an int64 tensor, got torch.float32"),
        ({"target": TARGET[:3]}, ValueError, r"target must be of shape \(4,\), one class per image, got \(3,\)"),
        ({"target": TARGET - 1}, ValueError, "target must not be negative, got -1"),
        ({"target": TARGET.to("meta")}, ValueError, "target must be on images' device cpu, got meta"),
        ({"target": TARGET.clamp(max=2)}, ValueError, "target must have an even number of classes, .* got 3"),
        ({"views": 2}, ValueError, 'views must be "both", 0 or 1, got 2'),
        ({"weight": 0.5}, TypeError, r"weight must be a pair \(low, high\), got 0.5"),
        ({"weight": (0.5, 1.5)}, ValueError, r"weight must be within \[0, 1\], got \(0.5, 1.5\)"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
        ({"partner_class": [1, 0, 3, 2]}, TypeError, "partner_class must be an int64 tensor, got list"),
        ({"partner_class": torch.tensor([1, 0])}, ValueError, r"partner_class must be of shape \(C,\), C at least 4"),
        ({"partner_class": torch.tensor([1, 2, 3, 0])}, ValueError, "partner_class must pair .* got .1, 2, 3, 0."),
        ({"partner_class": torch.tensor([0, 1, 3, 2])}, ValueError, "partner_class must pair each class with another"),
        ({"partner_class": torch.tensor([1, 0, 4, 2])}, ValueError, "partner_class must pair"),
        (
            {"partner_class": torch.tensor([1, 0, 3, 2, 5, 4])},
            ValueError,
            "target must have images of every class, got none of class 4",
        ),
    ],
)
def test_two_features_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        mf.data.TwoFeatureImages(**{"images": IMAGES, "target": TARGET, **changes})


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (torch.zeros(1), TypeError, "index must be an int64 tensor, got torch.float32"),
        (torch.zeros(1, 1, dtype=torch.int64), ValueError, r"index must be of shape \(B,\), got \(1, 1\)"),
        (torch.tensor([4]), IndexError, "4"),
        (4, IndexError, "4"),
        (-5, IndexError, "-5"),
        ("a", TypeError, "index must be an integer"),
        (1.5, TypeError, "index must be an integer, got 1.5"),
    ],
)
def test_two_features_bad_index(index, error, message):
    with pytest.raises(error, match=message):
        mf.data.TwoFeatureImages(IMAGES, TARGET)[index]


# the options of Allen-Zhu and Li


@pytest.mark.parametrize("positions", ["random", "fixed"])
def test_patches_per_feature_and_positions(positions):
    data = mf.data.multi_view(300, 4, 11, patches_per_feature=3, positions=positions, dtype=torch.float64)
    own, _ = split(data)
    present = own.abs() > 1e-9
    assert (present.sum(1) == 3).all()  # each view in three patches
    assert (present.sum(2) <= 1).all()
    torch.testing.assert_close(own.sum((1, 2)), torch.full((300,), 0.75, dtype=torch.float64))
    for view in (0, 1):
        value = own[..., view][present[..., view]].view(300, 3)
        torch.testing.assert_close(value, value[:, :1].expand(300, 3))
    if positions == "fixed":
        assert present[:, :3, 0].all()
        assert present[:, 3:6, 1].all()
    else:
        assert (present.any(2).double().mean(0) - 6 / 11).abs().max() < 6 * (0.25 / 300) ** 0.5


def test_a_share_of_samples_carries_one_view():
    own, _ = split(mf.data.multi_view(2000, 3, 5, single_view=0.4, dtype=torch.float64))
    count = (own.abs() > 1e-9).sum(1)  # (N, 2)
    assert (count.sum(1) == 2).all()
    both, first, second = (torch.tensor(c) for c in ([1, 1], [2, 0], [0, 2]))
    for kind, share in ((both, 0.6), (first, 0.2), (second, 0.2)):
        assert abs((count == kind).all(1).double().mean() - share) < 6 * 0.5 / 2000**0.5
    torch.testing.assert_close(own.sum((1, 2)), torch.full((2000,), 0.75, dtype=torch.float64))


@pytest.mark.parametrize("positions", ["random", "fixed"])
def test_features_of_other_classes(positions):
    options = {"off_class": 0.3, "off_class_signal": (0.2, 0.4), "noise_scale": 0.0, "patches_per_feature": 2}
    data = mf.data.multi_view(1000, 3, 13, positions=positions, dtype=torch.float64, **options)
    _, other = split(data)
    present = other.abs() > 1e-9
    assert (present.sum((2, 3)) <= 1).all()  # no patch holds two
    count = present.sum(1)
    assert set(count.unique().tolist()) == {0, 2}
    assert abs((count > 0).double().mean() - 0.3) < 6 * (0.21 / 4000) ** 0.5
    total = other.sum(1)[count > 0]
    assert total.min() >= 0.2 - 1e-9
    assert total.max() <= 0.4 + 1e-9
    assert abs(total.mean() - 0.3) < 6 * 0.2 / 12**0.5 / len(total) ** 0.5


def test_gaussian_noise_in_patches():
    def draw(noise_std):
        return mf.data.multi_view(50, 3, 5, 40, noise_std=noise_std, generator=torch.Generator().manual_seed(3)).input

    noise = (draw(0.3) - draw(0.0)) / 0.3
    assert abs(noise.mean()) < 6 / noise.numel() ** 0.5
    assert abs(noise.var() - 1) < 6 * (2 / noise.numel()) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_patches": 5, "patches_per_feature": 3}, "num_patches must be at least 6, .* got 5"),
        ({"num_patches": 19, "off_class": 0.1}, "num_patches must be at least 20, .* got 19"),
        ({"single_view": 1.5}, r"single_view must be in \[0, 1\], got 1.5"),
        ({"single_view": 0.5, "views": 0}, 'single_view needs views="both", got 0.5 with views=0'),
        ({"off_class": -0.5}, r"off_class must be in \[0, 1\], got -0.5"),
        ({"off_class_signal": (1, 0)}, r"off_class_signal must have low <= high, got \(1.0, 0.0\)"),
        ({"noise_std": -1.0}, "noise_std must be at least 0, got -1.0"),
        ({"positions": "first"}, 'positions must be "random" or "fixed", got \'first\''),
    ],
)
def test_bad_options_of_multi_view(arguments, message):
    with pytest.raises(ValueError, match=message):
        mf.data.multi_view(4, **arguments)


# signal and noise


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("xor", [False, True])
def test_signal_noise(xor, given):
    """Signals, noise and labels held to their definition, and the statistics of all that is drawn."""
    options = {"signal": 2.0, "noise_std": 0.5, "xor": xor, "flip": 0.2, "dtype": torch.float64}
    train = mf.data.signal_noise(2000, 30, 3, **options)
    data = mf.data.signal_noise(2000, 30, 3, **options, features=train.features) if given else train
    views = 2 if xor else 1
    assert data.input.shape == (2000, 3, 30)
    assert data.features.shape == (2, views, 30)
    assert data.noise.shape == (2000, 2, 30)
    assert not given or torch.equal(data.features, train.features)
    flat = data.features.flatten(0, 1)
    torch.testing.assert_close(flat.norm(dim=1), torch.full((2 * views,), 2.0, dtype=torch.float64))
    if xor:
        torch.testing.assert_close(data.features[:, 0], -data.features[:, 1])
        assert abs(data.features[0, 0] @ data.features[1, 0]) < 1e-9
    else:
        torch.testing.assert_close(data.features[0], -data.features[1])
    distance = (data.input[:, :, None] - flat).norm(dim=-1)  # (N, P, 2 V)
    found = distance < 1e-9
    assert (found.sum((1, 2)) == 1).all()
    _, place, which = found.nonzero(as_tuple=True)
    assert torch.equal(which // views, data.clean_target)
    assert (place.bincount() / 2000 - 1 / 3).abs().max() < 6 * (2 / 9 / 2000) ** 0.5
    assert (which.bincount() / 2000 - 0.5 / views).abs().max() < 6 * (0.25 / 2000) ** 0.5
    assert data.clean_target.sum() == 1000
    flipped = (data.target != data.clean_target).double().mean()
    assert abs(flipped - 0.2) < 6 * (0.16 / 2000) ** 0.5
    rest = data.input[~found.any(2)].view(2000, 2, 30)
    torch.testing.assert_close(rest.sum(1), data.noise.sum(1))  # the noise patches, in some order
    assert (data.noise @ flat.T).abs().max() < 1e-9
    variance = data.noise.square().mean() / 0.25
    degrees = (30 - views) / 30
    assert abs(variance - degrees) < 6 * (2 * degrees / data.noise.numel()) ** 0.5


def test_signal_noise_at_a_fixed_position_and_without_noise():
    data = mf.data.signal_noise(9, 4, positions="fixed", noise_std=0.0)
    assert torch.equal(data.input[:, 0], data.features[data.target, 0])
    assert torch.equal(data.input[:, 1:], torch.zeros(9, 1, 4))
    assert mf.data.signal_noise(0, 3).input.shape == (0, 2, 3)


@pytest.mark.parametrize("draw", [mf.data.signal_noise, mf.data.common_rare])
def test_draws_are_the_generators(draw):
    before = torch.get_rng_state()
    first, again, other = (draw(8, 9, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.input, other.input)
    assert torch.equal(before, torch.get_rng_state())
    half = draw(8, 9, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16)
    assert torch.equal(half.input, first.input.bfloat16())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_samples": -1}, ValueError, "num_samples must be at least 0, got -1"),
        ({"patch_dim": 1}, ValueError, "patch_dim must be at least 2, got 1"),
        ({"patch_dim": 2, "xor": True}, ValueError, "patch_dim must be at least 3, got 2"),
        ({"num_patches": 1}, ValueError, "num_patches must be at least 2, got 1"),
        ({"signal": 0.0}, ValueError, "signal must be"),
        ({"noise_std": -1}, ValueError, "noise_std must be at least 0"),
        ({"xor": 1}, TypeError, "xor must be"),
        ({"flip": 2}, ValueError, r"flip must be in \[0, 1\], got 2"),
        ({"positions": 0}, ValueError, 'positions must be "random" or "fixed", got 0'),
        ({"features": torch.zeros(2, 2, 9)}, ValueError, r"features must be of shape \(2, 1, 9\), got \(2, 2, 9\)"),
        ({"features": torch.ones(2, 1, 9)}, ValueError, "features must be signals of both signs"),
        ({"features": torch.zeros(2, 1, 9)}, ValueError, "features must be signals of both signs"),
        (
            {"features": torch.ones(2, 2, 9) * torch.tensor([[1], [-1]]), "xor": True},
            ValueError,
            "features must be those of two orthogonal vectors",
        ),
    ],
)
def test_bad_arguments_of_signal_noise(arguments, error, message):
    with pytest.raises(error, match=message):
        mf.data.signal_noise(**{"num_samples": 4, "patch_dim": 9, **arguments})


@pytest.mark.parametrize("positions", ["random", "fixed"])
def test_common_rare(positions):
    options = {"rare": 0.2, "signal": 2.0, "feature_noise": 0.3, "num_feature_noise": 2, "noise_std": 0.5}
    data = mf.data.common_rare(2000, 24, 6, **options, positions=positions, dtype=torch.float64)
    flat = data.features.flatten(0, 1)
    torch.testing.assert_close(flat @ flat.T, 4 * torch.eye(4, dtype=torch.float64))
    share = data.input @ flat.T / 4  # (N, P, 4)
    own = (share - 1).abs() < 1e-9
    assert (own.sum((1, 2)) == 1).all()
    _, place, which = own.nonzero(as_tuple=True)
    assert torch.equal(which, 2 * data.target + data.rare)
    assert data.target.sum() == 1000
    assert abs(data.rare.double().mean() - 0.2) < 6 * (0.16 / 2000) ** 0.5
    noise = (share - 0.3).abs() < 1e-9
    assert (noise.sum((1, 2)) == 2).all()
    assert not noise[..., 1::2].any()  # of the common features
    assert abs(noise[..., 0].sum() / 4000 - 0.5) < 6 * 0.5 / 4000**0.5
    if positions == "random":
        assert (place.bincount() / 2000 - 1 / 6).abs().max() < 6 * (5 / 36 / 2000) ** 0.5
    else:
        assert (place == 0).all()
        assert noise[:, 1:3].any(2).all()
    rest = data.input[~own.any(2) & ~noise.any(2)]
    assert rest.shape == (6000, 24)
    assert (rest @ flat.T).abs().max() < 1e-9
    assert abs(rest.square().mean() / 0.25 - 20 / 24) < 6 * (2 / rest.numel()) ** 0.5
    again = mf.data.common_rare(5, 24, 6, rare=1.0, features=data.features)
    assert torch.equal(again.features, data.features)
    assert again.rare.all()
    assert ((again.input @ data.features[again.target, 1, :, None]).amax((1, 2)) - 4).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"patch_dim": 4}, ValueError, "patch_dim must be at least 5, got 4"),
        ({"num_patches": 2, "num_feature_noise": 2}, ValueError, "num_patches must be at least 3, got 2"),
        ({"num_feature_noise": -1}, ValueError, "num_feature_noise must be at least 0, got -1"),
        ({"rare": 1.1}, ValueError, r"rare must be in \[0, 1\], got 1.1"),
        ({"feature_noise": -0.1}, ValueError, "feature_noise must be at least 0"),
        ({"features": torch.ones(2, 2, 9)}, ValueError, "features must be orthogonal and not 0"),
        ({"features": torch.zeros(2, 2, 9)}, ValueError, "features must be orthogonal and not 0"),
        ({"features": torch.ones(2, 1, 9)}, ValueError, r"features must be of shape \(2, 2, 9\)"),
        ({"dtype": torch.int64}, ValueError, "dtype must be a floating-point type"),
    ],
)
def test_bad_arguments_of_common_rare(arguments, error, message):
    with pytest.raises(error, match=message):
        mf.data.common_rare(**{"num_samples": 4, "patch_dim": 9, **arguments})
