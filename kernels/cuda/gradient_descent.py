"""Gradient descent of many networks in one launch: lays gradient_descent.cu out for a problem, and launches it."""

import ctypes
import functools
import math
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import cuda
from ..polynomial import Polynomial
from . import SHARED_KIB, Launch

__all__ = ["Layout", "Problem", "fits", "gradient_descent", "layout", "mirrored"]

KERNEL = "gradient_descent"
# t_ij = a_i + ratio a_j, and sums are divided by the ratio: so it is never zero, only less than a float32 can tell
_LEAST_RATIO = 2.0**-60


def _round_up(size: int) -> int:
    """Return the next multiple of four."""
    return -(-size // 4) * 4


class Problem(NamedTuple):
    """Sizes and options that decide how much shared memory a network takes.

    ``nodes`` are lam >= 1/2, 1/2 first; None is plain cross-entropy, without pairs.
    """

    num_samples: int
    num_patches: int
    patch_dim: int
    num_classes: int
    filters_per_class: int
    nodes: tuple[float, ...] | None
    momentum: bool

    @classmethod
    def of(cls, input: Tensor, weight: Tensor, nodes: Sequence[float] | None, momentum: float) -> "Problem":
        """Return the problem of :func:`gradient_descent`'s arguments; tensors may come without their runs."""
        lams = None if nodes is None else tuple(mirrored(nodes, [0.0] * len(nodes)))
        n, p, d = input.shape[-3:]
        c, m, _ = weight.shape[-3:]
        return cls(n, p, d, c, m, lams, momentum != 0)

    @property
    def weights(self) -> int:
        """Return the floats of all filters, each padded to a multiple of four."""
        return self.num_classes * self.filters_per_class * _round_up(self.patch_dim)

    @property
    def symmetric(self) -> bool:
        """Return whether pairs are symmetric at some node, 1/2."""
        return self.nodes is not None and self.nodes[0] == 0.5


class Pass(NamedTuple):
    """A node and a band of rows of tiles: ``last_row`` is excluded, ``first_tile`` counts from the node's first."""

    lam: float
    first_row: int
    last_row: int
    first_tile: int
    tiles: int


class Layout(NamedTuple):
    """How the kernel divides a problem.

    Attributes:
        tile: samples on each side of a tile of pairs, which a thread works on at once.
        threads: threads of a block.
        band_tiles: tiles whose logits are kept at a time.
        chunk_tiles: the gradient of so many columns of tiles is one thread's, in registers.
        filter_group: filters that share a load of the samples.
        patch_groups: groups of patches over which dL/dw is summed apart.
    """

    tile: int
    threads: int
    band_tiles: int
    chunk_tiles: int
    filter_group: int
    patch_groups: int

    def side(self, problem: Problem) -> int:
        """Return the number of tiles along a side."""
        return math.ceil(problem.num_samples / self.tile)

    def passes(self, problem: Problem) -> list[Pass]:
        """Return the passes of a step: for each node bands of as many whole rows as the logits have room for."""
        if problem.nodes is None:
            return [Pass(1.0, 0, 0, 0, 0)]
        side = self.side(problem)
        passes = []
        for lam in problem.nodes:
            first_row = first_tile = tiles = 0
            for row in range(side):
                more = side - row if lam == 0.5 else side
                if tiles + more > self.band_tiles:
                    passes.append(Pass(lam, first_row, row, first_tile, tiles))
                    first_row, first_tile, tiles = row, first_tile + tiles, 0
                tiles += more
            passes.append(Pass(lam, first_row, side, first_tile, tiles))
        return passes

    def shared_floats(self, problem: Problem) -> int:
        """Return the shared memory in floats, as the kernel counts it."""
        n, p, _, c, m, nodes, momentum = problem
        side = self.side(problem)
        class_stride = n if nodes is None else self.band_tiles * _round_up(self.tile**2)
        filters = problem.weights * (1 + momentum + (len(self.passes(problem)) > 1))
        s = _round_up(c * p * m * (side * self.tile | 1)) * (2 if side > self.chunk_tiles else 1)
        logits = max(_round_up(c * class_stride), self.patch_groups * problem.weights)
        places = side * (side + 1) // 2 if problem.symmetric else 0
        return logits + filters + self.threads + s + _round_up(side * self.tile) + places

    def cost(self, problem: Problem) -> float:
        """Estimate the cycles of a step: one instruction a cycle and scheduler, which needs three warps to be busy."""
        n, p, d, c, m, nodes, _ = problem
        side, length = self.side(problem), p * m

        def rounds(tasks: int) -> float:
            """Count the warps that a scheduler runs one after the other, with one task for each thread."""
            whole, rest = divmod(tasks, self.threads)
            return whole * max(self.threads / 128, 3) + (max(math.ceil(rest / 128), 3) if rest else 0)

        groups = math.ceil(m / self.filter_group)
        loads, vectors = self.tile + self.filter_group, math.ceil(d / 4)
        products = rounds(c * groups * p * side) * vectors * (4 * self.tile * self.filter_group + 2 * loads + 30)
        tasks = rounds(c * groups * self.patch_groups * vectors)
        products += tasks * math.ceil(p / self.patch_groups) * n * (5 * self.filter_group + 8)
        if nodes is None:
            return products + rounds(c * n) * length * 8 + rounds(n) * c * 40 + rounds(c * length * n) * 20
        total = 0.0
        per_tile = 7 * self.tile**2 + 8 * self.tile
        for one in self.passes(problem):
            total += products + rounds(c * one.tiles) * length * per_tile
            total += rounds(one.tiles * self.tile**2) * c * 25
        inside, across = self.chunk_tiles**2, self.chunk_tiles * (side - self.chunk_tiles)
        for lam in nodes:
            # the other chunks' columns in each row of this chunk, and its columns in each of their rows
            evaluated = inside / 2 + across if lam == 0.5 else inside + 2 * across
            total += rounds(math.ceil(side / self.chunk_tiles) * c * length) * evaluated * per_tile
        return total


# For each number of threads in a block: the samples whose gradients fit a thread's registers, and the tiles of pairs in
# which they may lie, because each tile needs addresses. With more samples the loop would exceed the instruction cache.
_GRADIENTS = {640: (50, 13), 512: (72, 25), 384: (80, 25), 256: (80, 25), 128: (80, 25)}
_MAX_PASSES = 100  # 32 bytes each of the 4 KiB that a kernel's arguments may take
_MAX_TILE = 5  # more pairs than 5 x 5 do not fit the registers that 640 threads have


def fits(problem: Problem, capability: int) -> str | None:
    """Return why the kernel does not take a problem on GPUs of a compute capability such as 90, or None."""
    found = _search(problem, capability)
    return found if isinstance(found, str) else None


def layout(problem: Problem, capability: int) -> Layout:
    """Return the layout for a problem.

    Raises:
        ValueError: the problem does not fit; the message says why.
    """
    found = _search(problem, capability)
    if isinstance(found, str):
        raise ValueError(found)
    return found


@functools.cache
def _search(problem: Problem, capability: int) -> Layout | str:
    """Return the layout of least cost among those that fit, or why there is none."""
    if capability not in SHARED_KIB:
        return (
            f"sm_{capability} is not among the GPUs it is written for: {', '.join(f'sm_{one}' for one in SHARED_KIB)}"
        )
    if min(problem[:5]) < 1:
        return "there is nothing to compute"
    limit = SHARED_KIB[capability] * 256
    sizes = {candidate: candidate.shared_floats(problem) for candidate in _candidates(problem, limit)}
    if min(sizes.values()) > limit:
        least = math.ceil(min(sizes.values()) / 256)
        return f"a network takes {least} KiB of shared memory, and sm_{capability} has {limit // 256}"
    fitting = [one for one, size in sizes.items() if size <= limit and len(one.passes(problem)) <= _MAX_PASSES]
    if not fitting:
        return f"a step takes more than {_MAX_PASSES} passes"
    return min(fitting, key=lambda one: (one.cost(problem), one.threads, sizes[one]))


def _candidates(problem: Problem, limit: int) -> Iterator[Layout]:
    n, p, d, c, m, nodes, _ = problem
    filter_group = math.ceil(m / math.ceil(m / 5))
    tasks = c * math.ceil(m / filter_group) * math.ceil(d / 4)
    for tile in range(min(_MAX_TILE, max(2, n)), 1, -1):
        side = math.ceil(n / tile)
        for threads, (most_samples, most_tiles) in _GRADIENTS.items():
            for groups in sorted({min(p, groups) for groups in (1, 2, 4, 8, math.ceil(threads / tasks))}):
                if nodes is None:
                    yield Layout(tile, threads, 0, side, filter_group, groups)
                    continue
                chunks = math.ceil(side / min(most_samples // tile, most_tiles))
                for chunk in sorted({math.ceil(side / min(side, k * chunks)) for k in (1, 2, 4)}):
                    # all tiles, or as many as there is room for, and a whole row at least
                    tiles = side * (side + 1) // 2 if nodes == (0.5,) else side * side
                    whole = Layout(tile, threads, tiles, chunk, filter_group, groups)
                    yield whole
                    class_tile, parts = c * _round_up(tile**2), groups * problem.weights
                    bare = whole._replace(band_tiles=side).shared_floats(problem) - max(class_tile * side, parts)
                    yield whole._replace(band_tiles=min(max(side, (limit - bare) // class_tile), tiles))


def _constants(problem: Problem, polynomial: Polynomial, chosen: Layout) -> dict[str, int]:
    n, p, d, c, m, nodes, momentum = problem
    passes = chosen.passes(problem)
    return {
        "NUM_SAMPLES": n, "NUM_PATCHES": p, "PATCH_DIM": d, "NUM_CLASSES": c, "FILTERS_PER_CLASS": m,
        "DEGREE": polynomial.degree, "LOWER": int(polynomial.lower), "UPPER": int(polynomial.upper),
        "ERM": int(nodes is None), "MOMENTUM": int(momentum), "NUM_PASSES": len(passes),
        "SYMMETRIC_PASSES": sum(one.lam == 0.5 for one in passes), "TILE": chosen.tile, "THREADS": chosen.threads,
        "BAND_TILES": chosen.band_tiles, "CHUNK_TILES": chosen.chunk_tiles, "FILTER_GROUP": chosen.filter_group,
        "PATCH_GROUPS": chosen.patch_groups, "SHARED_FLOATS": chosen.shared_floats(problem),
    }  # fmt: skip


def mirrored(nodes: Sequence[float], node_weights: Sequence[float]) -> dict[float, float]:
    """Return weights by node, 1/2 first. All pairs at lam are all pairs at 1 - lam, so lam < 1/2 becomes 1 - lam."""
    merged: dict[float, float] = {}
    for lam, weight in zip(nodes, node_weights, strict=True):
        lam = ctypes.c_float(max(lam, 1 - lam)).value  # as the kernel gets it: what is equal there is one node
        merged[lam] = merged.get(lam, 0.0) + weight
    return dict(sorted(merged.items()))


def gradient_descent(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    polynomial: Polynomial,
    nodes: Sequence[float] | None,
    node_weights: Sequence[float] | None,
    lr: float | Tensor,
    steps: int,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    momentum_buffer: Tensor | None = None,
    *,
    capability: int | None = None,
    chosen: Layout | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Train R networks for ``steps`` steps of full-batch gradient descent; nothing is mutated.

    Args:
        input: (R or 1, N, P, D), a floating dtype.
        weight: (R, C, M, D).
        target: (R or 1, N) int64. A label out of range makes its network NaN.
        polynomial: phi.
        nodes, node_weights: lam and weight of each node of the all-pairs Mixup loss; None for plain cross-entropy.
        lr: a number, or a tensor that broadcasts to (R, steps).
        momentum, weight_decay: as in torch.optim.SGD.
        momentum_buffer: (R, C, M, D), returned by the call that this one continues; None to begin.
        capability: compute capability to lay out for, such as 90; by default that of input's device.
        chosen: use this layout instead of :func:`layout`'s.

    Returns:
        the weight, each step's loss before its update (R, steps), and the momentum buffer, None without momentum. All
        are float32.

    Raises:
        ValueError: the problem does not fit shared memory.
        CompileError: the kernel cannot be compiled here.
    """
    problem = Problem.of(input, weight, nodes, momentum)
    num_runs, num_samples, num_patches, patch_dim = len(weight), *problem[:3]
    chosen = chosen or layout(problem, cuda.capability(input.device) if capability is None else capability)

    rows, vectors = chosen.side(problem) * chosen.tile, math.ceil(patch_dim / 4)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=input.device)
    x = empty(input.shape[0], num_patches, rows, 4 * vectors).zero_()
    x[:, :, :num_samples, :patch_dim] = input.transpose(1, 2)
    before, y = weight.float().contiguous(), target.contiguous()
    # one rate is filled in, not copied from the host, which a CUDA graph could not capture
    if isinstance(lr, Tensor) and lr.numel() > 1:
        rates = lr.to(x.device, x.dtype, non_blocking=True).expand(num_runs, steps)
    else:
        rates = empty(()).fill_(float(lr)).expand(num_runs, steps)
    loss, after = empty(num_runs, steps), torch.empty_like(before)
    velocity = None
    if momentum:
        momentum_buffer = torch.zeros_like(before) if momentum_buffer is None else momentum_buffer.float().contiguous()
        velocity = torch.empty_like(before)

    shares = {1.0: 1 / num_samples}
    if nodes is not None:
        shares = {lam: v / num_samples**2 for lam, v in mirrored(nodes, node_weights or ()).items()}
    passes = b"".join(
        struct.pack(
            "4f4i", lam, max((1 - lam) / lam, _LEAST_RATIO), lam / polynomial.threshold, shares[lam], *band
        )
        for lam, *band in chosen.passes(problem)
    )  # fmt: skip
    launch = Launch(
        KERNEL, _constants(problem, polynomial, chosen), num_runs, chosen.threads, 4 * chosen.shared_floats(problem),
        (
            x, y, before, momentum_buffer if momentum else None, after, velocity, loss, rates,
            x[0].numel() // 4 if len(x) > 1 else 0, num_samples if len(y) > 1 else 0, rates.stride(0), rates.stride(1),
            steps, float(polynomial.scale), float(momentum), float(weight_decay), passes,
        ),
    )  # fmt: skip
    if num_runs:
        cuda.run(launch)
    return after, loss, velocity
