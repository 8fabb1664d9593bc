"""The all-pairs loss of samples that are spread over the ranks of a process group.

Every rank holds a shard of the samples. A rank evaluates its own pairs, then those with the shards of half the other
ranks, in the order of their distance in a ring: at distance d, rank r receives the pre-activations of rank r + d,
evaluates all pairs of its rows and those columns, and returns the columns' gradient. So each unordered pair of samples
is evaluated once, every rank does the same work, and a rank holds two pieces of other shards: the current one and one
in transit. :func:`plan` assigns the work and balances uneven shards.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Plan", "agree", "all_pairs", "group_name", "plan", "refuse"]

#: (row, column, row target, column target, nodes, their weights) -> loss, gradient of row, gradient of column
Block = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]

# The most pieces of a shard and the fewest samples of a piece: pieces need less memory, and work starts sooner.
_PIECES, _PIECE = 4, 256
_TOLERANCE = 1.05  # of the mean work; above, single rows change hands


class Step(NamedTuple):
    """One exchange: one of several equal pieces of the samples that travel between ranks at this distance."""

    distance: int
    piece: int
    pieces: int


@dataclass(frozen=True)
class Plan:
    """Who evaluates which pairs, of shards of given sizes.

    Attributes:
        sizes: samples of each rank.
        own: for each pair of ranks (a, b), b = a + distance: b's samples travel to a, which pairs its first ``own``
            rows with them; the other rows travel to b, which pairs them with all its samples.
    """

    sizes: tuple[int, ...]
    own: Mapping[tuple[int, int], int]

    @property
    def steps(self) -> list[Step]:
        """Return the steps in order; in a ring, distances are at most half the number of ranks."""
        pieces = min(_PIECES, max(1, max(self.sizes) // _PIECE))
        return [Step(d, piece, pieces) for d in range(1, len(self.sizes) // 2 + 1) for piece in range(pieces)]

    def pairs_of(self, rank: int, step: Step) -> list[tuple[int, int]]:
        """Return the pairs (a, b) at the step's distance of which ``rank`` is one."""
        ranks = len(self.sizes)
        both = [(rank, (rank + step.distance) % ranks), ((rank - step.distance) % ranks, rank)]
        return [pair for pair in dict.fromkeys(both) if pair in self.own]

    def rows_of(self, rank: int, pair: tuple[int, int]) -> slice:
        """Return the samples of ``rank``, one of the pair, that ``rank`` pairs with the other's."""
        return slice(0, self.own[pair] if rank == pair[0] else self.sizes[rank])

    def send_rows(self, rank: int, pair: tuple[int, int], step: Step) -> slice:
        """Return the samples of ``rank``, one of the pair, that travel to the other in this step."""
        a, b = pair
        if rank == a:
            first, count = self.own[pair], self.sizes[a] - self.own[pair] if self.sizes[b] else 0
        else:
            first, count = 0, self.sizes[b] if self.own[pair] else 0
        begin, end = (first + count * piece // step.pieces for piece in (step.piece, step.piece + 1))
        return slice(begin, end)

    def work(self) -> list[int]:
        """Count the pairs of samples that each rank evaluates, an unordered pair once."""
        work = [n * (n + 1) // 2 for n in self.sizes]
        for (a, b), own in self.own.items():
            work[a] += own * self.sizes[b]
            work[b] += (self.sizes[a] - own) * self.sizes[b]
        return work

    def sent(self) -> list[int]:
        """Count the samples that each rank sends to others; as many gradients of samples come back to it."""
        sent = [0] * len(self.sizes)
        for (a, b), own in self.own.items():
            sent[b] += self.sizes[b] if own else 0
            sent[a] += self.sizes[a] - own if self.sizes[b] else 0
        return sent


@functools.lru_cache
def plan(sizes: tuple[int, ...]) -> Plan:
    """Make a plan for shards whose sizes differ by at most one.

    At every distance a rank receives the whole shard of the other, so ranks with equal shards do equal work. At half an
    even ring both ranks of a pair would do so; there each takes half. If one sample more or less matters, because
    shards are small, rows then move from the rank with the most work to the one with the least.
    """
    ranks = len(sizes)
    own = {}
    for distance in range(1, ranks // 2 + 1):
        opposite = 2 * distance == ranks
        for a in range(ranks // 2 if opposite else ranks):
            own[a, (a + distance) % ranks] = sizes[a] // 2 if opposite else sizes[a]
    work = Plan(sizes, own).work()
    while max(work) > _TOLERANCE * sum(work) / ranks:
        giver = work.index(max(work))
        moves = []
        for (a, b), rows in own.items():
            movable = rows if giver == a else sizes[a] - rows if giver == b else 0  # a's rows that the giver evaluates
            taker = b if giver == a else a
            count = min(movable, (work[giver] - work[taker]) // 2 // sizes[b] if sizes[b] else 0)
            if count:
                moves.append((work[taker], a, b, -count if giver == a else count))
        if not moves:
            break
        _, a, b, change = min(moves)
        own[a, b] += change
        work[a] += change * sizes[b]
        work[b] -= change * sizes[b]
    return Plan(sizes, own)


def group_name(group: Any) -> str:
    """Return the name that operators take for a process group; ``"world"`` means all processes.

    Raises:
        RuntimeError: torch.distributed is missing or not initialised.
        TypeError: a value that is not a process group.
        ValueError: a group without this process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("group needs torch.distributed: call torch.distributed.init_process_group() first")
    if group == "world":
        group = dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must be one of which this process is a member, got GroupMember.NON_GROUP_MEMBER")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or 'world', got {group!r}")
    return str(group.group_name)


def refuse(name: str, error: Exception) -> None:
    """Tell the other ranks, which are in :func:`agree`, that this one refuses its arguments."""
    _exchange_headers(_group(name), 0, (), error)


def agree(name: str, samples: int, settings: Mapping[str, Any], check: Callable[[], None]) -> tuple[int, ...]:
    """Return the number of samples of each rank, after checking that all ranks have the same settings.

    Args:
        name: name of the group.
        samples: number of samples of this rank.
        settings: values that must be equal on all ranks, by their names in error messages.
        check: function that raises if this rank's arguments are invalid.

    Raises:
        Exception: the error that ``check`` raised here.
        ValueError: on every rank, settings that differ or a rank that refuses its arguments; the message names them.
    """
    group, error = _group(name), None
    try:
        check()
        _check_served(group, settings["device"])
    except Exception as trouble:
        error = trouble
    sizes = _exchange_headers(group, samples, tuple((key, str(value)) for key, value in settings.items()), error)
    if error is not None:
        raise error
    return sizes


def all_pairs(
    block: Block, s: Tensor, target: Tensor, nodes: Mapping[float, float], sizes: tuple[int, ...], name: str
) -> tuple[Tensor, Tensor | None]:
    """Compute the loss (R,) over all pairs of all ranks' samples, the same bits on each, and this rank's gradient.

    The gradient is that of the sum over ranks of their losses, W L: averaged over ranks, as DistributedDataParallel
    does, it is that of L.

    Args:
        block: :func:`mixfeat.ops.pairwise_mixup_block` of an activation, with gradients on all ranks or on none.
        s: pre-activations (R,n,P,C,M) of this rank's samples.
        target: (n,) or (R,n).
        nodes: weights of the nodes lam, with sum 1; lam and 1 - lam are one node.
        sizes: number of samples of each rank.
        name: name of the group.
    """
    group = _group(name)
    ranks, total = len(sizes), sum(sizes)
    # with W in the weights, gradients are those of W L
    own_nodes = {node: weight * ranks / max(1, total**2) for node, weight in nodes.items()}
    cross_nodes: dict[float, float] = {}  # pairs of (row, column) and of (column, row), which lam sees as 1 - lam
    for node, weight in own_nodes.items():
        for either in (node, 1 - node):
            cross_nodes[either] = cross_nodes.get(either, 0.0) + weight
    even = _even(sizes)
    if even != sizes:
        s, target = _spread(s, 1, sizes, even, group), _spread(target, target.dim() - 1, sizes, even, group)
    loss, grad = _ring(block, s, target, own_nodes, cross_nodes, plan(even), group)
    if grad is not None and even != sizes:
        grad = _spread(grad, 1, even, sizes, group)
    # summed in the order of the ranks, unlike an all-reduce, so that bits are equal on all ranks and repeat
    parts = [torch.empty_like(loss) for _ in sizes]
    with _contact(group):
        dist.all_gather(parts, loss, group=group)
    dtype = torch.float64 if s.dtype == torch.float64 else torch.float32
    return (torch.stack(parts).sum(0) / ranks).to(dtype), grad


def _ring(
    block: Block, s: Tensor, target: Tensor, own_nodes: Mapping[float, float], cross_nodes: Mapping[float, float],
    plan: Plan, group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute this rank's part of the loss, float64, and its samples' gradient, while transfers run."""
    rank, steps = group.rank(), plan.steps
    prefetch = _fetch(s, target, plan, steps[:1], group)
    loss, grad, _ = block(s, None, target, None, list(own_nodes), list(own_nodes.values()))
    loss = loss.double()
    returning = _Transfer(group)
    for number, step in enumerate(steps):
        columns = prefetch
        prefetch = _fetch(s, target, plan, steps[number + 1 : number + 2], group)
        columns.wait()
        back = _Transfer(group)
        for pair in plan.pairs_of(rank, step):
            other = pair[rank == pair[0]]
            if other in columns.received:
                rows = plan.rows_of(rank, pair)
                part, row_grad, column_grad = block(
                    s[:, rows], columns.received[other][0], target[..., rows], columns.received.pop(other)[1],
                    list(cross_nodes), list(cross_nodes.values()),
                )  # fmt: skip
                loss += part
                if grad is not None and row_grad is not None and column_grad is not None:
                    grad[:, rows] += row_grad
                    back.send(other, column_grad)
                del row_grad, column_grad
            sent = plan.send_rows(rank, pair, step)
            if grad is not None and sent.start < sent.stop:
                back.receive(other, grad.new_empty(grad[:, sent].shape), sent)
        back.start()
        returning.add_to(grad)
        returning = back
    returning.add_to(grad)
    return loss, grad


class _Transfer:
    """Sends and receives that run together."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.received: dict[int, Any] = {}
        self._ops: list[dist.P2POp] = []
        self._works: list[dist.Work] = []
        self._places: dict[int, slice] = {}

    def send(self, rank: int, *tensors: Tensor) -> None:
        self._add(dist.isend, rank, [tensor.contiguous() for tensor in tensors])

    def receive(self, rank: int, tensors: Any, place: slice = slice(None)) -> None:
        """Receive into ``tensors``, one or a tuple, ``received[rank]``; ``place`` is the position of a gradient."""
        self.received[rank], self._places[rank] = tensors, place
        self._add(dist.irecv, rank, tensors if isinstance(tensors, tuple) else [tensors])

    def _add(self, operation: Any, rank: int, tensors: Sequence[Tensor]) -> None:
        peer = dist.get_global_rank(self.group, rank)
        for tag, tensor in enumerate(tensors):
            self._ops.append(dist.P2POp(operation, tensor, peer, self.group, tag))

    def start(self) -> None:
        if self._ops:
            with _contact(self.group):
                self._works = dist.batch_isend_irecv(self._ops)

    def wait(self) -> None:
        with _contact(self.group):
            for work in self._works:
                work.wait()
        self._works, self._ops = [], []  # frees the tensors that were sent

    def add_to(self, grad: Tensor | None) -> None:
        """Wait, then add the received gradients in the order of the requests."""
        self.wait()
        if grad is not None:
            for rank, part in self.received.items():
                grad[:, self._places[rank]] += part


def _fetch(s: Tensor, target: Tensor, plan: Plan, steps: list[Step], group: dist.ProcessGroup) -> _Transfer:
    """Start exchanging the samples of a step, if any."""
    transfer, rank = _Transfer(group), group.rank()
    for step in steps:
        for pair in plan.pairs_of(rank, step):
            other = pair[rank == pair[0]]
            sent, received = plan.send_rows(rank, pair, step), plan.send_rows(other, pair, step)
            if sent.start < sent.stop:
                transfer.send(other, s[:, sent], target[..., sent])
            if count := received.stop - received.start:
                shapes = (s.shape[0], count, *s.shape[2:]), (*target.shape[:-1], count)
                transfer.receive(other, (s.new_empty(shapes[0]), target.new_empty(shapes[1])))
    transfer.start()
    return transfer


def _even(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes if they differ by at most one, else even ones of the same sum."""
    if max(sizes) - min(sizes) <= 1:
        return sizes
    total, ranks = sum(sizes), len(sizes)
    return tuple(total // ranks + (rank < total % ranks) for rank in range(ranks))


def _spread(t: Tensor, dim: int, sizes: Sequence[int], wanted: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Move samples along ``dim`` from shards of ``sizes`` to shards of the ``wanted`` sizes, in the same order."""
    rank = group.rank()
    have, want = ([0, *itertools.accumulate(counts)] for counts in (sizes, wanted))

    def common(giver: int, taker: int) -> int:
        return max(0, min(have[giver + 1], want[taker + 1]) - max(have[giver], want[taker]))

    moved = t.movedim(dim, 0).contiguous()
    result = moved.new_empty(wanted[rank], *moved.shape[1:])
    giving, taking = zip(*((common(rank, other), common(other, rank)) for other in range(len(sizes))), strict=True)
    with _contact(group):
        dist.all_to_all_single(result, moved, list(taking), list(giving), group=group)
    return result.movedim(0, dim)


def _group(name: str) -> dist.ProcessGroup:
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # type: ignore[arg-type]


def _backends(group: dist.ProcessGroup) -> dict[str, str]:
    """Return the backends by device type."""
    return dict(entry.split(":") for entry in dist.get_backend_config(group).split(","))


def _check_served(group: dist.ProcessGroup, device: str) -> None:
    """Refuse a device whose tensors the group cannot send from rank to rank."""
    backend = _backends(group).get(device)
    if backend is None or (backend == "gloo" and device != "cpu"):
        served = "no backend" if backend is None else "gloo, which does not send them"
        raise ValueError(f"group must serve {device}, where input is, by nccl for cuda or gloo for cpu; got {served}")


def _exchange_headers(
    group: dist.ProcessGroup, samples: int, settings: tuple[tuple[str, str], ...], error: Exception | None
) -> tuple[int, ...]:
    """Return every rank's number of samples, after checking that all have the same settings and no error."""
    device = "cpu" if "cpu" in _backends(group) else "cuda"
    mine = torch.tensor([error is None, samples, _digest(settings)], dtype=torch.int64, device=device)
    headers = [torch.empty_like(mine) for _ in range(group.size())]
    with _contact(group):
        dist.all_gather(headers, mine, group=group)
        rows = torch.stack(headers).tolist()
        fine = all(ok and digest == rows[0][2] for ok, _, digest in rows)
        if not fine:
            reports: list[Any] = [None] * group.size()
            refusal = None if error is None else f"{type(error).__name__}: {error}"
            dist.all_gather_object(reports, (refusal, settings), group=group)
    if not fine and error is None:
        raise ValueError(_disagreement(reports))
    return tuple(count for _, count, _ in rows)


def _disagreement(reports: Sequence[tuple[str | None, tuple[tuple[str, str], ...]]]) -> str:
    refusals = [
        f"rank {rank} refused its arguments ({refusal})" for rank, (refusal, _) in enumerate(reports) if refusal
    ]
    if refusals:
        return "; ".join(refusals)
    differing = []
    for key, _ in reports[0][1]:
        ranks: dict[str, list[int]] = {}
        for rank, (_, settings) in enumerate(reports):
            ranks.setdefault(dict(settings)[key], []).append(rank)
        if len(ranks) > 1:
            listed = ", ".join(f"{value} on rank {', '.join(map(str, where))}" for value, where in ranks.items())
            differing.append(f"{key} must be the same on all ranks of group, got {listed}")
    return "; ".join(differing)


@functools.lru_cache
def _digest(settings: tuple[tuple[str, str], ...]) -> int:
    return int.from_bytes(hashlib.sha256(repr(settings).encode()).digest()[:7], "big")


@contextmanager
def _contact(group: dist.ProcessGroup) -> Iterator[None]:
    """Turn a failed transfer into an error that explains it."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise RuntimeError(
            f"rank {group.rank()} of {group.size()} lost contact to another rank of group, which died, failed, or took "
            f"longer than the group's timeout: {reason}"
        ) from error
