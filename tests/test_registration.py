"""The operators where PyTorch lacks the private names that make calls short."""

import pytest

DISPATCH = {"_len_torch_dispatch_stack", "_are_functorch_transforms_active", "_autograd", "_FunctionBase"}
CODE = """
import torch, types
from torch.autograd import forward_ad

class Without(types.ModuleType):
    def __getattr__(self, name):
        if name in missing:
            raise AttributeError(name)
        return getattr(whole, name)

whole, torch._C = torch._C, Without("torch._C")
level = forward_ad.__dict__.pop("_current_level")
import mixfeat as mf
torch._C, forward_ad._current_level = whole, level

torch.manual_seed(0)
x, w = torch.randn(4, 3, 5, requires_grad=True), torch.randn(2, 3, 5, requires_grad=True)
y, other, lam = torch.tensor([0, 1, 1, 0]), torch.tensor([3, 2, 0, 1]), torch.rand(4)
phi, soft = mf.PolyReLU(3), x[:, 1].detach().softmax(1)

def call(f):
    return (
        f.patch_conv(x, w, phi, index=other, lam=lam), f.pairwise_mixup_loss(x, w, y, phi), f.mixup(x, other, lam),
        f.mixup_cross_entropy(x[:, 0], y, y[other], lam), f.soft_target_cross_entropy(x[:, 0], soft),
    )

def results(outputs):
    return [*(o.detach() for o in outputs), *torch.autograd.grad([o.square().sum() for o in outputs], (x, w))]

formula = results(call(mf.reference))
for ours in (call(mf), torch.compile(lambda: call(mf), fullgraph=True, backend="aot_eager")()):
    for a, b in zip(results(ours), formula, strict=True):
        torch.testing.assert_close(a, b)
print("served")
"""


@pytest.mark.parametrize("missing", [DISPATCH, DISPATCH | {"_AutoDispatchBelowAutograd"}], ids=["dispatch", "all"])
def test_without_private_names(run_python, missing):
    """Values and gradients of all operators, called plainly and compiled."""
    assert run_python(f"missing = {missing}\n{CODE}") == "served\n"
