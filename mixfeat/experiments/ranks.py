"""The processes of one launch by torchrun share the runs of an experiment: each takes the next that nobody has.

The runs need nothing of each other, so no process group is formed. A counter in the launch's key-value store says which
run is next; the records go to one :class:`~mixfeat.experiments.store.Store`, which all processes have open.
"""

import os
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from mixfeat.experiments.store import Store

__all__ = ["Ranks", "RanksError"]

T = TypeVar("T")


class RanksError(Exception):
    """A launch that cannot share its runs; the message is one line that says why and what to do."""


class Ranks:
    """This process among those of its launch, by the environment that torchrun sets; alone without it.

    On a machine with GPUs each rank gets one as its current device.

    Attributes:
        rank: of this process. count: of all.

    Raises:
        RanksError: a launch over several machines, which cannot share a file.
    """

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.count == 1:
            return
        if int(os.environ.get("LOCAL_WORLD_SIZE", self.count)) != self.count:
            raise RanksError(
                "a launch over several machines cannot share one store: start mixfeat sweep on each with its part, by "
                "--shard, and join the stores by mixfeat merge"
            )
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", self.rank)) % torch.cuda.device_count())
        from torch.distributed.rendezvous import rendezvous

        self._keys, _, _ = next(iter(rendezvous("env://", timeout=timedelta(minutes=10))))

    def open(self, path: Path, experiment: str, settings: dict[str, Any], *, resume: bool) -> Store:
        """The store of all ranks; the first sees to it that it is there and may be used."""
        if self.count == 1:
            return Store(path, experiment, settings, resume=resume)
        if self.rank == 0:
            Store(path, experiment, settings, resume=resume).close()
        else:
            self._keys.wait(["open"])
        store = Store(path, experiment, settings, resume=True, shared=True)
        self._keys.set("open", "yes")
        return store

    def share(self, runs: Sequence[T]) -> Iterator[T]:
        """Those of the runs, equal on all ranks, that fall to this one; on the first rank until all have ended."""
        if self.count == 1:
            yield from runs
            return
        while (number := self._keys.add("runs begun", 1) - 1) < len(runs):
            yield runs[number]
        self._keys.add("ranks done", 1)
        while self.rank == 0 and self._keys.add("ranks done", 0) < self.count:
            time.sleep(0.1)  # if one of them dies, torchrun ends this one too
