"""Checks of Triton kernels, called as the operators call them, on a GPU or in Triton's interpreter.

Without a GPU the interpreter must be chosen before triton is imported: so all checks run in other processes, one per
core, whatever this one has imported. A test module names its checks in ``CHECKS``, and has::

    @pytest.fixture(scope="module")
    def checks(request):
        with running(request) as checks:
            yield checks

    @pytest.mark.parametrize("name", CHECKS)
    def test_kernel(checks, name):
        checks(name)
"""

import importlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context
from unittest import mock

import numpy as np
import torch
from conftest import SEED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
HALF = (torch.bfloat16, torch.float16)


def poisoned():
    """Within, what torch.empty gives holds NaN or integers out of range: whatever a kernel leaves unwritten shows."""

    def poisoned_empty(*args, empty=torch.empty, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(NAN if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    return mock.patch("torch.empty", poisoned_empty)


def error(result, truth):
    """Relative error in the 2-norm; the absolute one of what ought to be 0."""
    norm = truth.norm()
    return ((result.double() - truth).norm() / (norm if norm > 0 else 1)).item()


def shuffled_programs():
    """Within, the interpreter runs the programs of each launch in random order, as a GPU may."""
    if DEVICE != "cpu":
        return nullcontext()
    from triton.runtime.interpreter import InterpreterBuilder

    order: list[int] = []

    def set_grid_idx(builder, x, y, z):
        if x == 0:
            order[:] = torch.randperm(builder.grid_dim[0]).tolist()
        builder.grid_idx = (order[x], y, z)

    return mock.patch.object(InterpreterBuilder, "set_grid_idx", set_grid_idx)


@contextmanager
def ordered_accesses() -> Iterator[None]:
    """Within, a kernel that loads and stores one address must not depend on the order of its threads.

    The interpreter runs each instruction for all threads at once; a GPU does not. So no instruction may store an
    address twice that the kernel also loads, and a barrier must separate a store from later loads of its addresses.
    """
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    names = ("create_masked_load", "create_masked_store", "create_barrier", "set_grid_idx")
    load, store, barrier, set_grid_idx = (getattr(InterpreterBuilder, name) for name in names)
    call = GridExecutor.__call__
    loaded: set[int] = set()
    stored_twice: set[int] = set()
    since_barrier: set[int] = set()

    def checked_load(builder, ptrs, mask, *rest):
        addresses = ptrs.data[mask.data].tolist()
        assert since_barrier.isdisjoint(addresses), "no barrier between a store and a load of one address"
        loaded.update(addresses)
        return load(builder, ptrs, mask, *rest)

    def checked_store(builder, ptrs, value, mask, *rest):
        addresses, counts = np.unique(ptrs.data[mask.data], return_counts=True)
        stored_twice.update(addresses[counts > 1].tolist())
        since_barrier.update(addresses.tolist())
        return store(builder, ptrs, value, mask, *rest)

    def checked_barrier(builder):
        since_barrier.clear()
        return barrier(builder)

    def next_program(builder, *index):
        since_barrier.clear()
        return set_grid_idx(builder, *index)

    def launch(*args, **kwargs):
        loaded.clear()
        stored_twice.clear()
        call(*args, **kwargs)
        assert stored_twice.isdisjoint(loaded), "one store of a kernel that works in place writes an address twice"

    with (
        mock.patch.multiple(
            InterpreterBuilder, create_masked_load=checked_load, create_masked_store=checked_store,
            create_barrier=checked_barrier, set_grid_idx=next_program,
        ),
        mock.patch.object(GridExecutor, "__call__", launch),
    ):  # fmt: skip
        yield


@contextmanager
def running(request) -> Iterator[Callable[[str], None]]:
    """Within, the selected checks of a test module are under way, all at once: call with a name to wait for one."""
    module = request.module.__name__
    items = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    names = [item.callspec.params["name"] for item in items if item.originalname == "test_kernel"]
    with ProcessPoolExecutor(
        os.cpu_count() if DEVICE == "cpu" else 1, get_context("spawn"), initializer=_use_interpreter
    ) as pool:
        futures = {name: pool.submit(check, module, name, SEED) for name in names}

        def result(name: str) -> None:
            print(f"triton_checks.check({module!r}, {name!r}, seed={SEED})")
            futures[name].result()

        yield result
        pool.shutdown(cancel_futures=True)


def check(module: str, name: str, seed: int) -> None:
    """One check of a test module, in a process where Triton interprets its kernels unless there is a GPU."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("highest")  # whatever the check before asked for
    importlib.import_module(module).CHECKS[name]()


def _use_interpreter() -> None:
    torch.set_num_threads(1)
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
