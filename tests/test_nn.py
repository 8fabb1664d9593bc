import processes
import pytest
import torch
from torch.nn import functional as F

import mixfeat as mf

POLY = mf.PolyReLU(8, 0.1)


@pytest.mark.parametrize("num_runs", [None, 3])
def test_is_patch_conv(num_runs):
    model = mf.TwoLayerPatchCNN(4, 5, 6, POLY, num_runs=num_runs)
    x, index = torch.randn(7, 3, 6), torch.randint(7, (7,))
    assert torch.equal(model(x), mf.patch_conv(x, model.weight, POLY))
    assert torch.equal(model(x, index, 0.5), mf.patch_conv(x, model.weight, POLY, index=index, lam=0.5))
    assert model(x).shape == ((7, 4) if num_runs is None else (3, 7, 4))


def test_weights_are_drawn_from_the_generator():
    def make(seed):
        return mf.TwoLayerPatchCNN(50, 40, 30, POLY, init_std=0.3, generator=torch.Generator().manual_seed(seed))

    a, b, c = make(0), make(0), make(1)
    assert torch.equal(a.weight, b.weight)
    assert not torch.equal(a.weight, c.weight)
    deviation = a.weight.std().item() / 0.3  # of 60,000 draws: its own standard deviation is 0.003
    assert 0.98 < deviation < 1.02
    a.reset_parameters(torch.Generator().manual_seed(1))
    assert torch.equal(a.weight, c.weight)


def test_default_init_std():
    assert mf.TwoLayerPatchCNN(2, 3, 16, POLY).init_std == pytest.approx(0.07)
    assert mf.TwoLayerPatchCNN(2, 3, 16, mf.Power(3)).init_std == 0.25


def test_dtype_device_and_repr():
    model = mf.TwoLayerPatchCNN(2, 3, 4, POLY, num_runs=5, dtype=torch.float64)
    assert model.weight.dtype == torch.float64
    assert repr(model) == "TwoLayerPatchCNN(2, 3, 4, PolyReLU(degree=8, rho=0.1, clamp=True), num_runs=5)"
    assert mf.TwoLayerPatchCNN(2, 3, 4, POLY, device="meta").weight.device.type == "meta"


def test_learns():
    """Plain training: a separable problem to full accuracy."""
    data = mf.data.multi_view(64, 4, 6, generator=torch.Generator().manual_seed(0))
    model = mf.TwoLayerPatchCNN(4, 8, 8, mf.PolyReLU(3, 0.25), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=2)
    for _ in range(400):
        optimizer.zero_grad()
        F.cross_entropy(model(data.input), data.target).backward()
        optimizer.step()
    assert (model(data.input).argmax(-1) == data.target).all()


def test_runs_train_as_if_alone():
    x, target = torch.randn(3, 12, 4, 6), torch.randint(4, (3, 12))
    model = mf.TwoLayerPatchCNN(4, 5, 6, POLY, num_runs=3)
    F.cross_entropy(model(x).flatten(0, 1), target.flatten(), reduction="sum").backward()
    for r in range(3):
        alone = mf.TwoLayerPatchCNN(4, 5, 6, POLY)
        alone.weight.data = model.weight.detach()[r].clone()
        F.cross_entropy(alone(x[r]), target[r], reduction="sum").backward()
        torch.testing.assert_close(model.weight.grad[r], alone.weight.grad)


def test_distributed_data_parallel(tmp_path):
    """Two processes on gloo, half of the batch each: the same gradient as one process with all of it."""
    script = f"""
import torch, torch.distributed as dist, mixfeat as mf
from torch.nn import functional as F
dist.init_process_group("gloo", init_method="file://{tmp_path}/rendezvous", rank=rank, world_size=2)
torch.manual_seed(0)
model = mf.TwoLayerPatchCNN(4, 5, 6, mf.PolyReLU(8, 0.1))
x, target, index = torch.randn(12, 3, 6), torch.randint(4, (12,)), torch.randint(6, (12,))
parallel = torch.nn.parallel.DistributedDataParallel(model)
part = slice(6 * rank, 6 * rank + 6)
F.cross_entropy(parallel(x[part], index[part], 0.3), target[part]).backward()
grad = model.weight.grad.clone()
model.zero_grad()
sum(F.cross_entropy(model(x[s], index[s], 0.3), target[s]) / 2 for s in (slice(6), slice(6, 12))).backward()
torch.testing.assert_close(grad, model.weight.grad)
assert grad.any()
dist.destroy_process_group()
"""
    for ended in processes.run(*(f"rank = {rank}\n{script}" for rank in (0, 1))):
        assert ended.status == 0, ended.stderr


def test_fully_sharded_data_parallel(run_python):
    """FSDP2 around a module that calls the loss trains; outside of a forward its parameters are refused by name."""
    run_python("""
import pytest, torch, torch.distributed as dist, mixfeat as mf
from torch.distributed.fsdp import fully_shard

class Objective(torch.nn.Module):
    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, input, target):
        return self.loss(self.model, input, target)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model, loss = mf.TwoLayerPatchCNN(3, 2, 4, mf.PolyReLU(2, 1.0)), mf.PairwiseMixupLoss()
x, y, labels = torch.randn(5, 2, 4), torch.arange(5) % 3, torch.arange(5)
expected = loss(model, x, y)
expected.backward()
grad = model.weight.grad.clone()
model.zero_grad()
sharded = Objective(model, loss)
fully_shard(sharded)
found = sharded(x, y)
found.backward()
torch.testing.assert_close(found, expected)
torch.testing.assert_close(model.weight.grad.full_tensor(), grad)
dtensor = model.weight
advice = "got a DTensor: call the operator in the forward of the module that FSDP shards, or pass full_tensor"
for name, call in {
    "weight": lambda: loss(model, x, y),
    "input": lambda: mf.mixup(dtensor, labels[:3], 0.5),
    "target_a": lambda: mf.mixup_cross_entropy(x[0], dtensor, labels[:2], 0.5),
}.items():
    with pytest.raises(TypeError, match=f"{name} must be an? .*tensor.*, {advice}"):
        call()
mf.patch_conv(x, dtensor.full_tensor(), mf.ReLU()).sum().backward()
dist.destroy_process_group()
""")


@pytest.mark.parametrize("wrapper", [torch.nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_wrapped_models_are_refused_with_advice(wrapper):
    model = wrapper(mf.TwoLayerPatchCNN(3, 2, 4, POLY))
    x, y = torch.randn(5, 2, 4), torch.arange(5) % 3
    with pytest.raises(TypeError, match=rf"got a {wrapper.__name__}, which wraps a model: pass its \.module"):
        mf.PairwiseMixupLoss()(model, x, y)
    mf.PairwiseMixupLoss()(model.module, x, y)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((0, 3, 4, POLY), {}, ValueError, "num_classes must be at least 1, got 0"),
        ((2, -3, 4, POLY), {}, ValueError, "filters_per_class must be at least 1, got -3"),
        ((2, 3, 4.0, POLY), {}, TypeError, "patch_dim must be an integer, got 4.0"),
        ((2, 3, 4, POLY), {"num_runs": 0}, ValueError, "num_runs must be at least 1, got 0"),
        ((2, 3, 4, torch.relu), {}, TypeError, "activation must be a mixfeat activation such as"),
        ((2, 3, 4, POLY), {"init_std": 0.0}, ValueError, "init_std must be finite and positive, got 0.0"),
        ((2, 3, 4, POLY), {"init_std": float("nan")}, ValueError, "init_std must be finite and positive, got nan"),
    ],
)
def test_refuses(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        mf.TwoLayerPatchCNN(*args, **kwargs)


# mixing


def test_mixup_module_is_its_functions():
    x, y = torch.randn(9, 3, 4), torch.randint(5, (9,))
    for options in ({}, {"alpha": 0.3}, {"lam": 0.5}, {"per_sample": True}):

        def generator():
            return torch.Generator().manual_seed(1)

        index, lam = mf.sample_mixup(9, **options, generator=generator())
        mixed, (first, second, weight) = mf.Mixup(**options, generator=generator())(x, y)
        assert torch.equal(mixed, mf.mixup(x, index, lam))
        assert torch.equal(first, y)
        assert torch.equal(second, y[index])
        assert torch.equal(weight, lam)
        _, dense = mf.Mixup(**options, num_classes=5, generator=generator())(x, y)
        one_hot = F.one_hot(y, 5).float()
        torch.testing.assert_close(dense, torch.lerp(one_hot[index], one_hot, lam.view(-1, 1)))


def test_mixup_module_draws_anew_each_time_and_rests_in_eval_mode():
    x, y = torch.randn(9, 3), torch.randint(5, (9,))
    mix = mf.Mixup()
    assert not torch.equal(mix(x, y)[0], mix(x, y)[0])
    mix.eval()
    mixed, (first, second, lam) = mix(x, y)
    assert torch.equal(mixed, x)
    assert torch.equal(first, y)
    assert torch.equal(second, y)
    assert lam == 1


@pytest.mark.parametrize("mode", ["batch", "elem", "pair"])
def test_cutmix_alone(mode):
    """Every pixel is the sample's own or its partner's, by shares that lam tells."""
    n = 9
    images = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, 2, 12, 16)
    mixed, (first, second, lam) = mf.Mixup(None, cutmix_alpha=1.0, mode=mode)(images, torch.arange(n))
    assert lam.shape == (() if mode == "batch" else (n,))
    own, partner = first.view(n, 1, 1, 1), second.view(n, 1, 1, 1)
    assert ((mixed == own) | (mixed == partner)).all()
    share = (mixed == own).flatten(1).float().mean(1)
    torch.testing.assert_close(share.where(first != second, lam.expand(n)), lam.expand(n))
    if mode == "pair":
        assert torch.equal(second[second], first)
        assert (first == second).sum() == 1  # the odd one out
        assert torch.equal(lam[second], lam)


@pytest.mark.parametrize("mode", ["batch", "elem", "pair"])
def test_pairs_and_elements_of_mixup(mode):
    n = 10
    x = torch.randn(n, 4)
    mixed, (first, second, lam) = mf.Mixup(mode=mode)(x, torch.arange(n))
    assert torch.equal(mixed, mf.mixup(x, second, lam))
    assert torch.equal(first, torch.arange(n))
    assert torch.equal(second.sort().values, first)
    if mode == "pair":
        assert torch.equal(second[second], first)
        assert (second != first).all()
        assert torch.equal(lam[second], lam)


@pytest.mark.parametrize("mode", ["batch", "elem", "pair"])
def test_probabilities_of_mixing_and_of_cutmix(mode):
    """How often nothing is mixed, and how often CutMix is chosen: a right draw fails once in 10^8."""
    torch.manual_seed(7)
    images, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    mix = mf.Mixup(cutmix_alpha=1.0, prob=0.6, switch_prob=0.3, mode=mode)
    unmixed = cut = mixed = 0
    rounds = 300
    for _ in range(rounds):
        z, (_, second, lam) = mix(images, y)
        lam = lam.expand(8)
        own = (z == images).flatten(1)
        pasted = (z == images[second]).flatten(1)
        copies = (own | pasted).all(1)
        whole = (lam == 1) & own.all(1)
        unmixed += whole.sum().item() / 8
        cut += (copies & ~whole).sum().item() / 8
        mixed += (~copies).sum().item() / 8
    draws = rounds * {"batch": 1, "elem": 8, "pair": 4}[mode]
    # a box may be empty, and a lam 0 or 1, so shares are near what was asked
    for found, share, rare in ((unmixed, 0.4, 0.06), (cut, 0.6 * 0.3, 0.06), (mixed, 0.6 * 0.7, 0.01)):
        assert abs(found / rounds - share) < 6 * (share * (1 - share) / draws) ** 0.5 + rare


def test_targets_of_every_kind():
    """Soft targets are mixed as the images are; label maps are cut with them."""
    n, c = 6, 4
    images, labels = torch.rand(n, 3, 5, 7), torch.randint(c, (n,))
    soft = torch.rand(n, c)

    def seeded(target, **options):
        return mf.Mixup(**options, generator=torch.Generator().manual_seed(5))(images, target)

    mixed, (_, _, lam) = seeded(labels)
    index = seeded(torch.arange(n))[1][1]
    z, target = seeded(soft)
    assert torch.equal(z, mixed)
    torch.testing.assert_close(target, lam * soft + (1 - lam) * soft[index])
    maps = torch.randint(c, (n, 5, 7))
    _, (a, b, same_lam) = seeded(maps)
    assert torch.equal(a, maps)
    assert torch.equal(b, maps[index])
    assert torch.equal(same_lam, lam)
    _, dense = seeded(maps, num_classes=c)
    assert dense.shape == (n, c, 5, 7)
    torch.testing.assert_close(dense.sum(1), torch.ones(n, 5, 7))

    cut = {"alpha": None, "cutmix_alpha": 1.0}
    z, (a, b, lam) = seeded(maps, **cut)
    which = mf.cutmix(torch.arange(n).double().view(n, 1, 1, 1).expand(n, 1, 5, 7), *_drawn(images.shape))[:, 0].long()
    rows, columns = torch.arange(5)[:, None], torch.arange(7)
    assert torch.equal(a, maps[which, rows, columns])
    assert torch.equal(a, b)
    assert lam == 1
    one_hot = F.one_hot(maps, c).movedim(-1, 1).float()
    assert torch.equal(seeded(one_hot, **cut)[1], F.one_hot(a, c).movedim(-1, 1).float())
    z, target = seeded(soft, **cut)
    _, _, share = mf.sample_cutmix(images.shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(target, share * soft + (1 - share) * soft[_drawn(images.shape)[0]])


def _drawn(shape):
    index, box, _ = mf.sample_cutmix(shape, generator=torch.Generator().manual_seed(5))
    return index, box


def test_smoothed_dense_targets_are_those_of_timm():
    images, labels = torch.rand(6, 3, 4, 4), torch.randint(5, (6,))
    mix = mf.Mixup(0.3, num_classes=5, label_smoothing=0.1, generator=torch.Generator().manual_seed(2))
    _, dense = mix(images, labels)
    index, lam = mf.sample_mixup(6, 0.3, generator=torch.Generator().manual_seed(2))
    smooth = torch.full((6, 5), 0.02).scatter_(1, labels[:, None], 0.92)
    torch.testing.assert_close(dense, smooth * lam + smooth[index] * (1 - lam))
    mix.eval()
    torch.testing.assert_close(mix(images, labels)[1], smooth)


def test_switching_in_a_compiled_step():
    mix = mf.Mixup(cutmix_alpha=1.0, num_classes=4)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: mix(x, y), fullgraph=True)
    images, labels = torch.rand(6, 3, 4, 4), torch.randint(4, (6,))
    for _ in range(3):
        mixed, target = compiled(images, labels)
        assert mixed.shape == images.shape
        torch.testing.assert_close(target.sum(1), torch.ones(6))


class _Batches(torch.utils.data.Dataset):
    """Items that are what a mixer draws in a worker."""

    def __init__(self, mix):
        self.mix = mix

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return self.mix(torch.eye(40), torch.arange(40))[0]


def test_workers_of_a_data_loader_draw_different_numbers():
    """Also with a generator, of which each worker has the same copy; and others in the next epoch."""
    mix = mf.Mixup(generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(_Batches(mix), batch_size=1, num_workers=2)
    drawn = [batch.flatten() for _ in range(2) for batch in loader]
    assert len({tuple(one.tolist()) for one in drawn}) == len(drawn)


def test_mixup_loss_module():
    logits, y = torch.randn(9, 5), torch.randint(5, (9,))
    target = (y, y.flip(0), torch.rand(9))
    for options in ({}, {"label_smoothing": 0.1, "reduction": "none"}, {"ignore_index": 2}):
        loss = mf.MixupCrossEntropyLoss(**options)(logits, target)
        assert torch.equal(loss, mf.mixup_cross_entropy(logits, *target, **options))
    assert mf.MixupCrossEntropyLoss()(logits, [y, y, 0.5]) == mf.mixup_cross_entropy(logits, y, y, 0.5)


def test_mixing_modules_in_a_compiled_step():
    mix, loss = mf.Mixup(lam=0.25), mf.MixupCrossEntropyLoss()
    model = torch.nn.Linear(3, 5)

    def step(x, y):
        mixed, target = mix(x, y)
        return loss(model(mixed), target)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    compiled(torch.randn(9, 3), torch.randint(5, (9,))).backward()
    assert model.weight.grad.isfinite().all()


def test_mixing_modules_say_what_they_are():
    assert repr(mf.Mixup(0.3, per_sample=True, num_classes=4)) == "Mixup(alpha=0.3, per_sample=True, num_classes=4)"
    assert repr(mf.Mixup(lam=0.5)) == "Mixup(lam=0.5)"
    assert repr(mf.Mixup(None, cutmix_alpha=1, prob=0.5, mode="pair")) == (
        "Mixup(alpha=None, cutmix_alpha=1.0, prob=0.5, mode='pair')"
    )
    assert repr(mf.MixupCrossEntropyLoss(0.1)) == (
        "MixupCrossEntropyLoss(label_smoothing=0.1, ignore_index=-100, reduction='mean')"
    )


X, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mf.Mixup(0), ValueError, r"alpha must be finite and positive, got 0 \(for Midpoint"),
        (lambda: mf.Mixup(lam=2), ValueError, r"lam must be in \[0, 1\], got 2"),
        (lambda: mf.Mixup(num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
        (lambda: mf.Mixup(num_classes=2.0), TypeError, "num_classes must be an integer, got 2.0"),
        (lambda: mf.Mixup(generator=1), TypeError, "generator must be a torch.Generator, got int"),
        (lambda: mf.Mixup()([1], Y), TypeError, "input must be a tensor, got list"),
        (lambda: mf.Mixup()(X, Y.int()), TypeError, r"target must be an int64 tensor .*, got torch\.int32"),
        (lambda: mf.Mixup()(X, X[:, 0]), ValueError, r"target must have shape \(4,C,\.\.\.\), got \(4,\)"),
        (lambda: mf.Mixup()(X, Y[:3]), ValueError, r"target must have shape \(4,\) or \(4,\.\.\.\), got \(3,\)"),
        (lambda: mf.Mixup(None), ValueError, "alpha is needed where cutmix_alpha is None"),
        (lambda: mf.Mixup(lam=0.5, cutmix_alpha=1.0), ValueError, "lam must be None where cutmix_alpha is given"),
        (lambda: mf.Mixup(cutmix_alpha=0), ValueError, "cutmix_alpha must be finite and positive, got 0"),
        (lambda: mf.Mixup(prob=1.5), ValueError, r"prob must be in \[0, 1\], got 1.5"),
        (lambda: mf.Mixup(switch_prob=-1), ValueError, r"switch_prob must be in \[0, 1\], got -1"),
        (lambda: mf.Mixup(mode="half"), ValueError, 'mode must be "batch", "elem" or "pair", got \'half\''),
        (lambda: mf.Mixup(per_sample=True, mode="pair"), ValueError, 'per_sample is mode="elem", got mode="pair"'),
        (lambda: mf.Mixup(label_smoothing=0.1), ValueError, "label_smoothing needs num_classes"),
        (lambda: mf.Mixup(cutmix_alpha=1.0)(X, Y), ValueError, r"\(N,ch,H,W\), got \(4, 3\)"),
        (lambda: mf.MixupCrossEntropyLoss(1.5), ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        (lambda: mf.MixupCrossEntropyLoss(reduction="max"), ValueError, "reduction must be"),
        (lambda: mf.MixupCrossEntropyLoss(ignore_index=None), TypeError, "ignore_index must be an integer, got None"),
        (lambda: mf.MixupCrossEntropyLoss()(X, Y), TypeError, r"target must be \(target_a, .*, got Tensor"),
        (lambda: mf.MixupCrossEntropyLoss()(X, (Y, Y)), TypeError, "target must be .*, got 2 entries"),
    ],
)  # fmt: skip
def test_mixing_modules_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_mixup_gives_one_dtype_in_training_and_evaluation():
    images, target = torch.randint(256, (4, 3, 2, 2), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    mix = mf.Mixup()
    assert mix(images, target)[0].dtype == mix.eval()(images, target)[0].dtype == torch.get_default_dtype()
    torch.testing.assert_close(mix(images, target)[0], images.float())


def test_meta_tensors():
    """Shapes and dtypes, forward and backward, without memory."""
    model = mf.TwoLayerPatchCNN(3, 2, 5, mf.PolyReLU(), device="meta")
    x, y = torch.empty(4, 6, 5, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    logits = model(x, torch.empty(4, dtype=torch.int64, device="meta"), 0.5)
    assert (logits.shape, logits.dtype, logits.device.type) == ((4, 3), torch.float32, "meta")
    (mf.MixupCrossEntropyLoss()(logits, (y, y, 0.5)) + mf.PairwiseMixupLoss()(model, x, y)).backward()
    assert model.weight.grad.shape == model.weight.shape
    assert mf.Mixup()(x, y)[0].shape == x.shape


def test_two_graphs_serve_any_batch_size():
    """The first is for one size, the second for all."""
    torch._dynamo.reset()
    model, mix, loss_of = mf.TwoLayerPatchCNN(3, 2, 5, mf.PolyReLU()), mf.Mixup(), mf.MixupCrossEntropyLoss()
    objective, graphs = mf.PairwiseMixupLoss(), []

    def count(graph, _):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=count)
    def step(x, y):
        mixed, target = mix(x, y)
        return loss_of(model(mixed), target) + objective(model, x, y)

    for samples in range(4, 14):
        step(torch.randn(samples, 6, 5), torch.randint(3, (samples,))).backward()
    assert len(graphs) <= 2
