import math

import numpy as np
import pytest
import torch
from conftest import SEED, error
from torch.library import opcheck

import mixfeat as mf
from mixfeat import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(8, 3, 6, 5), (1, 7), (9,), (33, 1), (5, 65), (3, 2, 1, 1, 17), (2, 70000)]


def make_inputs(shape, dtype, device):
    x = torch.randn(shape, dtype=torch.float64).to(device, dtype)
    index = torch.randint(shape[0], shape[:1], device=device)  # some samples serve twice, others never
    return x, index, torch.rand(shape[0]).to(device)


def results(f, x, index, lam, grad, **options):
    x = x.detach().requires_grad_()
    z = f(x, index, lam, **options)
    return z.detach(), *torch.autograd.grad(z, x, grad.to(z.dtype))


def check_bytes(shape, device, dtypes=DTYPES):
    x = torch.randint(256, shape, dtype=torch.uint8, device=device)
    _, index, lam = make_inputs(shape, torch.float32, device)
    exact = reference.mixup(x.double(), index, lam.double())
    for dtype in dtypes:
        z = mf.mixup(x, index, lam, dtype=dtype)
        assert z.dtype == dtype
        assert error([z], [exact]) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes(backend, device, shape):
    check_bytes(shape, device, DTYPES[:1] + DTYPES[2:] if backend == "triton" else DTYPES)
    x, index, lam = make_inputs(shape, torch.float32, device)
    assert mf.mixup(x.abs().byte(), index, lam).dtype == torch.float32


def check_every_half(device, subnormal=True):
    """Every number that 16 bits hold comes through as it is, and what lies between is rounded as PyTorch rounds it.

    Without ``subnormal`` numbers may be 0 that are subnormal in float32.
    """

    def same(a, b):
        least = 0 if subnormal else torch.finfo(torch.float32).tiny
        a, b = (t.float()[~t.isnan()] for t in (a, b))
        return torch.equal(a.where(a.abs() >= least, 0), b.where(b.abs() >= least, 0))

    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        x = numbers.view(dtype).to(device)
        z = mf.mixup(x[None], index, 1.0)[0]
        assert torch.equal(z.isnan(), x.isnan() | x.isinf())  # 0 * inf is not a number
        assert same(z, x.where(~z.isnan(), torch.nan))
        pair = torch.stack([x, x.roll(1)])
        between = mf.mixup(pair, index.new_tensor([1, 0]), 0.5)[0]
        rounded = (x.float() / 2 + x.roll(1).float() / 2).to(dtype)
        assert torch.equal(between.isnan(), rounded.isnan())
        assert same(between, rounded)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by the interpreter's numpy
def test_every_half(backend, device):
    check_every_half(device, subnormal=backend != "triton")


def check_instruction_set():
    for shape in SHAPES[-3:]:
        check_bytes(shape, "cpu")
    check_every_half("cpu")


def test_memory_formats(backend, device):
    """Each sample keeps the order of its dimensions in memory; results are those of a contiguous copy, to the bit."""
    x, index, lam = make_inputs((6, 4, 5, 3), torch.float32, device)
    layouts = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "permuted": x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3),
        "samples innermost": x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "sliced": torch.cat([x, x], -1)[..., 1:4],
        "every second": torch.stack([x, x], 1).flatten(0, 1)[::2],
        "one sample": x[:1].expand(6, 4, 5, 3),
        "one channel": x[:, :1].expand(6, 4, 5, 3),
        "flipped": x.transpose(-1, -2).contiguous().transpose(-1, -2),
        "zero stride": x[:, :, :, :1].expand(6, 4, 5, 3),
    }
    twice = torch.stack([index, index], 1)[:, 0], torch.stack([lam, lam], 1)[:, 0]
    for layout in layouts.values():
        z = mf.mixup(layout, *twice)
        assert torch.equal(z, mf.mixup(layout.contiguous(), index, lam))
        for grad in (layouts["channels_last"], layouts["one sample"], torch.ones((), device=device).expand(6, 4, 5, 3)):
            found = results(mf.mixup, layout, *twice, grad)
            torch.testing.assert_close(found, results(mf.mixup, layout.contiguous(), index, lam, grad.contiguous()))
    assert mf.mixup(layouts["channels_last"], index, lam).is_contiguous(memory_format=torch.channels_last)
    assert mf.mixup(layouts["permuted"], index, lam).stride() == layouts["permuted"].stride()
    assert mf.mixup(layouts["sliced"], index, lam).is_contiguous()
    video = torch.randn(2, 3, 4, 5, 6, device=device).contiguous(memory_format=torch.channels_last_3d)
    assert mf.mixup(video, index[:2] % 2, 0.4).is_contiguous(memory_format=torch.channels_last_3d)


def test_ends(backend, device):
    """lam = 1 is the sample itself, lam = 0 its partner, and index as it is changes nothing but by rounding."""
    x, index, _ = make_inputs((7, 11), torch.float32, device)
    assert torch.equal(mf.mixup(x, index, 1.0), x)
    assert torch.equal(mf.mixup(x, index, 0), x[index])
    torch.testing.assert_close(mf.mixup(x, torch.arange(7, device=device), 0.3), x)


def test_patches_with_weights_of_their_own(backend, device):
    """0 and 1 cut and paste; layouts, bytes, and batches of inputs; a partner that does not exist is none by chance."""
    x, index, _ = make_inputs((6, 4, 5, 3), torch.float32, device)
    mask = torch.rand(6, 4, device=device) < 0.5
    assert torch.equal(mf.mixup(x, index, mask.float()), x.where(mask[..., None, None], x[index]))
    lam = torch.rand(6, 4, device=device)
    z = mf.mixup(x, index, lam)
    assert torch.equal(mf.mixup(x.contiguous(memory_format=torch.channels_last), index, lam), z)
    exact = reference.mixup((255 * x.abs()).byte().double(), index, lam.double())
    assert error([mf.mixup((255 * x.abs()).byte(), index, lam)], [exact]) <= 1e-6
    batch = torch.stack([x, 2 * x])
    assert torch.equal(torch.vmap(lambda input: mf.mixup(input, index, lam))(batch), torch.stack([z, 2 * z]))
    wrong = index.clone()
    wrong[2] = 2**62  # times 4 patches it is 0 in 64 bits
    if x.device.type == "cpu":
        with pytest.raises(IndexError, match=r"index must lie in \[0, 6\), got 4611686018427387904"):
            mf.mixup(x, wrong, lam)
    else:
        assert mf.mixup(x, wrong, lam).isnan().flatten(1).all(1).tolist() == [n == 2 for n in range(6)]


def test_lam_is_not_rounded_to_half_precision(backend, device):
    x = torch.full((2, 8), 256.0, dtype=torch.bfloat16, device=device)
    x[1] = 0
    index = torch.tensor([1, 0], device=device)
    lam = torch.tensor(1 - 2**-9, device=device)  # which bfloat16 would make 1
    assert (mf.mixup(x, index, lam)[1] == 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_number_is_as_exact_as_a_tensor(dtype):
    x, index, _ = make_inputs((5, 9), dtype, torch.device("cpu"))
    lam = torch.tensor(0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for input in (x, x.t().contiguous().t(), x.clone().requires_grad_()):  # served as it is, or checked first
        assert torch.equal(mf.mixup(input, index, 0.3), mf.mixup(input, index, lam))


@pytest.mark.parametrize("partner", [-1, 5, 2**40])
def test_index_out_of_range(backend, device, partner):
    x, index, lam = make_inputs((5, 9), torch.float32, device)
    index[2] = partner
    if device.type == "cpu":
        with pytest.raises(IndexError, match=rf"index must lie in \[0, 5\), got {partner}"):
            mf.mixup(x, index, lam)
        return
    z = mf.mixup(x, index, lam)
    others = [0, 1, 3, 4]
    assert z[2].isnan().all()
    torch.testing.assert_close(z[others], reference.mixup(x, index.clamp(0, 4), lam)[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_opcheck(backend, device, dtype):
    x, index, lam = make_inputs((5, 3, 4, 4), torch.float32, device)
    for input in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(0, 1)[:, :3]):
        n = input.shape[0]
        input = input.to(dtype).requires_grad_(dtype == torch.float32)
        opcheck(torch.ops.mixfeat.mixup.default, (input, index[:n] % n, lam[:n], torch.float32))
        opcheck(torch.ops.mixfeat.mixup_backward.default, (input.detach().float(), index[:n] % n, lam[:n]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend, device, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(mf.mixup, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n, lam in ((6, 0.25), (9, 0.5), (9, torch.rand(9, device=device))):
        x, index, _ = make_inputs((n, 4, 3, 3), torch.float32, device)
        x = x.contiguous(memory_format=torch.channels_last)
        z, grad = results(compiled, x, index, lam, x)
        expected = results(mf.mixup, x, index, lam, x)
        assert z.stride() == expected[0].stride()
        torch.testing.assert_close((z, grad), expected)


def test_compile_draws_too():
    """Drawn and mixed in one graph, on the default device."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: (x, *mf.sample_mixup(x.shape[0], 0.3)), fullgraph=True)
    x, index, lam = compiled(torch.randn(5, 3))
    assert sorted(index.tolist()) == list(range(5))
    assert 0 <= lam.item() <= 1
    assert index.device == lam.device == x.device


@pytest.mark.gpu
def test_no_host_synchronisation():
    x = torch.randn(64, 3, 8, 8, device="cuda", requires_grad=True)
    generator = torch.Generator("cuda")
    mf.mixup(x, *mf.sample_mixup(64, 0.4, generator=generator)).sum().backward()  # compiled now
    torch.cuda.set_sync_debug_mode("error")
    try:
        mf.mixup(x, *mf.sample_mixup(64, 0.4, generator=generator, per_sample=True)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


X, INDEX = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (([1.0], INDEX, 0.5), TypeError, "input must be a tensor, got list"),
        ((X.long(), INDEX, 0.5), TypeError, r"input must be float32, .* or uint8, got torch\.int64"),
        ((torch.zeros(()), INDEX, 0.5), ValueError, r"input must have shape \(N, \.\.\.\), got \(\)"),
        ((X, None, 0.5), ValueError, "index is needed"),
        ((X, INDEX[:3], 0.5), ValueError, r"index must have shape \(4,\), one partner for each sample, got \(3,\)"),
        ((X, INDEX.int(), 0.5), TypeError, r"index must be an int64 tensor, got torch\.int32"),
        ((X, INDEX.to("meta"), 0.5), ValueError, "index must be on input's device cpu, got meta"),
        ((X, INDEX, 1.5), ValueError, r"lam must be in \[0, 1\], got 1.5"),
        ((X, INDEX, math.nan), ValueError, r"lam must be in \[0, 1\], got nan"),
        ((X, INDEX, torch.tensor([0.5, -0.25, 0.5, 1.0])), ValueError, r"lam must be in \[0, 1\], got -0.25"),
        ((X, INDEX, torch.tensor(1.25)), ValueError, r"lam must be in \[0, 1\], got 1.25"),
        ((X, INDEX, torch.tensor(math.nan)), ValueError, r"lam must be in \[0, 1\], got nan"),
        ((X, INDEX, torch.ones(3)), ValueError, r"lam must have shape \(\), \(4,\) or \(4,3\), got \(3,\)"),
        ((X, INDEX, torch.ones(4, 2)), ValueError, r"lam must have shape .*, got \(4, 2\)"),
        ((X[:, 0], INDEX, torch.ones(4, 2)), ValueError, r"lam must have shape \(\) or \(4,\), got \(4, 2\)"),
        ((X, INDEX, torch.full((4, 3), 1.5)), ValueError, r"lam must be in \[0, 1\], got 1.5"),
        ((X, INDEX, torch.ones((), requires_grad=True)), ValueError, "lam must not require grad"),
        ((X, INDEX, INDEX), TypeError, r"lam must be a floating-point tensor, got torch\.int64"),
        ((X, INDEX, "half"), TypeError, "lam must be a number or a tensor, got 'half'"),
    ],
)
def test_refuses(args, error, message):
    with pytest.raises(error, match=message):
        mf.mixup(*args)


def test_refuses_dtypes():
    with pytest.raises(TypeError, match=r"dtype must be float32, .*, got torch\.int32"):
        mf.mixup(X.byte(), INDEX, 0.5, dtype=torch.int32)
    with pytest.raises(
        TypeError, match=r"dtype must be input's, torch\.float32, unless input is uint8; got torch\.float64"
    ):
        mf.mixup(X, INDEX, 0.5, dtype=torch.float64)


# drawing partners and lam


def draw(alpha, num):
    return mf.sample_mixup(num, alpha, per_sample=True)[1].double()


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.4, 1.0, 2, 10.0])
def test_lam_is_beta_distributed(alpha):
    """Two-sample Kolmogorov-Smirnov against numpy's draws; a right sampler fails once in 10^9 runs."""
    num = 200_000
    mine = draw(alpha, num).sort().values.numpy()
    other = np.sort(np.random.default_rng(SEED).beta(alpha, alpha, num).astype(np.float32)).astype(np.float64)
    both = np.concatenate([mine, other])
    distance = np.abs(np.searchsorted(mine, both, "right") - np.searchsorted(other, both, "right")).max() / num
    assert distance < math.sqrt(-math.log(1e-9 / 2) / 2) * math.sqrt(2 / num)
    assert mine.min() >= 0
    assert mine.max() <= 1


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_moments_of_lam(alpha):
    num = 400_000
    lam, (nodes, weights) = draw(alpha, num), mf.beta_quadrature(alpha, 8)
    for power in range(1, 8):
        mean, square = ((weights * nodes**k).sum() for k in (power, 2 * power))
        assert abs((lam**power).mean() - mean) < 6 * ((square - mean**2) / num).sqrt()


def test_tails_of_lam():
    """P(lam < x) = x^alpha / (alpha B(alpha, alpha)) for small x; both ends alike."""
    num, alpha, x = 400_000, 0.1, 1e-5
    lam = draw(alpha, num)
    share = x**alpha / alpha / math.exp(2 * math.lgamma(alpha) - math.lgamma(2 * alpha))
    for found in ((lam < x).double().mean().item(), (lam > 1 - x).double().mean().item()):
        assert abs(found - share) < 6 * math.sqrt(share / num)


@pytest.mark.parametrize("num", [0, 1, 2, 7, 1000])
def test_partners_are_a_random_permutation(num):
    index, lam = mf.sample_mixup(num)
    assert index.dtype == torch.int64
    assert torch.equal(index.sort().values, torch.arange(num))
    assert lam.shape == ()
    assert lam.dtype == torch.float32
    assert mf.sample_mixup(num, per_sample=True)[1].shape == (num,)


def test_every_partner_is_as_likely():
    counts = torch.zeros(5, 5)
    for _ in range(4000):
        counts[torch.arange(5), mf.sample_mixup(5)[0]] += 1
    assert (counts / 4000 - 0.2).abs().max() < 6 * math.sqrt(0.16 / 4000)


def test_a_generator_repeats():
    def both(seed, **options):
        return mf.sample_mixup(50, 0.3, generator=torch.Generator().manual_seed(seed), **options)

    state = torch.get_rng_state()
    first, again, other = both(3), both(3), both(4)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])
    assert len(both(3, per_sample=True)[1].unique()) > 40


def test_fixed_lam():
    index, lam = mf.sample_mixup(6, lam=0.5)
    assert lam == 0.5
    assert torch.equal(mf.sample_mixup(6, lam=0.25, per_sample=True)[1], torch.full((6,), 0.25))
    assert len(index) == 6


def test_device(device):
    if torch.cuda.is_available():
        for generator in (None, torch.Generator(), torch.Generator("cuda")):
            assert all(t.is_cuda for t in mf.sample_mixup(5, device="cuda", generator=generator))
        assert all(t.is_cuda for t in mf.sample_mixup(5, generator=torch.Generator("cuda")))
    with torch.device("meta"):
        assert all(t.is_meta for t in mf.sample_mixup(5))


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((2.5,), {}, TypeError, "num_samples must be an integer, got 2.5"),
        ((-1,), {}, ValueError, "num_samples must be at least 0, got -1"),
        (
            (4, 0),
            {},
            ValueError,
            r"alpha must be finite and positive, got 0 \(for Midpoint Mixup pass lam=0.5 instead\)",
        ),
        ((4, -1.0), {}, ValueError, "alpha must be finite and positive, got -1.0"),
        ((4, math.inf), {}, ValueError, "alpha must be finite and positive, got inf"),
        ((4, "1"), {}, TypeError, "alpha must be a number, got '1'"),
        ((4,), {"lam": 1.5}, ValueError, r"lam must be in \[0, 1\], got 1.5"),
        ((4,), {"lam": "0.5"}, TypeError, "lam must be a number, got '0.5'"),
        ((4,), {"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
    ],
)
def test_sample_mixup_refuses(args, options, error, message):
    with pytest.raises(error, match=message):
        mf.sample_mixup(*args, **options)
