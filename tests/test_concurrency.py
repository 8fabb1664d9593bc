"""Operators called from several threads at once, and in the worker processes of a data loader."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import SEED
from table import over, problems
from torch.utils.data import DataLoader, Dataset

import mixfeat as mf
from mixfeat.operators import DTYPES, OPERATORS, same_bits

THREADS = 4


# PyTorch's own product, with which pairwise_mixup_loss begins, may change with the number of threads
WITHOUT_PRODUCTS = [name for name in OPERATORS if name != "pairwise_mixup_loss"]


@over("large", ("float32", "float64"), ["cpu"], operators=WITHOUT_PRODUCTS)
def test_any_number_of_threads(problem):
    """The same bits, and again at the same number."""
    draw, before, seen = problem.draw(), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            seen.append(problem.results(draw.arguments, draw.upstream))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize("threads_of_torch", [1, 2])
def test_threads_at_once(threads_of_torch):
    """Forward and backward of all operators with different settings and backends: the same bits as alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads_of_torch)

    def solve(problem, draw):
        with mf.backend(problem.backend):
            results = problem.results(draw.arguments, draw.upstream)
            assert mf.backends.serving("cpu") == problem.backend
        return results

    try:
        chosen = problems("main interpreted", DTYPES, ["cpu", "reference"], seed=SEED)
        tasks = [(problem, problem.draw()) for problem in chosen]
        alone = [solve(*task) for task in tasks]
        start, orders = threading.Barrier(THREADS), [torch.randperm(len(tasks)).tolist() for _ in range(THREADS)]

        def work(order):
            start.wait()
            return [(i, solve(*tasks[i])) for i in order]

        with ThreadPoolExecutor(THREADS) as pool:
            for results in pool.map(work, orders):
                for i, result in results:
                    assert same_bits(result, alone[i]), str(tasks[i][0])
    finally:
        torch.set_num_threads(before)


def test_backward_in_another_thread():
    """A graph made in one thread and differentiated in another, while others choose other backends."""
    w = torch.randn(3, 2, 4, requires_grad=True)
    x, y = torch.randn(9, 5, 4), torch.randint(3, (9,))

    def loss():
        return mf.pairwise_mixup_loss(x, w, y, mf.PolyReLU(3, 0.1)) + mf.patch_conv(x, w, mf.PolyReLU(3, 0.1)).sum()

    (expected,) = torch.autograd.grad(loss(), w)

    def derive(made):
        with mf.backend("cpu"):
            return torch.autograd.grad(made, w)[0]

    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(derive, [loss() for _ in range(20)]):
            assert torch.equal(found, expected)


def test_first_calls_at_once(run_python):
    """Whichever thread is first, the library is loaded once and all are served."""
    run_python("""
import threading, torch, mixfeat as mf
x, w = torch.randn(9, 5, 4), torch.randn(3, 2, 4)
start, found = threading.Barrier(8), []
def work():
    start.wait()
    found.append(mf.patch_conv(x, w, mf.PolyReLU(3, 0.1)))
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(found) == 8 and all(torch.equal(a, found[0]) for a in found)
""")


class Mixed(Dataset):
    """Calls operators where the samples are made."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(40, 6, 16, generator=generator)
        index, lam = mf.sample_mixup(40, per_sample=True, generator=generator)
        w = torch.full((3, 5, 16), 0.02, requires_grad=True)
        y = torch.arange(40) % 3
        logits = mf.patch_conv(x, w, mf.PolyReLU(3, 0.1), index=index, lam=lam)
        loss = mf.mixup_cross_entropy(logits, y, y[index], lam) + mf.pairwise_mixup_loss(x, w, y, mf.PolyReLU(3, 0.1))
        loss.backward()
        return mf.mixup(x, index, lam), loss.detach(), w.grad


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core
def test_workers_of_a_data_loader(method):
    """After this process has used its threads: what a fork copies of them must not be waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        large = torch.randn(2000, 12, 20)
        mf.patch_conv(large, torch.randn(10, 10, 20), mf.PolyReLU())  # on both threads
        expected = [Mixed()[i] for i in range(8)]
        loader = DataLoader(Mixed(), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=100)
        for found, true in zip(loader, expected, strict=True):
            for a, b in zip(found, true, strict=True):
                torch.testing.assert_close(a, b)
    finally:
        torch.set_num_threads(before)
