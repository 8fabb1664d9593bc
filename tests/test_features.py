"""Feature metrics against brute force."""

import pytest
import torch

import mixfeat as mf


@pytest.mark.parametrize(
    ("weight", "features"),
    [((4, 3, 9), (4, 2, 9)), ((5, 4, 3, 9), (4, 2, 9)), ((5, 4, 3, 9), (5, 4, 2, 9)), ((4, 1, 9), (6, 5, 4, 3, 9))],
)
def test_alignment(weight, features):
    weight, features = torch.randn(weight, requires_grad=True), torch.randn(features, dtype=torch.float64)
    result = mf.features.alignment(weight, features)
    runs = torch.broadcast_shapes(weight.shape[:-3], features.shape[:-3])
    assert result.shape == (*runs, 4, features.shape[-2])
    assert result.dtype == torch.float64
    assert not result.requires_grad
    w = weight.detach().double().expand(*runs, *weight.shape[-3:]).reshape(-1, *weight.shape[-3:])
    v = features.expand(*runs, *features.shape[-3:]).reshape(-1, *features.shape[-3:])
    for r in range(len(w)):
        for c in range(4):
            for view in range(v.shape[2]):
                expected = max(torch.dot(w[r, c, m], v[r, c, view]) for m in range(w.shape[2]))
                torch.testing.assert_close(result.view(-1, 4, v.shape[2])[r, c, view], expected)


@pytest.mark.parametrize(
    ("weight", "features", "error", "message"),
    [
        (1, torch.zeros(4, 2, 9), TypeError, "weight must be a tensor, got int"),
        (torch.zeros(4, 2, 9).int(), torch.zeros(4, 2, 9), TypeError, "weight must be a floating-point tensor"),
        (torch.zeros(4, 3, 9), torch.zeros(2, 9), ValueError, r"features must have at least 3 .* got shape \(2, 9\)"),
        (torch.zeros(4, 3, 9), torch.zeros(5, 2, 9), ValueError, r"features must have the classes .* got \(5, 2, 9\)"),
        (torch.zeros(4, 3, 9), torch.zeros(4, 2, 8), ValueError, r"got \(4, 2, 8\) for weight \(4, 3, 9\)"),
        (torch.zeros(4, 0, 9), torch.zeros(4, 2, 9), ValueError, "weight must have at least one filter"),
        (torch.zeros(2, 4, 3, 9), torch.zeros(3, 4, 2, 9), ValueError, "features' leading dimensions must broadcast"),
    ],
)
def test_alignment_bad_arguments(weight, features, error, message):
    with pytest.raises(error, match=message):
        mf.features.alignment(weight, features)


def brute_force(logits, target, threshold):
    classes = logits.shape[1]
    result = []
    for c in range(classes):
        rows = logits[target == c]
        right = sum(all(row[c] > row[other] for other in range(classes) if other != c) for row in rows)
        result.append(right / len(rows) > threshold)
    return torch.tensor(result)


@pytest.mark.parametrize(("runs", "separate"), [(None, False), (3, False), (3, True)])
def test_learned(runs, separate):
    model = mf.TwoLayerPatchCNN(4, 2, 8, mf.ReLU(), num_runs=runs, init_std=1.0)

    def draw(view):
        if not separate:
            return mf.data.multi_view(40, 4, 3, noise_scale=0.3, views=view)
        stacked = zip(*(mf.data.multi_view(40, 4, 3, noise_scale=0.3, views=view) for _ in range(runs)), strict=True)
        return mf.data.MultiViewData(*map(torch.stack, stacked))

    tests = [draw(view) for view in (0, 1)]
    result = mf.features.learned(model, tests, threshold=0.25)
    assert result.dtype == torch.bool
    assert result.shape == ((4, 2) if runs is None else (runs, 4, 2))
    for r in range(runs or 1):
        for view, data in enumerate(tests):
            logits = model(data.input).detach()
            logits = logits if runs is None else logits[r]
            expected = brute_force(logits, data.target[r] if separate else data.target, 0.25)
            assert torch.equal((result if runs is None else result[r])[:, view], expected)


def test_learned_counts_strictly_above_the_threshold_and_no_ties():
    data = mf.data.MultiViewData(torch.eye(2)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1]), torch.zeros(0))
    half = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert mf.features.learned(lambda x: half, [data], 0.5).tolist() == [[False], [True]]
    assert mf.features.learned(lambda x: half, [data], 0.4).tolist() == [[True], [True]]
    assert not mf.features.learned(lambda x: torch.zeros(4, 2), [data], 0.0).any()
    assert not mf.features.learned(lambda x: torch.full((4, 2), torch.nan), [data], 0.0).any()


def test_learned_restores_every_mode_and_records_no_gradient():
    class Net(torch.nn.Sequential):
        def forward(self, x):
            assert not self.training
            assert not torch.is_grad_enabled()
            return super().forward(x)

    model = Net(torch.nn.Flatten(), torch.nn.Linear(24, 4), torch.nn.BatchNorm1d(4))
    model[2].eval()  # frozen on purpose, inside a model in training
    data = mf.data.multi_view(8, 4, 3)
    mf.features.learned(model, [data])
    assert [m.training for m in model.modules()] == [True, True, True, False]
    with pytest.raises(RuntimeError):
        mf.features.learned(model, [mf.data.multi_view(8, 4, 5)])
    assert [m.training for m in model.modules()] == [True, True, True, False]


def test_learned_bad_arguments():
    data = mf.data.multi_view(3, 4, 3)
    model = mf.TwoLayerPatchCNN(4, 2, 8, mf.ReLU())
    with pytest.raises(TypeError, match=r"data_of_each_view must be a sequence .* got MultiViewData"):
        mf.features.learned(model, data)
    with pytest.raises(ValueError, match="data_of_each_view must hold the data of at least one view, got none"):
        mf.features.learned(model, [])
    with pytest.raises(ValueError, match=r"data_of_each_view\[0\] must have test points of every class, got none of"):
        mf.features.learned(model, [data])
    wrong = mf.data.MultiViewData(data.input, data.target[:2], data.features)
    with pytest.raises(ValueError, match=r"data_of_each_view\[0\].target must have one class per row .* \(2,\)"):
        mf.features.learned(model, [wrong])
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\), got 1"):
        mf.features.learned(model, [data], 1)
    with pytest.raises(TypeError, match=r"threshold must be a number, got '0.9'"):
        mf.features.learned(model, [data], "0.9")


@pytest.mark.parametrize("runs", [(), (3,)])
def test_noise_memorization(runs):
    data = mf.data.signal_noise(7, 5, 3)
    weight = torch.randn(*runs, 3, 2, 5, requires_grad=True)  # and a class without samples
    result = mf.features.noise_memorization(weight, data.noise, data.target)
    assert result.shape == (*runs, 3)
    assert not result.requires_grad
    for r, filters in enumerate(weight.detach().reshape(-1, 3, 2, 5)):
        for c in range(3):
            products = [
                torch.dot(filters[c, m], xi) for m in range(2) for n in range(7) if data.target[n] == c
                for xi in data.noise[n]
            ]  # fmt: skip
            expected = max(products) if products else torch.tensor(-torch.inf)
            torch.testing.assert_close(result.view(-1, 3)[r, c], expected)


@pytest.mark.parametrize("runs", [(), (3,)])
def test_feature_variance(runs):
    phi = mf.PolyReLU(3, 0.5)
    data = mf.data.multi_view(12, 3, 4, 8, noise_std=0.1, dtype=torch.float64)
    weight = torch.randn(*runs, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    result = mf.features.feature_variance(weight, data.input, data.target, 2 * data.features, phi)
    assert result.shape == (*runs, 3, 2)
    assert not result.requires_grad
    for r, filters in enumerate(weight.detach().reshape(-1, 3, 2, 8)):
        for c in range(3):
            for view in range(2):
                v = data.features[c, view]
                outputs = []
                for x in data.input[data.target == c]:
                    part = (x @ v)[:, None] * v
                    outputs.append(phi(part @ filters[c].T).sum())
                expected = torch.stack(outputs).var(correction=0)
                torch.testing.assert_close(result.view(-1, 3, 2)[r, c, view], expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"noise": torch.zeros(4, 2, 8)}, ValueError, "noise must have the patch dimension"),
        ({"noise": torch.zeros(4, 0, 9)}, ValueError, "noise must have .* at least one patch"),
        ({"noise": torch.zeros(2, 9)}, ValueError, "noise must have at least 3 dimensions"),
        ({"target": torch.zeros(5).long()}, ValueError, r"target must have shape \(4,\), .* got \(5,\)"),
        ({"target": torch.zeros(4)}, TypeError, "target must be"),
        ({"target": torch.full((4,), 2)}, IndexError, r"target must lie in \[0, 2\), got 2"),
    ],
)
def test_noise_memorization_bad_arguments(change, error, message):
    good = {"weight": torch.zeros(2, 3, 9), "noise": torch.zeros(4, 1, 9), "target": torch.zeros(4).long()}
    with pytest.raises(error, match=message):
        mf.features.noise_memorization(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.zeros(3, 2, 9)}, ValueError, "features must be .C,V,D. with the classes"),
        ({"input": torch.zeros(4, 1, 8)}, ValueError, "input must be .N,P,D. with the patch dimension"),
        ({"activation": torch.relu}, TypeError, "activation must be"),
        ({"target": torch.full((4,), -1)}, IndexError, r"target must lie in \[0, 2\), got -1"),
    ],
)
def test_feature_variance_bad_arguments(change, error, message):
    good = {
        "weight": torch.zeros(2, 3, 9), "input": torch.zeros(4, 1, 9), "target": torch.zeros(4).long(),
        "features": torch.ones(2, 1, 9), "activation": mf.ReLU(),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        mf.features.feature_variance(**{**good, **change})
