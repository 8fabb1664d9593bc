"""What the operators have in common in how they are called."""

import pytest
import torch
from torch.autograd import forward_ad

import mixfeat as mf

W = torch.randn(2, 3, 5)
TARGET, INDEX, LAM = torch.tensor([0, 1, 1, 0]), torch.tensor([3, 0, 0, 1]), torch.tensor(0.3)
OPERATORS = {
    "patch_conv": lambda x: mf.patch_conv(x, W, mf.ReLU()),
    "pairwise_mixup_loss": lambda x: mf.pairwise_mixup_loss(x, W, TARGET, mf.ReLU()),
    "mixup": lambda x: mf.mixup(x, INDEX, LAM),
    "mixup_cross_entropy": lambda x: mf.mixup_cross_entropy(x[:, 0], TARGET, TARGET[INDEX], LAM),
    "soft_target_cross_entropy": lambda x: mf.soft_target_cross_entropy(x[:, 0], torch.full((4, 5), 0.2)),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_forward_mode_is_refused(name, requires_grad):
    """Rather than taken for a derivative of zero."""
    f, x = OPERATORS[name], torch.randn(4, 3, 5, requires_grad=requires_grad)
    with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode derivative"):
        torch.func.jvp(f, (x,), (torch.ones_like(x),))
    with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode derivative"):
        torch.func.jacfwd(f)(x)
    expected = f(x.detach())
    with forward_ad.dual_level():
        assert torch.equal(f(x).detach(), expected)  # of no tangent
        with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode derivative"):
            f(forward_ad.make_dual(x, torch.ones_like(x)))
