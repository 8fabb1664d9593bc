"""Properties that hold for any input: shapes, layouts in memory, dtypes, settings, gradients wanted; drawn at random.

Results are held to the reference in float64 element by element, within what rounding may do (:mod:`rounding`).
Numbers come from a generator with a drawn seed, so that a failing example can be repeated and made smaller.
"""

import itertools
import math
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rounding import UNIT, Approximate, assert_within
from torch.utils._python_dispatch import TorchDispatchMode

import mixfeat as mf
from mixfeat import reference
from mixfeat.ops import fallback
from mixfeat.ops.pairwise_mixup_loss import pairwise_mixup_block

pytest.importorskip("hypothesis")  # `make gpu` does without
from hypothesis import assume, given
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BORDERS = (8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129)  # of kernels' blocks
POLY = mf.PolyReLU(8, 0.1)


# what is drawn


def dtypes(backend):
    return st.sampled_from([dtype for dtype in FLOATS if backend != "triton" or dtype != torch.float64])


@st.composite
def sizes(draw, count, *, least=0, borders=BORDERS):
    """Mostly small numbers, now and then none, and one or two beside the border of a block."""
    small = [size for size in (1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 5, 7, 0) if size >= least]
    result = [draw(st.sampled_from(small)) for _ in range(count)]
    for place in draw(st.lists(st.integers(0, count - 1), max_size=2, unique=True)):
        result[place] = draw(st.sampled_from(borders))
    return result


@st.composite
def generators(draw):
    return torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))


def normal(generator, *size):
    return torch.randn(size, generator=generator, dtype=torch.float64)


@st.composite
def laid_out(draw, tensor, *, device="cpu", expand=True):
    """The tensor on the device in any layout: transposed, with gaps, an offset, or the same numbers along dimensions.

    In the gaps is what must not be read: NaN, or a number that no index may be; in bytes 0.
    """
    tensor, dims, shape = tensor.to(device), tensor.dim(), tensor.shape
    if expand:
        for d in draw(st.sets(st.integers(0, dims - 1), max_size=2)) if dims and draw(st.booleans()) else ():
            if shape[d]:
                tensor = tensor.narrow(d, 0, 1)
    if draw(st.booleans()):
        order = draw(st.permutations(range(dims)))
        steps = [draw(st.sampled_from([1, 1, 2, 3])) for _ in range(dims)]
        offset = draw(st.integers(0, 3))
        gap = math.nan if tensor.is_floating_point() else max(torch.iinfo(tensor.dtype).min, -(2**62))
        room = tensor.new_full([offset + max(0, tensor.shape[d] * steps[d]) for d in order], gap)
        view = room.permute([order.index(d) for d in range(dims)])
        view = view[tuple(slice(offset, None, steps[d]) for d in range(dims))]
        tensor = view.copy_(tensor)
    return tensor.expand(shape)


def numbers_in_0_1():
    return st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1, allow_subnormal=False)


@st.composite
def lams(draw, samples, generator, device="cpu"):
    """A number, or a tensor () or (N,) of any floating dtype."""
    kind = draw(st.sampled_from(["number", "one for all", "per sample"]))
    if kind == "number":
        return draw(numbers_in_0_1())
    values = torch.rand(samples if kind == "per sample" else (), generator=generator, dtype=torch.float64)
    values = values.lerp(values.round(), draw(st.sampled_from([0.0, 0.0, 1.0])))
    return draw(laid_out(values.to(draw(st.sampled_from(FLOATS))), device=device))


@st.composite
def partners(draw, samples, generator, device="cpu"):
    """index and lam: any map of the samples, permutation or not."""
    if draw(st.booleans()):
        index = torch.randperm(samples, generator=generator)
    else:
        index = torch.randint(max(1, samples), (samples,), generator=generator)
    return {"index": draw(laid_out(index, device=device)), "lam": draw(lams(samples, generator, device))}


@st.composite
def activations(draw, dtype):
    """Any, but for degrees at which float16 overflows."""
    degree = draw(st.integers(1, 16 if dtype.itemsize > 2 else 4))
    kind = draw(st.sampled_from([mf.PolyReLU, mf.PolyReLU, mf.PowerReLU, mf.Power, mf.ReLU, mf.Identity]))
    if kind is mf.PolyReLU:
        clamp = draw(st.booleans())
        degree = draw(st.integers(1, 16)) if clamp else degree
        return mf.PolyReLU(degree, draw(st.sampled_from([0.05, 0.1, 0.25, 1.0])), clamp)
    return kind(degree) if kind in (mf.PowerReLU, mf.Power) else kind()


@st.composite
def networks(draw, backend, device, *, least=0, limit=None):
    """Samples and filters of one network or several, pre-activations of the order of the activation's threshold."""
    dtype = draw(dtypes(backend))
    samples, patches, features, classes, filters = draw(sizes(5, least=least))
    runs = draw(st.sampled_from([1, 2, 3]))
    with_runs = draw(st.sampled_from(["", "", "x", "w", "xw"]))
    if limit is not None:  # of pre-activations of all pairs
        classes = max(classes, 2)
        samples = min(samples, math.isqrt(limit // (runs * max(1, patches * classes * filters))))
    generator, activation = draw(generators()), draw(activations(dtype))
    threshold = activation.polynomial.threshold
    x = normal(generator, *[runs] * ("x" in with_runs), samples, patches, features)
    w = normal(generator, *[runs] * ("w" in with_runs), classes, filters, features)
    saturates = activation.polynomial.upper and activation.polynomial.lower
    w *= draw(st.sampled_from([0.3, 1.0, 1.0, 5.0] if saturates else [0.3, 1.0]))
    x, w = x.to(dtype), (w * threshold / math.sqrt(max(1, features))).to(dtype)
    x, w = (draw(laid_out(t, device=device)) for t in (x, w))
    return SimpleNamespace(x=x, w=w, activation=activation, generator=generator, dtype=dtype, samples=samples)


@st.composite
def gradients_like(draw, result, generator):
    """What comes from above, in any layout."""
    grad = draw(laid_out(normal(generator, *result.shape).to(result.dtype), device=result.device))
    return grad * 0 + 1 if draw(st.integers(0, 9)) == 0 else grad


def needs():
    """Which of input and weight gradients are wanted to."""
    return st.sampled_from([(True, True), (True, False), (False, True)])


# how it is run


class Watch(TorchDispatchMode):
    """Somebody who watches: then the operators go through the dispatcher, and not directly to their kernels."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextmanager
def watched(whether):
    if whether:
        with Watch():
            yield
    else:
        yield


def derived(f, tensors, wanted, grad=None, *, watch=False):
    """f of leaves with these values and layouts, and their gradients, where they are wanted."""
    leaves = [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
    with watched(watch):
        result = f(*leaves)
        grads = torch.autograd.grad(result, [leaf for leaf in leaves if leaf.requires_grad], grad)
    return [result.detach(), *grads]


def accumulation(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact(lam, dtype):
    """lam as kernels know it."""
    lam = lam if isinstance(lam, torch.Tensor) else torch.tensor(lam, dtype=torch.float64)
    return lam.to(accumulation(dtype)).double()


def hold(names, results, truths, bounds, dtypes):
    for name, result, truth, bound, dtype in zip(names, results, truths, bounds, dtypes[: len(names)], strict=True):
        assert result.dtype == dtype
        assert_within(name, result, truth, bound.rounded(dtype).error)


def of(names, wanted):
    """Those of results and gradients that were asked for."""
    return [name for name, want in zip(names, (True, *wanted), strict=True) if want]


def units(backend, dtype):
    """Relative errors of an operation and of an addition inside a sum; only the CPU's kernels compute in float32."""
    sums = UNIT[accumulation(dtype)]
    return (sums if backend == "cpu" else UNIT[dtype]), sums


def phi(activation):
    return lambda s: activation.polynomial(s)


def slope(activation):
    return lambda s: activation.polynomial.slope(s)


def with_runs(x, w):
    """(R,N,P,D) and (R,C,M,D) of both."""
    runs = x.shape[0] if x.dim() == 4 else w.shape[0] if w.dim() == 4 else 1
    return x.expand(runs, *x.shape[-3:]), w.expand(runs, *w.shape[-3:])


def summed(bound, like):
    """Without the run dimension where ``like`` has none."""
    return bound.sum(0) if like.dim() == 3 else bound


def patch_conv_bounds(x, w, activation, grad, index, lam, unit, sums):
    """Of logits and gradients. What kernels multiply is in bfloat16 if the input is, float32 sums notwithstanding."""

    def stored(numbers):
        return numbers.rounded(x.dtype) if x.dtype == torch.bfloat16 else numbers

    many_x, many_w = (Approximate(t, unit, sums) for t in with_runs(x, w))
    z = many_x
    if index is not None:
        lam = lam.view(-1, 1, 1)
        z = stored(z * lam + z.moved(lambda t: t.index_select(1, index)) * (1 - lam))
    s = z.einsum("rnpd,rcmd->rnpcm", many_w)
    degree = activation.polynomial.degree
    logits = s.through(phi(activation), 4 + degree).sum(2, 4)
    g = grad.double().expand(logits.value.shape)
    e = stored(stored(s.through(slope(activation), 4 + degree)) * g[:, :, None, :, None])
    w_grad = e.einsum("rnpcm,rnpd->rcmd", z)
    x_grad = e.einsum("rnpcm,rcmd->rnpd", many_w)
    if index is not None:
        x_grad = stored(x_grad)
        own, others = x_grad * lam, x_grad * (1 - lam)
        size = own.value.abs().index_add(1, index, others.value.abs())
        error = own.error.index_add(1, index, others.error) + (len(index) * sums + 2 * unit) * size
        x_grad = Approximate(own.value.index_add(1, index, others.value), unit, sums, error)
    if x.dim() == w.dim() == 3:
        logits = logits.moved(lambda t: t[0])
    return logits, summed(x_grad, x), summed(w_grad, w)


# patch_conv


@given(data=st.data())
def test_patch_conv(backend, device, data):
    """Value and gradients against the reference; the same bits through the dispatcher; nothing is mutated."""
    n = data.draw(networks(backend, device))
    mixing = data.draw(partners(n.samples, n.generator, device)) if data.draw(st.booleans()) else {}
    wanted = data.draw(needs())
    double = {"index": mixing["index"], "lam": exact(mixing["lam"], n.dtype).to(device)} if mixing else {}
    before = n.x.clone(), n.w.clone()

    def ours(x, w):
        return mf.patch_conv(x, w, n.activation, **mixing)

    shape = ours(n.x, n.w)
    grad = data.draw(gradients_like(shape, n.generator))
    mine = derived(ours, (n.x, n.w), wanted, grad)
    true = derived(
        lambda x, w: reference.patch_conv(x, w, n.activation, **double), (n.x.double(), n.w.double()), wanted,
        grad.double(),
    )  # fmt: skip
    bounds = patch_conv_bounds(
        n.x, n.w, n.activation, grad, double.get("index"), double.get("lam"), *units(backend, n.dtype)
    )
    names = ("logits", "input grad", "weight grad")
    hold(of(names, wanted), mine, true, of(bounds, wanted), [n.dtype] * 3)
    for direct, dispatched in zip(mine, derived(ours, (n.x, n.w), wanted, grad, watch=True), strict=True):
        assert torch.equal(direct, dispatched)
    assert torch.equal(n.x, before[0])
    assert torch.equal(n.w, before[1])


@given(data=st.data())
def test_patch_conv_of_runs_and_of_moved_samples(backend, device, data):
    """Runs are single calls, the order of samples that of logits, and lam = 1 leaves samples as they are."""
    n = data.draw(networks(backend, device, least=1))
    bounds = patch_conv_bounds(
        n.x, n.w, n.activation, torch.zeros((), device=device), None, None, *units(backend, n.dtype)
    )
    bound = 2 * bounds[0].rounded(n.dtype).error
    logits = mf.patch_conv(n.x, n.w, n.activation)

    def same(name, result, part=...):
        assert_within(name, result, logits[part].double(), bound[part])

    if logits.dim() == 3:
        for r in range(len(logits)):
            single = mf.patch_conv(n.x[r] if n.x.dim() == 4 else n.x, n.w[r] if n.w.dim() == 4 else n.w, n.activation)
            same("run", single, r)
    order = torch.randperm(n.samples, generator=n.generator).to(device)
    same("order", mf.patch_conv(n.x.index_select(-3, order), n.w, n.activation)[..., order.argsort(), :])
    same("lam 1", mf.patch_conv(n.x, n.w, n.activation, index=order, lam=1))
    same("partner itself", mf.patch_conv(n.x, n.w, n.activation, index=order.sort().values, lam=0.0))


# pairwise_mixup_loss


@st.composite
def nodes(draw):
    """A number, or nodes with weights: those of a quadrature or any."""
    kind = draw(st.sampled_from(["midpoint", "number", "tensor", "quadrature", "any"]))
    if kind in ("midpoint", "number", "tensor"):
        lam = 0.5 if kind == "midpoint" else draw(numbers_in_0_1())
        return {"lam": torch.tensor(lam, dtype=torch.float64) if kind == "tensor" else lam}
    if kind == "quadrature":
        alpha, dtype = draw(st.sampled_from([0.2, 1.0, 3.0])), draw(st.sampled_from([torch.float64, torch.float32]))
        return dict(
            zip(("lam", "lam_weight"), mf.beta_quadrature(alpha, draw(st.integers(1, 4)), dtype=dtype), strict=True)
        )
    lam = torch.tensor(draw(st.lists(numbers_in_0_1(), min_size=1, max_size=3)), dtype=torch.float64)
    weight = torch.tensor(draw(st.lists(st.floats(0.1, 1), min_size=len(lam), max_size=len(lam))), dtype=torch.float64)
    return {"lam": draw(laid_out(lam, expand=False)), "lam_weight": weight / weight.sum()}


def as_lists(lam, lam_weight=None):
    """As the reference takes them."""
    if lam_weight is None:
        return {"lam": [float(lam)], "lam_weight": [1.0]}
    return {"lam": lam.tolist(), "lam_weight": lam_weight.tolist()}


def pairs_bounds(s, y, activation, lam, lam_weight):
    """Of the loss (R,) of all pairs, and of its gradient to the pre-activations (R,N,P,C,M)."""
    runs, samples, _, classes, _ = s.value.shape
    label = F.one_hot(y.expand(runs, samples), classes).double()
    degree = activation.polynomial.degree
    loss, s_grad = None, None
    for node, weight in zip(lam, lam_weight, strict=True):
        t = s.moved(lambda v: v[:, :, None]) * node + s.moved(lambda v: v[:, None]) * (1 - node)
        g = t.through(phi(activation), 4 + degree).sum(3).sum(4)
        if activation.polynomial.upper:
            g.error *= degree  # where all is linear t itself is summed, which may be so much larger than phi
        log_p = g.log_softmax()
        both = node * label[:, :, None] + (1 - node) * label[:, None]
        part = (log_p * both).sum(3).sum(2).sum(1) * -weight
        d = log_p.exp_of_negative().minus(both) * weight
        e = t.through(slope(activation), 4 + degree) * d.moved(lambda v: v[:, :, :, None, :, None])
        grad = e.sum(2) * node + e.sum(1) * (1 - node)
        loss, s_grad = (part, grad) if loss is None else (loss + part, s_grad + grad)
    return loss, s_grad


def pairwise_bounds(x, w, y, activation, grad, lam, lam_weight, unit, sums):
    """Of the loss and its gradients to input and weight."""
    many_x, many_w = (Approximate(t, unit, sums) for t in with_runs(x, w))
    s = many_x.einsum("rnpd,rcmd->rnpcm", many_w)
    shares = [weight / max(1, s.value.shape[1] ** 2) for weight in lam_weight]
    loss, s_grad = pairs_bounds(s, y, activation, lam, shares)
    s_grad = s_grad * grad.double().expand(len(loss.value))[:, None, None, None, None]
    w_grad = s_grad.einsum("rnpcm,rnpd->rcmd", many_x)
    x_grad = s_grad.einsum("rnpcm,rcmd->rnpd", many_w)
    if x.dim() == w.dim() == 3:
        loss = loss.moved(lambda t: t[0])
    return loss, summed(x_grad, x), summed(w_grad, w)


@st.composite
def pairwise_problems(draw, backend, device):
    n = draw(networks(backend, device, limit=50_000))
    runs = n.x.shape[:-3] or n.w.shape[:-3]
    shape = (*runs, n.samples) if draw(st.booleans()) else (n.samples,)
    y = torch.randint(n.w.shape[-3], shape, generator=n.generator)
    n.y = draw(laid_out(y, device=device))
    return n


@given(data=st.data())
def test_pairwise_mixup_loss(backend, device, data):
    """Value and gradients against the reference, through the dispatcher too."""
    n = data.draw(pairwise_problems(backend, device))
    assume(n.samples)
    settings, wanted = data.draw(nodes()), data.draw(needs())
    numbers = as_lists(**settings)

    def ours(x, w):
        return mf.pairwise_mixup_loss(x, w, n.y, n.activation, **settings)

    shape = ours(n.x, n.w)
    grad = data.draw(gradients_like(shape, n.generator))
    mine = derived(ours, (n.x, n.w), wanted, grad)
    true = derived(
        lambda x, w: reference.pairwise_mixup_loss(x, w, n.y, n.activation, **numbers),
        (n.x.double(), n.w.double()), wanted, grad.double(),
    )  # fmt: skip
    unit = UNIT[n.dtype if backend == "triton" else accumulation(n.dtype)]
    # The definition errs too, in float64: its sums over all pairs have as many times more terms as there are samples.
    sums = UNIT[accumulation(n.dtype)] + n.samples * UNIT[torch.float64]
    bounds = pairwise_bounds(n.x, n.w, n.y, n.activation, grad, *numbers.values(), unit, sums)
    names, dtypes = ("loss", "input grad", "weight grad"), [accumulation(n.dtype), n.dtype, n.dtype]
    hold(of(names, wanted), mine, true, of(bounds, wanted), dtypes)
    # not the same bits: PyTorch may choose another matrix product where it sees that gradients are asked for
    hold(of(names, wanted), derived(ours, (n.x, n.w), wanted, grad, watch=True), true, of(bounds, wanted), dtypes)


@given(data=st.data())
def test_pairwise_mixup_loss_is_symmetric(backend, device, data):
    """In lam and 1 - lam, in the order of the samples, and over runs."""
    n = data.draw(pairwise_problems(backend, device))
    lam = data.draw(st.integers(0, 64)) / 64  # so that 1 - lam is exact
    loss = mf.pairwise_mixup_loss(n.x, n.w, n.y, n.activation, lam=lam)
    sums = UNIT[accumulation(n.dtype)]
    unit = UNIT[n.dtype] if backend == "triton" else sums
    zero = torch.zeros((), device=device)
    bound = 2 * pairwise_bounds(n.x, n.w, n.y, n.activation, zero, [lam], [1], unit, sums)[0].rounded(loss.dtype).error

    def same(name, result, part=...):
        assert_within(name, result, loss[part].double(), bound[part])

    same("1 - lam", mf.pairwise_mixup_loss(n.x, n.w, n.y, n.activation, lam=1 - lam))
    order = torch.randperm(n.samples, generator=n.generator).to(device)
    same("order", mf.pairwise_mixup_loss(n.x[..., order, :, :], n.w, n.y[..., order], n.activation, lam=lam))
    if loss.dim():
        for r in range(len(loss)):
            x, w, y = (t[r] if t.dim() == dims else t for t, dims in ((n.x, 4), (n.w, 4), (n.y, 2)))
            same("run", mf.pairwise_mixup_loss(x, w, y, n.activation, lam=lam), r)


@given(data=st.data())
def test_blocks_of_pairs_add_up(backend, device, data):
    """Any partition of rows and of columns: losses and gradients of the parts sum to those of the whole."""
    dtype = data.draw(st.sampled_from([d for d in FLOATS[:2] if backend != "triton" or d == torch.float32]))
    samples, patches, filters = data.draw(sizes(3, least=1, borders=(8, 9, 16, 17)))
    classes, runs = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 2))
    generator, activation = data.draw(generators()), data.draw(activations(dtype))
    s = normal(generator, runs, samples, patches, classes, filters) * activation.polynomial.threshold
    s = data.draw(laid_out(s.to(dtype), device=device))
    y = torch.randint(classes, (runs, samples), generator=generator).to(device)
    arguments = ([data.draw(numbers_in_0_1())], [1 / samples**2], activation.polynomial, True)
    whole, grad, _ = pairwise_mixup_block(s, None, y, None, *arguments)
    cuts = sorted(data.draw(st.sets(st.integers(0, samples), max_size=3)) | {0, samples})
    total, parts = torch.zeros_like(whole), torch.zeros_like(grad)
    blocks = [slice(*ends) for ends in itertools.pairwise(cuts)]
    for a in blocks:
        for b in blocks:
            other = (s[:, b], y[:, b]) if a != b else (None, None)
            loss, rows, columns = pairwise_mixup_block(s[:, a], other[0], y[:, a], other[1], *arguments)
            total += loss
            parts[:, a] += rows
            if columns is not None:
                parts[:, b] += columns
    loss, s_grad = pairs_bounds(Approximate(s, UNIT[dtype], UNIT[dtype]), y, activation, *arguments[:2])
    for name, results, true in (("loss", (whole, total), loss), ("gradient", (grad, parts), s_grad)):
        for result in results:
            assert_within(name, result, true.value, true.rounded(dtype).error)


# mixup


@st.composite
def batches(draw, backend, device):
    """Samples of any shape and layout, channels_last among them."""
    dtype, generator = draw(dtypes(backend)), draw(generators())
    shape = draw(sizes(draw(st.integers(1, 5)), borders=(8, 17, 33)))
    x = normal(generator, *shape).to(dtype)
    if len(shape) == 4 and draw(st.booleans()):
        x = x.to(device, memory_format=torch.channels_last)
    else:
        x = draw(laid_out(x, device=device))
    return SimpleNamespace(x=x, generator=generator, dtype=dtype, samples=shape[0])


@given(data=st.data())
def test_mixup(backend, device, data):
    b = data.draw(batches(backend, device))
    mixing = data.draw(partners(b.samples, b.generator, device))
    lam, index = exact(mixing["lam"], b.dtype).to(device), mixing["index"]
    grad = data.draw(gradients_like(b.x, b.generator))
    mine = derived(lambda x: mf.mixup(x, **mixing), (b.x,), (True,), grad)
    true = derived(lambda x: reference.mixup(x, index, lam), (b.x.double(),), (True,), grad.double())
    unit, sums = units(backend, b.dtype)
    size = reference.mixup(b.x.double().abs(), index, lam), fallback.mixup_backward(grad.double().abs(), index, lam)
    bounds = [
        Approximate(t, unit, sums, (4 * unit + (1 + b.samples) * sums) * s) for t, s in zip(true, size, strict=True)
    ]
    hold(("mixed", "input grad"), mine, true, bounds, (b.dtype, b.dtype))
    for direct, dispatched in zip(
        mine, derived(lambda x: mf.mixup(x, **mixing), (b.x,), (True,), grad, watch=True), strict=True
    ):
        assert torch.equal(direct, dispatched)
        assert direct.stride() == dispatched.stride()
    assert torch.equal(mf.mixup(b.x, index, 1), b.x)
    assert torch.equal(mf.mixup(b.x, index, 0), b.x.index_select(0, index))


@given(data=st.data())
def test_cutmix(backend, device, data):
    """Copies bytes: any images, partners and boxes, empty ones among them."""
    dtype, generator = data.draw(dtypes(backend) | st.just(torch.uint8)), data.draw(generators())
    samples, channels, height, width = data.draw(sizes(4, borders=(8, 17, 33)))
    x = normal(generator, samples, channels, height, width)
    x = (x * 50).abs().to(dtype) if dtype == torch.uint8 else x.to(dtype)
    if data.draw(st.booleans()):
        x = x.to(device, memory_format=torch.channels_last)
    else:
        x = data.draw(laid_out(x, device=device))
    index = data.draw(partners(samples, generator, device))["index"]
    shape = (samples,) if data.draw(st.booleans()) else ()
    ends = (torch.randint(size + 1, (*shape, 2), generator=generator).sort(-1).values for size in (height, width))
    box = data.draw(laid_out(torch.cat(list(ends), -1), device=device, expand=False))
    assert torch.equal(mf.cutmix(x, index, box), reference.cutmix(x, index, box))
    if dtype == torch.uint8:
        return
    grad = data.draw(gradients_like(x, generator))
    mine = derived(lambda x: mf.cutmix(x, index, box), (x,), (True,), grad)
    true = derived(lambda x: reference.cutmix(x, index, box), (x.double(),), (True,), grad.double())
    size = derived(lambda x: reference.cutmix(x, index, box), (x.double(),), (True,), grad.double().abs())[1]
    unit, sums = units(backend, dtype)
    bounds = [Approximate(true[0], unit, sums), Approximate(true[1], unit, sums, (unit + (1 + samples) * sums) * size)]
    hold(("mixed", "input grad"), mine, true, bounds, (dtype, dtype))
    for direct, dispatched in zip(
        mine, derived(lambda x: mf.cutmix(x, index, box), (x,), (True,), grad, watch=True), strict=True
    ):
        assert torch.equal(direct, dispatched)
        assert direct.stride() == dispatched.stride()


# cross-entropies


@st.composite
def logits(draw, backend, device):
    dtype, generator = draw(dtypes(backend)), draw(generators())
    samples, classes = draw(st.sampled_from([0, 1, 2, 3, 5, 8, 17, 33])), draw(sizes(1, least=1))[0]
    classes = draw(st.sampled_from([classes, classes, 255, 256, 257, 1000]))
    x = normal(generator, samples, classes) * draw(st.sampled_from([1.0, 5.0, 30.0]))
    return SimpleNamespace(
        x=draw(laid_out(x.to(dtype), device=device)), generator=generator, dtype=dtype, samples=samples,
        classes=classes, label_smoothing=draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
    )  # fmt: skip


def cross_entropy_bounds(x, label, grad, unit, sums):
    """Of the loss and the gradient, given what each class counts for in each row."""
    log_p = Approximate(x, unit, sums).log_softmax()
    loss = (log_p * -label).sum(1)
    # a logarithm's error is that of every class that counts, and of smoothed ones together
    loss.error += 4 * unit * (label.abs() * (1 + x.double().abs().amax(1, keepdim=True))).sum(1)
    total = label.sum(1, keepdim=True)
    x_grad = ((log_p.exp_of_negative() * total).minus(label)) * grad[:, None]
    x_grad.error += 8 * unit * label.abs() * grad.abs()[:, None]
    return loss, x_grad


def hold_cross_entropy(n, backend, ours, label, true_loss, data):
    """Either loss: value and gradient, in the dtype that they have; the same bits through the dispatcher."""
    grad = data.draw(gradients_like(ours(n.x), n.generator))
    mine = derived(ours, (n.x,), (True,), grad)
    true = derived(true_loss, (n.x.double(),), (True,), grad.double())
    assume(not (n.reduction == "mean" and true[0].isnan()))
    sums = UNIT[accumulation(n.dtype)]
    unit = UNIT[n.dtype] if backend == "triton" else sums
    upstream = grad.double().expand(n.samples)
    loss, x_grad = cross_entropy_bounds(n.x, label, upstream, unit, sums)
    if n.reduction != "none":
        loss = loss.sum(0)
    # float16's gradient is kept before it is divided by the number of samples
    x_grad.error += torch.finfo(n.dtype).smallest_normal * grad.double().abs().max() if n.samples else 0
    hold(("loss", "grad"), mine, true, (loss, x_grad), (accumulation(n.dtype), n.dtype))
    for direct, dispatched in zip(mine, derived(ours, (n.x,), (True,), grad, watch=True), strict=True):
        assert torch.equal(direct, dispatched)


@given(data=st.data())
def test_mixup_cross_entropy(backend, device, data):
    """Against its two terms, as PyTorch's own cross-entropy has them."""
    n = data.draw(logits(backend, device))
    ignore = data.draw(st.sampled_from([-100, -100, 0, n.classes - 1, 10**6]))
    targets = torch.randint(n.classes, (2, n.samples), generator=n.generator)
    targets[torch.rand(2, n.samples, generator=n.generator) < data.draw(st.sampled_from([0.0, 0.3, 1.0]))] = ignore
    a, b = (data.draw(laid_out(t, device=device, expand=False)) for t in targets)
    given_lam = data.draw(lams(n.samples, n.generator, device))
    lam = exact(given_lam, n.dtype).to(device)
    options = {"label_smoothing": n.label_smoothing, "ignore_index": ignore}

    def two_terms(x):
        rows = [F.cross_entropy(x, t, **options, reduction="none") for t in (a, b)]
        shares = lam.expand(n.samples), 1 - lam.expand(n.samples)
        terms = [share * row for share, row in zip(shares, rows, strict=True)]
        if n.reduction == "none":
            return terms[0] + terms[1]
        counts = [(t != ignore).sum() if n.reduction == "mean" else 1 for t in (a, b)]
        return sum(term.sum() / count for term, count in zip(terms, counts, strict=True))

    label = torch.zeros(n.samples, n.classes, dtype=torch.float64, device=device)
    for t, share in ((a, lam), (b, 1 - lam)):
        counted = t != ignore
        weight = share * counted / (counted.sum().clamp(min=1) if n.reduction == "mean" else 1)
        one_hot = F.one_hot(t.where(counted, 0), n.classes)
        label += weight[:, None] * ((1 - n.label_smoothing) * one_hot + n.label_smoothing / n.classes)

    def ours(x):
        return mf.mixup_cross_entropy(x, a, b, given_lam, **options, reduction=n.reduction)

    hold_cross_entropy(n, backend, ours, label, two_terms, data)


@given(data=st.data())
def test_soft_target_cross_entropy(backend, device, data):
    n = data.draw(logits(backend, device))
    target = torch.rand(n.samples, n.classes, generator=n.generator, dtype=torch.float64)
    target = target * (target > data.draw(st.sampled_from([0.0, 0.7])))
    dtype = data.draw(st.sampled_from([n.dtype, torch.float32]))
    target = data.draw(laid_out(target.to(dtype), device=device))
    options = {"label_smoothing": n.label_smoothing, "reduction": n.reduction}
    label = (1 - n.label_smoothing) * target.double() + n.label_smoothing / n.classes
    if n.reduction == "mean":
        label = label / max(1, n.samples)
    hold_cross_entropy(
        n, backend, lambda x: mf.soft_target_cross_entropy(x, target, **options), label,
        lambda x: F.cross_entropy(x, target.double(), **options), data,
    )  # fmt: skip


@given(data=st.data())
def test_mixup_binary_cross_entropy(backend, device, data):
    n = data.draw(logits(backend, device))
    a, b = (
        data.draw(laid_out(t, device=device)) for t in torch.randint(n.classes, (2, n.samples), generator=n.generator)
    )
    given_lam = data.draw(lams(n.samples, n.generator, device))
    lam = exact(given_lam, n.dtype).to(device)
    options = {"label_smoothing": n.label_smoothing, "reduction": n.reduction}
    options["threshold"] = data.draw(st.sampled_from([None, None, 0.2718]))
    weight = 3 * torch.rand(n.classes, generator=n.generator) if data.draw(st.booleans()) else None
    pos_weight = None if weight is None else data.draw(laid_out(weight, device=device))

    def ours(x):
        return mf.mixup_binary_cross_entropy(x, a, b, given_lam, pos_weight=pos_weight, **options)

    def plain(x):
        return reference.mixup_binary_cross_entropy(x, a, b, lam, pos_weight=pos_weight, **options)

    grad = data.draw(gradients_like(ours(n.x), n.generator))
    mine = derived(ours, (n.x,), (True,), grad)
    true = derived(plain, (n.x.double(),), (True,), grad.double())
    assume(n.samples or n.reduction != "mean")  # which is NaN
    sums = UNIT[accumulation(n.dtype)]
    unit = UNIT[n.dtype] if backend == "triton" else sums
    x, upstream = n.x.double(), grad.double().expand(n.x.shape)
    if n.reduction == "mean":
        upstream = upstream / max(1, n.x.numel())
    q = reference.mixed_labels(a, b, lam, n.classes, n.label_smoothing, options["threshold"], torch.float64)
    positive = q if pos_weight is None else q * pos_weight
    terms = positive * -F.logsigmoid(x) + (1 - q) * -F.logsigmoid(-x)
    rounding = (
        8 * unit * (terms + (positive + 1 - q) * (1 + x.abs()))
    )  # a label is off by a unit, and so its share of x
    loss = Approximate(terms, unit, sums, rounding)
    if n.reduction != "none":
        loss = loss.sum(0, 1) * (1 if n.reduction == "sum" else 1 / max(1, n.x.numel()))
    # float16's gradient is kept before it is divided by the number of logits
    underflow = torch.finfo(n.dtype).smallest_normal * grad.double().abs().max() if grad.numel() else 0
    x_grad = Approximate(true[1], unit, sums, 8 * unit * upstream.abs() * (positive + 1 - q) + underflow)
    hold(("loss", "grad"), mine, true, (loss, x_grad), (accumulation(n.dtype), n.dtype))
    for direct, dispatched in zip(mine, derived(ours, (n.x,), (True,), grad, watch=True), strict=True):
        assert torch.equal(direct, dispatched)


@given(data=st.data())
def test_both_cross_entropies_agree(backend, device, data):
    """Two labels, and the dense target that they stand for."""
    n = data.draw(logits(backend, device))
    a, b = torch.randint(n.classes, (2, n.samples), generator=n.generator).to(device)
    lam = torch.rand(n.samples, generator=n.generator).to(device)
    one_hot = (F.one_hot(t, n.classes).to(accumulation(n.dtype)) for t in (b, a))
    dense = torch.lerp(*one_hot, lam[:, None].to(accumulation(n.dtype)))
    options = {"label_smoothing": n.label_smoothing, "reduction": n.reduction}
    two = mf.mixup_cross_entropy(n.x, a, b, lam, **options)
    one = mf.soft_target_cross_entropy(n.x, dense.to(n.dtype), **options)
    rounding = 8 * UNIT[n.dtype] + (64 + n.classes) * UNIT[accumulation(n.dtype)]
    scale = (1 + n.x.double().abs().amax(1) * 2 + math.log(n.classes)).expand(n.samples)
    scale = scale if n.reduction == "none" else scale.sum() / (max(1, n.samples) if n.reduction == "mean" else 1)
    assert_within("loss", two, one.double(), rounding * scale)


# drawing and quadrature


@given(st.floats(1e-3, 1e3), st.integers(1, 24), st.sampled_from(FLOATS))
def test_quadrature_has_the_moments_of_the_distribution(alpha, num_nodes, dtype):
    """Of lam - 1/2 up to degree 2K - 1, by the beta function; nodes and weights are those of a symmetric mean."""
    lam, weight = mf.beta_quadrature(alpha, num_nodes, dtype=dtype)
    assert lam.dtype == weight.dtype == dtype
    assert lam.shape == weight.shape == (num_nodes,)
    assert ((lam >= 0) & (lam <= 1)).all()
    assert (weight >= 0).all()
    assert weight.double().sum().item() == pytest.approx(1, abs=num_nodes * UNIT[dtype])
    mf.PairwiseMixupLoss(lam, weight)  # takes them, whatever the dtype
    if dtype != torch.float64:
        return
    torch.testing.assert_close(lam.flip(0), 1 - lam, rtol=0, atol=1e-15)
    assert torch.equal(weight.flip(0), weight)
    for power in range(2, 2 * num_nodes, 2):
        found = (weight * (2 * lam - 1) ** power).sum().item()
        moment = math.exp(
            math.lgamma(power / 2 + 0.5) + math.lgamma(alpha + 0.5) - math.lgamma(0.5)
            - math.lgamma(power / 2 + alpha + 0.5)
        )  # fmt: skip
        assert found == pytest.approx(moment, rel=1e-9, abs=1e-14)


@given(st.integers(0, 40), st.floats(1e-3, 1e3), st.none() | numbers_in_0_1(), st.booleans(), st.integers(0, 2**63 - 1))
def test_drawing_partners(samples, alpha, lam, per_sample, seed):
    """A permutation and weights, again from the same seed, and as the module draws them."""
    options = {"lam": lam, "per_sample": per_sample}
    index, weight = mf.sample_mixup(samples, alpha, **options, generator=torch.Generator().manual_seed(seed))
    assert index.sort().values.tolist() == list(range(samples))
    assert weight.shape == ((samples,) if per_sample else ())
    assert ((weight >= 0) & (weight <= 1)).all()
    assert lam is None or (weight == torch.tensor(lam)).all()
    x, y = torch.arange(float(samples))[:, None], torch.arange(samples)
    mix = mf.Mixup(alpha, **options, generator=torch.Generator().manual_seed(seed))
    mixed, (first, second, again) = mix(x, y)
    assert torch.equal(first, y)
    assert torch.equal(second, index)
    assert torch.equal(again, weight)
    assert torch.equal(mixed, mf.mixup(x, index, weight))


# data and features


@given(data=st.data())
def test_multi_view_data_are_what_they_say(data):
    """Coefficients over orthonormal features give back every patch: two of the class's own, in the others noise."""
    classes, patches = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 7))
    samples, dim = data.draw(st.integers(0, 30)), 2 * classes + data.draw(st.integers(0, 5))
    views = data.draw(st.sampled_from(["both", 0, 1]))
    signal, noise = (sorted(data.draw(st.tuples(st.floats(0.1, 2), st.floats(0.1, 2)))) for _ in range(2))
    scale, generator = data.draw(st.sampled_from([0.0, 0.02, 1.0])), data.draw(generators())
    drawn = mf.data.multi_view(
        samples, classes, patches, dim, signal=signal, noise=noise, noise_scale=scale, views=views,
        generator=generator, dtype=torch.float64,
    )  # fmt: skip
    basis = drawn.features.flatten(0, 1)
    torch.testing.assert_close(basis @ basis.T, torch.eye(2 * classes, dtype=torch.float64))
    counts = drawn.target.bincount(minlength=classes)
    assert counts.max() - counts.min() <= 1
    coefficient = drawn.input @ basis.T
    torch.testing.assert_close(coefficient @ basis, drawn.input)
    coefficient = coefficient.unflatten(2, (classes, 2))
    for x, y in zip(coefficient, drawn.target, strict=True):
        own = x[:, y].clone()
        others = torch.cat([x[:, :y], x[:, y + 1 :]], 1)
        is_signal = own.abs().amax(1) > 1e-9
        assert is_signal.sum() == 2
        values = own[is_signal]
        used = values.abs() > 1e-9
        assert used.sum() == 2
        assert used[:, views].all() if views != "both" else (used.sum(0) == 1).all()
        assert values.sum().item() == pytest.approx(sum(signal))
        assert ((values[used] >= signal[0] - 1e-9) & (values[used] <= signal[1] + 1e-9)).all()
        assert (others[is_signal].abs() < 1e-9).all()
        rest = others[~is_signal]
        assert ((rest >= scale * noise[0] - 1e-9) & (rest <= scale * noise[1] + 1e-9)).all()


@given(data=st.data())
def test_patches_put_together_are_the_images(data):
    samples, channels, rows, columns = (data.draw(st.integers(0, 4)) for _ in range(4))
    size = data.draw(st.integers(1, 4))
    images = data.draw(laid_out(normal(data.draw(generators()), samples, channels, rows * size, columns * size)))
    patches = mf.data.images_to_patches(images, size)
    assert patches.shape == (samples, rows * columns, channels * size**2)
    for i in range(rows):
        for j in range(columns):
            part = images[:, :, i * size : (i + 1) * size, j * size : (j + 1) * size]
            assert torch.equal(patches[:, i * columns + j], part.flatten(1))


@given(data=st.data())
def test_images_of_two_features(data):
    """Each half is an image of its class, by a weight of the range, or nothing."""
    classes = 2 * data.draw(st.integers(1, 3))
    target = torch.tensor(
        data.draw(st.permutations([*range(classes), *data.draw(st.lists(st.integers(0, classes - 1), max_size=9))]))
    )
    low, high = sorted(data.draw(st.tuples(numbers_in_0_1(), numbers_in_0_1())))
    views = data.draw(st.sampled_from(["both", 0, 1]))
    images = torch.arange(1.0, len(target) + 1).view(-1, 1, 1, 1).expand(-1, 2, 3, 1).double()
    images = data.draw(laid_out(images, expand=False))
    pair = mf.data.TwoFeatureImages(images, target, views=views, weight=(low, high), generator=data.draw(generators()))
    index = torch.tensor(data.draw(st.lists(st.integers(-len(target), len(target) - 1), max_size=8)), dtype=torch.int64)
    input, labels = pair.batch(index)
    assert input.shape == (len(index), 4, 3, 1)
    assert torch.equal(labels, target[index])
    partners = pair.partner_class
    assert torch.equal(partners[partners], torch.arange(classes))
    assert (partners != torch.arange(classes)).all()
    first, second = input[:, 0, 0, 0], input[:, 2, 0, 0]
    assert (input[:, :2] == first.view(-1, 1, 1, 1)).all()
    assert (input[:, 2:] == second.view(-1, 1, 1, 1)).all()
    if views == 0:
        assert torch.equal(first, images[index, 0, 0, 0])
        assert not second.any()
        return
    assert torch.equal(target[pair.partner], partners[target])
    weight = torch.zeros(len(index)) if views == 1 else first / images[index, 0, 0, 0]
    assert views == 1 or ((weight >= low - 1e-9) & (weight <= high + 1e-9)).all()
    torch.testing.assert_close(second, (1 - weight) * images[pair.partner[index], 0, 0, 0], check_dtype=False)


@given(data=st.data())
def test_alignment_is_the_best_filter(data):
    classes, filters, views, dim = (data.draw(st.integers(1, 4)) for _ in range(4))
    runs, generator = data.draw(st.sampled_from([(), (1,), (3,), (2, 3)])), data.draw(generators())
    weight = data.draw(laid_out(normal(generator, *runs, classes, filters, dim)))
    shared = data.draw(st.booleans())
    features = data.draw(laid_out(normal(generator, *(() if shared else runs), classes, views, dim)))
    found = mf.features.alignment(weight, features)
    assert found.shape == (*runs, classes, views)
    true = torch.einsum("...cmd,...cvd->...cmv", weight, features).amax(-2)
    torch.testing.assert_close(found, true)


@given(data=st.data())
def test_learned_is_counting(data):
    """One point after the other."""
    classes, runs, views = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    threshold, generator = data.draw(st.sampled_from([0.0, 0.5, 2 / 3, 0.9])), data.draw(generators())
    sets = []
    for _ in range(views):
        target = torch.arange(classes * data.draw(st.integers(1, 5))) % classes
        logits = torch.randint(3, (runs, len(target), classes), generator=generator).double()
        sets.append(SimpleNamespace(input=logits, target=target))
    found = mf.features.learned(lambda logits: logits, sets, threshold)
    assert found.shape == (runs, classes, views)
    for v, points in enumerate(sets):
        for r in range(runs):
            right, all_of = Counter(), Counter()
            for row, y in zip(points.input[r].tolist(), points.target.tolist(), strict=True):
                all_of[y] += 1
                right[y] += all(row[y] > other for c, other in enumerate(row) if c != y)
            for c in range(classes):
                assert found[r, c, v] == (right[c] / all_of[c] > threshold)


# bad arguments


INDEX, LABELS = torch.tensor([1, 2, 0, 3]), torch.tensor([0, 1, 2, 0])
CALLS = {
    "patch_conv": (
        mf.patch_conv,
        {"input": torch.ones(4, 3, 5), "weight": torch.ones(3, 2, 5), "activation": POLY, "index": INDEX, "lam": 0.3},
    ),
    "pairwise_mixup_loss": (
        mf.pairwise_mixup_loss,
        {
            "input": torch.ones(4, 3, 5), "weight": torch.ones(3, 2, 5), "target": LABELS, "activation": POLY,
            "lam": torch.tensor([0.25, 0.5]), "lam_weight": torch.tensor([0.5, 0.5]),
        },
    ),
    "mixup": (mf.mixup, {"input": torch.ones(4, 3), "index": INDEX, "lam": torch.ones(4), "dtype": torch.float32}),
    "mixup_cross_entropy": (
        mf.mixup_cross_entropy,
        {
            "input": torch.ones(4, 3), "target_a": LABELS, "target_b": LABELS, "lam": 0.5, "label_smoothing": 0.1,
            "ignore_index": -100, "reduction": "mean",
        },
    ),
    "soft_target_cross_entropy": (
        mf.soft_target_cross_entropy,
        {"input": torch.ones(4, 3), "target": torch.ones(4, 3), "label_smoothing": 0.1, "reduction": "mean"},
    ),
    "sample_mixup": (mf.sample_mixup, {"num_samples": 4, "alpha": 0.5, "lam": 0.5, "generator": torch.Generator()}),
    "beta_quadrature": (mf.beta_quadrature, {"alpha": 0.5, "num_nodes": 3, "dtype": torch.float64}),
    "multi_view": (
        mf.data.multi_view,
        {
            "num_samples": 4, "num_classes": 3, "num_patches": 4, "patch_dim": 7, "signal": (0.1, 0.2),
            "noise": (0.1, 0.2), "noise_scale": 0.1, "views": 1, "features": torch.eye(7)[:6].view(3, 2, 7),
            "generator": torch.Generator(), "dtype": torch.float64,
        },
    ),
    "images_to_patches": (mf.data.images_to_patches, {"images": torch.ones(2, 3, 4, 4), "patch_size": 2}),
    "TwoFeatureImages": (
        mf.data.TwoFeatureImages,
        {
            "images": torch.ones(4, 3, 2, 2), "target": torch.tensor([0, 1, 1, 0]), "views": "both",
            "partner_class": torch.tensor([1, 0]), "weight": (0.5, 1), "generator": torch.Generator(),
        },
    ),
    "alignment": (mf.features.alignment, {"weight": torch.ones(3, 2, 5), "features": torch.ones(3, 2, 5)}),
    "TwoLayerPatchCNN": (
        mf.TwoLayerPatchCNN,
        {
            "num_classes": 3, "filters_per_class": 2, "patch_dim": 5, "activation": POLY, "num_runs": 2,
            "init_std": 0.1, "generator": torch.Generator(), "dtype": torch.float32,
        },
    ),
    "Mixup": (mf.Mixup, {"alpha": 0.5, "lam": 0.5, "num_classes": 3, "generator": torch.Generator()}),
    "PairwiseMixupLoss": (
        mf.PairwiseMixupLoss, {"lam": torch.tensor([0.25, 0.5]), "lam_weight": torch.tensor([0.5, 0.5])}
    ),
    "MixupCrossEntropyLoss": (
        mf.MixupCrossEntropyLoss, {"label_smoothing": 0.1, "ignore_index": -100, "reduction": "mean"}
    ),
    "PolyReLU": (mf.PolyReLU, {"degree": 8, "rho": 0.1, "clamp": True}),
    "PowerReLU": (mf.PowerReLU, {"degree": 3}),
}  # fmt: skip


def junk():
    """What no argument may be."""
    tensors = st.sampled_from(
        [
            torch.ones(2, dtype=torch.complex64), torch.ones(4, 3, 5, dtype=torch.complex128), torch.tensor(True),
            torch.ones(4, 3, 5, device="meta"), torch.ones(4, 3, 5).to_sparse(), torch.ones(1, 1, 1, 1, 1, 1),
            torch.ones(4, 3, dtype=torch.int32), torch.full((4,), math.nan), torch.full((4,), 7, dtype=torch.int64),
            torch.full((4,), -(2**62)), torch.ones(4, requires_grad=True), torch.ones(3, 2, 9),
            torch.ones(4, 3, device="meta", dtype=torch.int64), torch.ones(4, 3).to_sparse_csr(), torch.ones(0, 0),
            torch.ones(2, 3, 4, 4).to_sparse(), torch.ones(4, dtype=torch.int64).to_sparse(), torch.ones(4).to_sparse(),
        ]
    )  # fmt: skip
    numbers = st.sampled_from([math.nan, math.inf, -math.inf, -1, -0.5, 2.5, 10**400, 1j, True, -(2**70)])
    others = [None, "", "many", b"x", [], [1, [2]], (), {}, {1}, object, object(), len, torch, ..., "0.5"]
    return tensors | numbers | st.sampled_from(others)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@given(data=st.data())
def test_bad_arguments_are_named(name, data):
    """One argument is not what it should be: either it serves all the same, or the error says which."""
    function, arguments = CALLS[name]
    argument, value = data.draw(st.sampled_from(sorted(arguments))), data.draw(junk())
    text = None
    try:
        function(**{**arguments, argument: value})
    except (TypeError, ValueError, IndexError) as error:
        text = str(error)
    if text is not None:
        assert any(text.startswith((f"{key} ", f"{key}[", f"{key}'s ")) for key in arguments), text
        assert "got" in text or "needed" in text or "must not require grad" in text, text


@pytest.mark.parametrize("name", CALLS)
def test_good_arguments_are_taken(name):
    """Those that the test above spoils."""
    function, arguments = CALLS[name]
    function(**arguments)
