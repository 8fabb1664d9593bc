import copy
import math
import pickle

import pytest
import torch

import mixfeat as mf

ALL = [
    *(mf.PolyReLU(q, rho, clamp) for q in range(1, 17) for rho in (0.1, 2.0) for clamp in (True, False)),
    *(kind(q) for kind in (mf.PowerReLU, mf.Power) for q in range(1, 17)),
    mf.ReLU(),
    mf.Identity(),
]


def definition(activation, z: float) -> float:
    """Each activation as the literature writes it, one number at a time."""
    match activation:
        case mf.PolyReLU(degree=q, rho=rho, clamp=clamp):
            if clamp and z <= 0:
                return 0.0
            return z**q / (q * rho ** (q - 1)) if z < rho else z - (1 - 1 / q) * rho
        case mf.PowerReLU(degree=q):
            return max(z, 0.0) ** q
        case mf.Power(degree=q):
            return z**q
        case mf.ReLU():
            return max(z, 0.0)
        case _:
            return z


@pytest.mark.parametrize("activation", ALL, ids=repr)
def test_matches_its_definition(activation):
    z = torch.cat([2 * torch.randn(50, dtype=torch.float64), torch.tensor([0.0, 0.1, 2.0, 1e-9, -1e-9])])
    expected = torch.tensor([definition(activation, v) for v in z.tolist()], dtype=torch.float64)
    torch.testing.assert_close(activation(z), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("activation", ALL, ids=repr)
def test_derivative_is_the_familys(activation):
    """phi' = scale / threshold * u^(degree - 1), at kinks too."""
    p = activation.polynomial
    z = torch.cat(
        [torch.randn(50, dtype=torch.float64), torch.tensor([0.0, p.threshold, -p.threshold])]
    ).requires_grad_()
    t = z.detach() / p.threshold
    u = t.clamp(max=1) if p.upper else t
    if p.lower:
        u = u.clamp(min=0)
    slope = p.scale / p.threshold * u ** (p.degree - 1)
    if p.degree == 1 and p.lower:
        slope = slope * (t > 0)
    (grad,) = torch.autograd.grad(activation(z).sum(), z)
    torch.testing.assert_close(grad, slope, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(p.slope(z.detach()), slope, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "activation", [mf.PolyReLU(8, 0.1), mf.PowerReLU(3), mf.Power(4), mf.ReLU(), mf.Identity()], ids=repr
)
def test_values_and_gradients_stay_finite_and_nan_shows(activation):
    z = torch.tensor([-1e4, 1e4, 0.0, math.nan], requires_grad=True)
    y = activation(z)
    (grad,) = torch.autograd.grad(y.sum(), z)
    assert y[:3].isfinite().all()
    assert grad[:3].isfinite().all()
    assert y[3].isnan()


def test_are_values():
    a, b = mf.PolyReLU(8, 0.1), mf.PolyReLU(degree=8, rho=0.1, clamp=True)
    assert a == b
    assert hash(a) == hash(b)
    assert a != mf.PolyReLU(8, 0.2)
    assert mf.PowerReLU(3) != mf.Power(3)
    assert repr(a) == "PolyReLU(degree=8, rho=0.1, clamp=True)"
    assert eval(repr(a), vars(mf)) == a
    for activation in (a, mf.ReLU()):
        assert pickle.loads(pickle.dumps(activation)) == activation
        assert copy.deepcopy(activation).polynomial == activation.polynomial
    with pytest.raises(AttributeError):
        a.degree = 3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: mf.PolyReLU(-1), ValueError, "degree must be between 1 and 16, got -1"),
        (lambda: mf.PolyReLU(0), ValueError, "degree must be between 1 and 16, got 0"),
        (lambda: mf.Power(17), ValueError, "degree must be between 1 and 16, got 17"),
        (lambda: mf.PowerReLU(2.5), TypeError, "degree must be an integer, got 2.5"),
        (lambda: mf.PowerReLU(math.nan), TypeError, "degree must be an integer, got nan"),
        (lambda: mf.Power(True), TypeError, "degree must be an integer, got True"),
        (lambda: mf.PolyReLU(8, 0), ValueError, "rho must be finite and positive, got 0"),
        (lambda: mf.PolyReLU(8, -0.1), ValueError, "rho must be finite and positive, got -0.1"),
        (lambda: mf.PolyReLU(8, math.nan), ValueError, "rho must be finite and positive, got nan"),
        (lambda: mf.PolyReLU(8, math.inf), ValueError, "rho must be finite and positive, got inf"),
        (lambda: mf.PolyReLU(8, "0.1"), TypeError, "rho must be a number, got '0.1'"),
        (lambda: mf.PolyReLU(8, 0.1, clamp=1), TypeError, "clamp must be a bool, got 1"),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()
