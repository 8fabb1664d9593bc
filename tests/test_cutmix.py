"""cutmix and what draws its boxes, beyond what the table of operators covers."""

import math

import pytest
import torch
from torch.library import opcheck

import mixfeat as mf
from mixfeat import reference


def make_inputs(shape, device, dtype=torch.float32):
    x = torch.randn(shape).to(device, dtype)
    height, width = shape[2:]
    box = torch.tensor([height // 4, height - 1, width // 3, width], device=device)
    return x, torch.randint(shape[0], shape[:1], device=device), box


@pytest.mark.parametrize("boxes", ["one", "each"])
def test_bytes(backend, device, boxes):
    """Bytes are copied as they are, in any memory format."""
    x = torch.randint(256, (6, 3, 9, 7), dtype=torch.uint8, device=device)
    index, box = torch.tensor([5, 4, 3, 2, 1, 1], device=device), torch.tensor([2, 8, 0, 5], device=device)
    if boxes == "each":
        box = torch.stack([box, box * 0, box + box.new_tensor([0, 1, 1, 2]), box, box, box])
    for images in (x, x.contiguous(memory_format=torch.channels_last), torch.stack([x, x], -1)[..., 0]):
        z = mf.cutmix(images, index, box)
        assert z.dtype == torch.uint8
        assert torch.equal(z, reference.cutmix(x, index, box))


def test_memory_formats(backend, device):
    """channels_last stays channels_last, every other layout becomes contiguous; gradients likewise."""
    x, index, box = make_inputs((6, 4, 5, 3), device)
    layouts = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(-1, -2).contiguous().transpose(-1, -2),
        "sliced": torch.cat([x, x], -1)[..., 1:4],
        "one sample": x[:1].expand(6, 4, 5, 3),
        "one channel": x[:, :1].expand(6, 4, 5, 3),
    }
    for name, images in layouts.items():
        z = mf.cutmix(images, index, box)
        assert torch.equal(z, reference.cutmix(images, index, box))
        channels_last = name == "channels_last"
        assert z.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_edges(backend, device):
    """A box of nothing changes nothing, one of everything exchanges the images."""
    x, index, _ = make_inputs((5, 2, 6, 4), device)
    for box, expected in (([0, 0, 0, 4], x), ([3, 3, 2, 2], x), ([0, 6, 4, 4], x), ([0, 6, 0, 4], x[index])):
        assert torch.equal(mf.cutmix(x, index, torch.tensor(box, device=device)), expected)


@pytest.mark.parametrize("partner", [-1, 5, 2**40])
def test_index_out_of_range(backend, device, partner):
    x, index, box = make_inputs((5, 2, 6, 4), device)
    index[2] = partner
    if device.type == "cpu":
        with pytest.raises(IndexError, match=rf"index must lie in \[0, 5\), got {partner}"):
            mf.cutmix(x, index, box)
        return
    z, inside = mf.cutmix(x, index, box), reference.in_box(x, box)
    assert z[2, :, inside].isnan().all()
    assert torch.equal(z[2, :, ~inside], x[2, :, ~inside])


def test_opcheck(backend, device):
    x, index, box = make_inputs((5, 3, 4, 6), device)
    for images in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
        opcheck(torch.ops.mixfeat.cutmix.default, (images.clone().requires_grad_(), index, box * 0))
        opcheck(torch.ops.mixfeat.cutmix_backward.default, (images, index, box * 0))


X, INDEX, BOX = torch.zeros(4, 3, 5, 6), torch.zeros(4, dtype=torch.int64), torch.tensor([0, 2, 1, 3])


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (([1.0], INDEX, BOX), TypeError, "input must be a tensor, got list"),
        ((X.long(), INDEX, BOX), TypeError, r"input must be float32, .* or uint8, got torch\.int64"),
        ((X[0], INDEX, BOX), ValueError, r"input must have shape \(N,ch,H,W\), got \(3, 5, 6\)"),
        ((X, INDEX[:3], BOX), ValueError, r"index must have shape \(4,\), one partner for each sample, got \(3,\)"),
        ((X, INDEX.int(), BOX), TypeError, r"index must be an int64 tensor, got torch\.int32"),
        ((X, INDEX, [0, 1, 0, 1]), TypeError, "box must be an int64 tensor, got list"),
        ((X, INDEX, BOX.float()), TypeError, r"box must be an int64 tensor, got torch\.float32"),
        ((X, INDEX, BOX[:3]), ValueError, r"box must have shape \(4,\) or \(4,4\): y0, y1, x0, x1; got \(3,\)"),
        ((X, INDEX, BOX.to("meta")), ValueError, "box must be on input's device cpu, got meta"),
        ((X, INDEX, BOX + 4), ValueError, r"box must have 0 <= y0 <= y1 <= H = 5 .*, got \[4, 6, 5, 7\]"),
        ((X, INDEX, BOX.flip(0)), ValueError, r"box must have 0 <= y0 <= y1 .*, got \[3, 1, 2, 0\]"),
        ((X, INDEX, -BOX), ValueError, "box must have 0 <= y0"),
    ],
)
def test_refuses(args, error, message):
    with pytest.raises(error, match=message):
        mf.cutmix(*args)


# drawing


@pytest.mark.parametrize("shape", [(7, 3, 32, 20), (1, 1, 1, 1), (0, 3, 8, 8), (5, 0, 3, 9)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_draws(shape, per_sample):
    """Partners are a permutation, boxes lie in the image, and lam is what they leave."""
    for _ in range(20):
        index, box, lam = mf.sample_cutmix(shape, 0.7, per_sample=per_sample)
        assert torch.equal(index.sort().values, torch.arange(shape[0]))
        assert box.shape == ((shape[0], 4) if per_sample else (4,))
        assert (box.dtype, lam.dtype) == (torch.int64, torch.float32)
        y0, y1, x0, x1 = box.unbind(-1)
        assert ((y0 >= 0) & (y0 <= y1) & (y1 <= shape[2]) & (x0 >= 0) & (x0 <= x1) & (x1 <= shape[3])).all()
        left = 1 - ((y1 - y0) * (x1 - x0)).double() / (shape[2] * shape[3])
        torch.testing.assert_close(lam, left.float())
        x = torch.rand(shape)
        inside = (mf.cutmix(x, index, box) != x).flatten(1)
        assert (inside.double().mean(1) <= 1 - lam.double() + 1e-6).all() or not x.numel()


def test_boxes_are_those_of_the_paper():
    """The mean of the uncut area, and of the centre: against timm's formula with NumPy's draws."""
    import numpy as np

    num, size = 200_000, 64
    _, box, lam = mf.sample_cutmix((num, 1, size, size), 1.0, per_sample=True)
    random = np.random.default_rng(0)
    half = (size * np.sqrt(1 - random.beta(1, 1, num))).astype(int) // 2
    edges = []
    for _ in range(2):
        middle = random.integers(size, size=num)
        edges += [np.clip(middle - half, 0, size), np.clip(middle + half, 0, size)]
    other = 1 - (edges[1] - edges[0]) * (edges[3] - edges[2]) / size**2
    spread = math.sqrt(other.var() * 2 / num)
    assert abs(lam.double().mean().item() - other.mean()) < 6 * spread
    assert abs(box.double().mean(0) - torch.tensor([e.mean() for e in edges])).max() < 6 * size / math.sqrt(num)


def test_a_generator_repeats():
    def draw(seed):
        return mf.sample_cutmix((9, 3, 16, 16), generator=torch.Generator().manual_seed(seed))

    assert all(torch.equal(a, b) for a, b in zip(draw(3), draw(3), strict=True))
    assert not torch.equal(draw(3)[0], draw(4)[0])


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((7,), TypeError, r"input_shape must be a shape \(N,ch,H,W\), got 7"),
        (((7, 3),), ValueError, r"input_shape must be \(N,ch,H,W\), got \(7, 3\)"),
        (((7, 3, 2.0, 1),), TypeError, r"input_shape\[2\] must be an integer, got 2.0"),
        (((7, 3, -2, 1),), ValueError, r"input_shape\[2\] must be at least 0, got -2"),
        (((7, 3, 2, 1), 0.0), ValueError, "alpha must be finite and positive, got 0.0"),
    ],
)
def test_drawing_refuses(args, error, message):
    with pytest.raises(error, match=message):
        mf.sample_cutmix(*args)


@pytest.mark.gpu
def test_no_host_synchronisation():
    x = torch.randn(64, 3, 8, 8, device="cuda", requires_grad=True)
    for _ in range(2):
        index, box, _ = mf.sample_cutmix(x.shape, device="cuda")
        mf.cutmix(x, index, box).sum().backward()
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
