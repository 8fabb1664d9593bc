"""The Triton kernels of mixup against the formulas in float64, called as the operator calls them: see triton_checks."""

from functools import partial

import pytest
import torch
from triton_checks import DEVICE, HALF, NAN, error, poisoned, running

from mixfeat import reference
from mixfeat.ops import fallback

FLOATS = (torch.float32, *HALF)


def run(input, index, lam, dtype):
    """(N,K) mixed samples."""
    from mixfeat.kernels.triton import mixup

    output = torch.full(input.shape, NAN, dtype=dtype, device=DEVICE)
    with poisoned():
        mixup.mixup(input, index, lam, output)
    return output


def run_backward(grad, index, lam):
    """(N,K) gradient to the input."""
    from mixfeat.kernels.triton import mixup

    input_grad = torch.full(grad.shape, NAN, dtype=grad.dtype, device=DEVICE)
    mixup.mixup_backward(grad, index, lam, input_grad)
    return input_grad


def problem(samples, width, dtype=torch.float32, one_lam=False):
    """Random input, or gradient; index, by which some samples serve twice and others never; lam."""
    if dtype == torch.uint8:
        x = torch.randint(256, (samples, width), dtype=dtype, device=DEVICE)
    else:
        x = torch.randn(samples, width, device=DEVICE).to(dtype)
    index = torch.randint(max(samples, 1), (samples,), device=DEVICE)
    return x, index, torch.rand(() if one_lam else samples, device=DEVICE)


def check_forward(samples, width, dtype, result_dtype, one_lam):
    x, index, lam = problem(samples, width, dtype, one_lam)
    truth = reference.mixup(x.double(), index, lam.double())
    plain = reference.mixup(x if dtype == result_dtype else x.float(), index, lam.to(result_dtype)).to(result_dtype)
    limit = 1e-6 if result_dtype == torch.float32 else 2 * error(plain, truth)
    assert error(run(x, index, lam, result_dtype), truth) <= limit


def check_backward(samples, width, dtype, one_lam, same_partner=False):
    grad, index, lam = problem(samples, width, dtype, one_lam)
    if same_partner:
        index.fill_(samples - 1)
    truth = fallback.mixup_backward(grad.double(), index, lam.double())
    limit = 1e-6 if dtype == torch.float32 else 2 * error(fallback.mixup_backward(grad, index, lam.to(dtype)), truth)
    result = run_backward(grad, index, lam)
    assert error(result, truth) <= limit
    assert torch.equal(result, run_backward(grad, index, lam))


def check_strides(dtype):
    """Results for tensors of any layout are those for their contiguous copies, to the bit."""
    x, index, lam = problem(5, 12, dtype)
    far = torch.empty(2 * 2**31 + 64, dtype=torch.float16, device=DEVICE).view(dtype)
    far = far.as_strided((3, 12), (2**32 // dtype.itemsize, 1))  # only the pages that are written take memory
    far.copy_(x[:3])
    layouts = [
        (x[:1].expand(5, 12), index, lam[:1].expand(5)),
        (torch.cat([x, x], 1)[:, 3:15], index[:1].expand(5), lam),
        (torch.cat([x, x], 1)[:, 4:16], torch.stack([index, index], 1)[:, 0], torch.stack([lam, lam], 1)[:, 0]),
        (torch.stack([x, x], 2)[..., 0][:, :1], index, lam),
        (far, index[:3] % 3, lam[:3]),
    ]
    for x, index, lam in layouts:
        copies = x.contiguous(), index.contiguous(), lam.contiguous()
        assert torch.equal(run(x, index, lam, dtype), run(*copies, dtype))
        assert torch.equal(run_backward(x, index, lam), run_backward(*copies))


def check_output_strides():
    """What lies between the rows of a result is not touched."""
    from mixfeat.kernels.triton import mixup

    x, index, lam = problem(5, 6)
    for launch, expected in ((mixup.mixup, reference.mixup), (mixup.mixup_backward, fallback.mixup_backward)):
        memory = torch.full((5, 9), NAN, device=DEVICE)
        launch(x, index, lam, memory[:, 1:7])
        torch.testing.assert_close(memory[:, 1:7], expected(x, index, lam))
        assert memory[:, [0, 7, 8]].isnan().all()


def check_index_out_of_range(partner):
    """The sample gets NaN, and nobody a share of its gradient; the others are what they would be."""
    x, index, lam = problem(5, 10)
    index[2] = partner
    others = [0, 1, 3, 4]
    mixed, input_grad = run(x, index, lam, torch.float32), run_backward(x, index, lam)
    assert mixed[2].isnan().all()
    assert input_grad[2].isnan().all()
    index[2], grad = 2, x.double()
    assert error(mixed[others], reference.mixup(x.double(), index, lam)[others]) <= 1e-6
    assert error(input_grad[others], fallback.mixup_backward(grad, index, lam)[others]) <= 1e-6


def check_not_finite(value):
    """It reaches its own mix and that of whom it is the partner of, and no others."""
    x = torch.randn(4, 5, device=DEVICE)
    x[1, 3] = value
    index, lam = torch.tensor([2, 3, 1, 0], device=DEVICE), torch.tensor(0.3, device=DEVICE)
    for result, truth in (
        (run(x, index, lam, torch.float32), reference.mixup(x, index, lam)),
        (run_backward(x, index, lam), fallback.mixup_backward(x, index, lam)),
    ):
        torch.testing.assert_close(result, truth, equal_nan=True)


def check_tiles():
    """Rows of many tiles, and tiles of many rows, in few elements: tiles smaller than those that ship."""
    from unittest import mock

    from mixfeat.kernels.triton import configs

    with mock.patch.object(configs, "MIXUP_CONFIG", configs.MixupConfig(vectors=4, elements=8)):
        for samples, width in ((5, 100), (9, 33), (3, 17), (37, 2), (7, 16)):
            check_forward(samples, width, torch.float32, torch.float32, False)
            check_backward(samples, width, torch.float32, False)


SHAPES = [(1, 1), (1, 7), (2, 1), (37, 3), (5, 33), (130, 16), (3, 1000), (2, 5001)]
CHECKS = {
    **{
        f"forward-{samples}x{width}-{one_lam}": partial(
            check_forward, samples, width, torch.float32, torch.float32, one_lam
        )
        for samples, width in SHAPES
        for one_lam in (False, True)
    },
    **{
        f"forward-{dtype}-{result}-{width}": partial(check_forward, 40, width, dtype, result, False)
        for dtype, result in [(d, d) for d in HALF] + [(torch.uint8, d) for d in FLOATS]
        for width in (24, 147)
    },
    **{
        f"backward-{samples}x{width}-{one_lam}": partial(check_backward, samples, width, torch.float32, one_lam)
        for samples, width in SHAPES
        for one_lam in (False, True)
    },
    **{
        f"backward-{dtype}-{width}": partial(check_backward, 40, width, dtype, False)
        for dtype in HALF
        for width in (24, 147)
    },
    **{f"backward-{n}": partial(check_backward, n, 5, torch.float32, False) for n in (513, 8193)},  # searched, sorted
    "backward-same-partner": partial(check_backward, 40, 24, torch.float32, False, same_partner=True),
    **{f"empty-{shape}": partial(check_forward, *shape, *[torch.float32] * 2, True) for shape in ((0, 3), (3, 0))},
    **{f"empty-backward-{shape}": partial(check_backward, *shape, torch.float32, True) for shape in ((0, 3), (3, 0))},
    **{f"strides-{dtype}": partial(check_strides, dtype) for dtype in (torch.float32, torch.float16)},
    "output-strides": check_output_strides,
    "tiles": check_tiles,
    **{f"index-{partner}": partial(check_index_out_of_range, partner) for partner in (-1, 5, 2**40, -(2**40))},
    **{f"not-finite-{value}": partial(check_not_finite, value) for value in (NAN, float("inf"))},
}


@pytest.fixture(scope="module")
def checks(request):
    with running(request) as checks:
        yield checks


@pytest.mark.triton
@pytest.mark.parametrize("name", CHECKS)
def test_kernel(checks, name):
    checks(name)
