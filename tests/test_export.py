"""Programs exported by torch.export, saved and loaded; modules and activations pickled, copied and put on disk."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.export import Dim

import mixfeat as mf

POLY = mf.PolyReLU(8, 0.1)
N, C = Dim("n", min=2, max=1000), 3


class Call(nn.Module):
    """A function as a module, as torch.export takes them."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *tensors):
        return self.f(*tensors)


class Objective(nn.Module):
    """A network and its loss."""

    def __init__(self):
        super().__init__()
        self.network, self.loss = mf.TwoLayerPatchCNN(C, 2, 4, POLY), mf.PairwiseMixupLoss()

    def forward(self, x, y):
        return self.loss(self.network, x, y)


def inputs(samples):
    """Every operator's, by name: x, w, target, partner, lam, logits, probabilities."""
    index, target = torch.randint(samples, (samples,)), torch.randint(C, (samples,))
    return {
        "x": torch.randn(samples, 5, 4), "w": torch.randn(C, 2, 4) * 0.1, "target": target, "index": index,
        "partner": target[index], "lam": torch.rand(samples), "logits": torch.randn(samples, C),
        "probabilities": torch.rand(samples, C), "images": torch.randint(256, (samples, 3, 4, 4), dtype=torch.uint8),
    }  # fmt: skip


CUBE = mf.Power(3)  # made here, as PyTorch 2.10 does not trace how a dataclass is made
NODES = dict(zip(("lam", "lam_weight"), mf.beta_quadrature(1.0, 3), strict=True))
PROGRAMS = {
    "patch_conv": (lambda x, w: mf.patch_conv(x, w, POLY), "x w"),
    "patch_conv of mixed samples": (
        lambda x, w, index, lam: mf.patch_conv(x, w, POLY, index=index, lam=lam), "x w index lam"
    ),
    "patch_conv with a number lam": (
        lambda x, w, index: mf.patch_conv(x, w, CUBE, index=index, lam=0.3), "x w index"
    ),
    "pairwise_mixup_loss": (lambda x, w, y: mf.pairwise_mixup_loss(x, w, y, POLY), "x w target"),
    "pairwise_mixup_loss of nodes": (lambda x, w, y: mf.pairwise_mixup_loss(x, w, y, POLY, **NODES), "x w target"),
    "mixup": (mf.mixup, "x index lam"),
    "mixup of bytes": (lambda x, index: mf.mixup(x, index, 0.5, dtype=torch.bfloat16), "images index"),
    "mixup_cross_entropy": (mf.mixup_cross_entropy, "logits target partner lam"),
    "mixup_cross_entropy of rows": (
        lambda *a: mf.mixup_cross_entropy(*a, label_smoothing=0.1, reduction="none"), "logits target partner lam"
    ),
    "soft_target_cross_entropy": (mf.soft_target_cross_entropy, "logits probabilities"),
    "TwoLayerPatchCNN": (mf.TwoLayerPatchCNN(C, 2, 4, POLY), "x"),
    "TwoLayerPatchCNN of runs": (mf.TwoLayerPatchCNN(C, 2, 4, POLY, num_runs=2), "x index lam"),
    "MixupCrossEntropyLoss": (
        lambda logits, a, b, lam: mf.MixupCrossEntropyLoss()(logits, (a, b, lam)), "logits target partner lam"
    ),
    "PairwiseMixupLoss": (Objective(), "x target"),
    "Mixup at rest": (mf.Mixup(0.3, num_classes=C).eval(), "x target"),
}  # fmt: skip


def exported(name, strict):
    program, arguments = PROGRAMS[name]
    module = program if isinstance(program, nn.Module) else Call(program)
    example, names = inputs(6), arguments.split()
    shapes = tuple(None if key == "w" else {0: N} for key in names)
    dynamic = shapes if isinstance(program, nn.Module) else (shapes,)
    with torch.no_grad():
        return torch.export.export(module, tuple(example[k] for k in names), dynamic_shapes=dynamic, strict=strict)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # PyTorch 2.10 of its own files
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_export(name, strict):
    """At another number of samples than that of the example, before and after a round trip through a file."""
    torch._dynamo.reset()
    program, arguments = PROGRAMS[name]
    first = exported(name, strict)
    file = io.BytesIO()
    torch.export.save(first, file)
    file.seek(0)
    again = torch.export.load(file)
    for samples in (6, 9, 2):
        drawn = inputs(samples)
        args = [drawn[key] for key in arguments.split()]
        with torch.no_grad():
            expected = program(*args)
            for found in (first.module()(*args), again.module()(*args)):
                torch.testing.assert_close(found, expected)
    targets = {str(node.target) for node in first.graph.nodes}
    assert name == "Mixup at rest" or any(target.startswith("mixfeat.") for target in targets), targets


def test_exported_program_trains():
    """An exported loss has gradients: those of the loss."""
    model = mf.TwoLayerPatchCNN(C, 2, 4, POLY)
    drawn = inputs(6)
    args = drawn["x"], drawn["index"], drawn["lam"]
    exported = torch.export.export(model, args).module()
    for m in (model, exported):
        m(*args).square().sum().backward()
    torch.testing.assert_close(exported.weight.grad, model.weight.grad)
    assert model.weight.grad.any()


# pickling and copies

ACTIVATIONS = [POLY, mf.PolyReLU(3, 0.5, clamp=False), mf.PowerReLU(3), mf.Power(7), mf.ReLU(), mf.Identity()]
COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    **{f"pickle {p}": lambda v, p=p: pickle.loads(pickle.dumps(v, p)) for p in range(2, pickle.HIGHEST_PROTOCOL + 1)},
}


def saved(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


COPIES["torch.save"] = lambda value: saved(value, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_activations_round_trip(activation, how):
    twin = COPIES[how](activation)
    assert twin == activation
    assert hash(twin) == hash(activation)
    assert repr(twin) == repr(activation)
    assert twin.polynomial == activation.polynomial
    z = torch.randn(50)
    assert torch.equal(twin(z), activation(z))
    x, w = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    assert torch.equal(mf.patch_conv(x, w, twin), mf.patch_conv(x, w, activation))


def run(module, seed):
    """What a module yields for inputs and draws of this seed, as a list."""
    torch.manual_seed(seed)
    drawn = inputs(6)
    if isinstance(module, mf.TwoLayerPatchCNN):
        return [module(drawn["x"], drawn["index"], drawn["lam"])]
    if isinstance(module, mf.PairwiseMixupLoss):
        return [module(mf.TwoLayerPatchCNN(C, 2, 4, POLY), drawn["x"], drawn["target"])]
    if isinstance(module, mf.Mixup):
        mixed, target = module(drawn["x"], drawn["target"])
        return [mixed, *(target if isinstance(target, tuple) else [target])]
    return [module(drawn["logits"], (drawn["target"], drawn["partner"], drawn["lam"]))]


MODULES = {
    "network": lambda: mf.TwoLayerPatchCNN(C, 2, 4, POLY, dtype=torch.float32),
    "networks": lambda: mf.TwoLayerPatchCNN(C, 2, 4, mf.Power(2), num_runs=3, init_std=0.2),
    "midpoint": mf.PairwiseMixupLoss,
    "nodes": lambda: mf.PairwiseMixupLoss(*mf.beta_quadrature(0.5, 3)),
    "mixup": lambda: mf.Mixup(0.4, per_sample=True),
    "dense": lambda: mf.Mixup(lam=0.5, num_classes=C),
    "drawn": lambda: mf.Mixup(0.4, generator=torch.Generator().manual_seed(3)),
    "loss": lambda: mf.MixupCrossEntropyLoss(0.1, 2, "none"),
}


@pytest.mark.parametrize("how", [how for how in COPIES if how != "copy"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_round_trip(name, how):
    """Into one that has nothing in common with the original, and goes on as it would, generator included."""
    module = MODULES[name]().train()
    twin = COPIES[how](module)
    assert repr(twin) == repr(module)
    assert twin.training
    for seed in (1, 2):
        for a, b in zip(run(module, seed), run(twin, seed), strict=True):
            assert torch.equal(a, b)
    expected = run(module, 3)
    for parameter in twin.parameters():
        parameter.data.zero_()
    run(twin, 4)
    if name != "drawn":
        for a, b in zip(run(module, 3), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", MODULES)
def test_state_dict_round_trip(name):
    """Through a file that is read with weights_only, into a module made anew, in another dtype too."""
    module = MODULES[name]()
    state = saved(module.state_dict(), weights_only=True)
    assert state.keys() == module.state_dict().keys() == dict(module.named_parameters()).keys()
    twin = MODULES[name]()
    twin.load_state_dict(state)
    for a, b in zip(run(module, 1), run(twin, 1), strict=True):
        assert torch.equal(a, b)
    double = MODULES[name]().double()
    double.load_state_dict(state)
    for key, value in double.state_dict().items():
        assert value.dtype == torch.float64
        assert torch.equal(value, state[key].double())
    if state:
        with pytest.raises(RuntimeError, match="Missing key"):
            twin.load_state_dict({})
        with pytest.raises(RuntimeError, match="size mismatch"):
            twin.load_state_dict({"weight": torch.zeros(C, 2, 5)})
