"""Runs every experiment: tasks, the workers that compute them, and the results on disk.

A :class:`Run` is a task: a pure function that takes a :class:`Record`, trains for some seconds and returns a later
record. :func:`train` hands such chunks of work to all workers of a machine or of a Dask cluster. Only the process that
calls it writes results, so a command that is stopped or killed loses at most the current chunks. Neither the number of
workers nor the length of the chunks changes any number.
"""

import hashlib
import io
import json
import logging
import math
import os
import pickle
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import torch
from filelock import FileLock, Timeout
from torch import Tensor

import mixfeat as mf
from mixfeat._files import replacing
from mixfeat.experiments.common import BaseSettings, DivergedError, identity

__all__ = [
    "Cluster", "EngineError", "Local", "Record", "Results", "ResultsError", "Run", "WorkerDiedError", "Workers",
    "cpu_count", "software_of", "stack", "train",
]  # fmt: skip

CHUNK_SECONDS = 2.0  # about the most that a kill loses of each run
_CONNECT_SECONDS, _FIRST_WORKER_SECONDS = 10, 60
_LOST = "the cluster's scheduler was lost: pass --resume to continue"
_VERSION = 3  # of the results folder; 2 was an SQLite database
_ABOUT, _SUFFIX = "settings.json", ".run"


class EngineError(Exception):
    """A request that cannot be served; the message is one line that says why and what to do."""


class ResultsError(EngineError):
    """Results that cannot be used; the message is one line that says why and what to do."""


class WorkerDiedError(Exception):
    """A run whose workers keep dying; the message is one line that names the run."""


# tasks


class Record(NamedTuple):
    """The progress of one run: a checkpoint, or if ``finished`` its result.

    A result without a state belongs to a run that diverged before ``step``.
    """

    finished: bool
    step: int
    seconds: float
    state: dict[str, Tensor]

    @property
    def diverged(self) -> bool:
        """Return whether the run produced numbers that are not finite."""
        return self.finished and not self.state


class Run(Protocol):
    """One run of an experiment. A worker gets it pickled."""

    @property
    def settings(self) -> BaseSettings:
        """Return the settings of the experiment."""

    @property
    def name(self) -> str:
        """Return the name of the run's record, which is part of a file name."""

    @property
    def label(self) -> str:
        """Return the run's name on the screen."""

    @property
    def steps(self) -> int:
        """Return the run's number of steps."""

    @property
    def group(self) -> Hashable:
        """Return a key that is equal for runs trained in one call, None for a run that is trained alone."""

    @staticmethod
    def advance(runs: Sequence[Any], records: Sequence[Record | None], seconds: float) -> list[Record]:
        """Train runs of one group for about ``seconds``, at least one step, and return their new records.

        The records are all at the same step, or all None at the start. A run that diverges does not affect the others.
        """


def train(
    runs: Sequence[Run], results: "Results | None" = None, workers: "Workers | None" = None,
    report: Callable[[Run, Record | None, Record], Any] = lambda run, before, after: None,
) -> dict[str, Record]:  # fmt: skip
    """Train all runs to the end and return their finished records by name, in the order of the runs.

    Args:
        runs: the runs, in the order in which they start, best the longest first. All have the same device and dtype.
        results: storage for the records, from which unfinished runs continue; by default records are not stored.
        workers: workers that compute; by default this process.
        report: called after every chunk with each of its runs, the record before it (None at the start of a run) and
            the record after it.

    Raises:
        WorkerDiedError: one run's workers keep dying.
        EngineError: results cannot be read or written, or workers cannot be used.
    """
    workers = Local() if workers is None else workers
    records: dict[str, Record] = {}
    for run in runs:
        record = results.get(run.name) if results else None
        if record is not None:
            records[run.name] = record
    queue = deque(_batches([run for run in runs if not _finished(run, records)], records))
    software = software_of(runs[0].settings) if runs else {}
    pending: dict[Future[list[Record]], tuple[Run, ...]] = {}
    deaths: Counter[str] = Counter()
    while queue or pending:
        while queue and len(pending) < workers.slots:
            batch = queue.popleft()
            threads = workers.threads(len(pending) + len(queue) + 1)
            before = [records.get(run.name) for run in batch]
            pending[workers.submit(_advance, software, batch, before, CHUNK_SECONDS, threads)] = batch
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            batch = pending.pop(future)
            try:
                after = future.result()
            except workers.death:
                name = batch[0].name
                deaths[name] += 1
                if deaths[name] == workers.attempts:
                    raise WorkerDiedError(
                        f"{batch[0].label}: every worker that tried it died: pass --resume to try again"
                    ) from None
                queue.appendleft(batch)
                continue
            except CancelledError:
                raise EngineError(_LOST) from None
            except ImportError as error:
                raise EngineError(f"a worker cannot be used: {_line(error)}") from None
            for run, record in zip(batch, after, strict=True):
                if results:
                    results.save(run.name, record)
                report(run, records.get(run.name), record)
                records[run.name] = record
            rest = tuple(run for run in batch if not _finished(run, records))
            if rest:  # continue before starting others, so that a stopped command leaves finished runs
                queue.appendleft(rest)
            deaths.pop(batch[0].name, None)
    return {run.name: records[run.name] for run in runs}


def stack(runs: Sequence[Any], records: Mapping[str, Record], curves: Sequence[str]) -> Record:
    """Stack the finished records of R runs of one method: ``curves`` (E+1,R,...), all else (R,...); seconds are summed.

    Raises:
        DivergedError: one of the runs diverged.
    """
    found = [records[run.name] for run in runs]
    for run, record in zip(runs, found, strict=True):
        if record.diverged:
            raise DivergedError(
                f"{run.method} left the finite numbers before step {record.step}: "
                f"try a smaller lr than {run.settings.lr}"
            )
    state = {
        name: torch.stack([record.state[name] for record in found], int(name in curves)) for name in found[0].state
    }
    return Record(True, found[0].step, sum(record.seconds for record in found), state)


def _finished(run: Run, records: dict[str, Record]) -> bool:
    return run.name in records and records[run.name].finished


def _batches(runs: Sequence[Run], records: dict[str, Record]) -> list[tuple[Run, ...]]:
    """Batch runs that are trained in one call: those of the same group at the same step."""
    batches: dict[Hashable, list[Run]] = {}
    for run in runs:
        step = records[run.name].step if run.name in records else 0
        batches.setdefault(run.name if run.group is None else (run.group, step), []).append(run)
    return [tuple(batch) for batch in batches.values()]


# workers


class Workers(ABC):
    """Workers that compute chunks; a context manager that ends them.

    Attributes:
        slots: number of chunks that are computed at a time.
        death: the exception that a chunk's future raises if its worker dies.
        attempts: the number of deaths in a row that ends a run.
    """

    death: type[Exception]
    attempts: int

    @property
    @abstractmethod
    def slots(self) -> int: ...

    @abstractmethod
    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Start a chunk."""

    def threads(self, tasks: int) -> int | None:
        """Return the number of PyTorch threads of a worker for this number of tasks; None changes nothing."""
        return None

    @abstractmethod
    def close(self) -> None:
        """End all workers at once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Local(Workers):
    """Processes of this machine, which loky starts at first use; with one slot, this process.

    Args:
        slots: number of processes.
        gpus: give each process its own GPU as its current device.
    """

    death = BrokenProcessPool
    attempts = 3

    def __init__(self, slots: int = 1, *, gpus: bool = False) -> None:
        self._slots, self._gpus = slots, gpus
        self._executors: dict[int, Executor] = {}
        self._last: dict[int, Future[Any]] = {}

    @property
    def slots(self) -> int:
        return self._slots

    def threads(self, tasks: int) -> int | None:
        """Share the cores among the tasks, and respect OMP_NUM_THREADS."""
        if self._slots == 1:
            return None
        return min(torch.get_num_threads(), max(1, cpu_count() // min(tasks, self._slots)))

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        if self._slots == 1:
            done: Future[Any] = Future()
            done.set_result(function(*arguments))
            return done
        slot = next(slot for slot in range(self._slots) if slot not in self._last or self._last[slot].done())
        if slot not in self._executors or isinstance(self._last[slot].exception(), BrokenProcessPool):
            self._executors[slot] = self._executor(slot)
        self._last[slot] = self._executors[slot].submit(function, *arguments)
        return self._last[slot]

    def _executor(self, slot: int) -> Executor:
        """Return an executor of one process, so that a process that dies identifies its task."""
        from joblib.externals.loky import ProcessPoolExecutor

        return ProcessPoolExecutor(
            1, initializer=_start_worker, initargs=(os.getpid(), slot if self._gpus else None),
            env={"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")},  # spinning slows other runs
        )  # fmt: skip

    def close(self) -> None:
        for executor in self._executors.values():
            executor.shutdown(kill_workers=True)  # type: ignore[call-arg]


def _start_worker(parent: int, gpu: int | None) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches workers too; their parent ends them
    if gpu is not None:
        torch.cuda.set_device(gpu)


def _end_with(parent: int) -> None:
    """End this process after its parent has ended, because a killed parent cannot end it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def cpu_count() -> int:
    """Return the number of cores that affinity and container limits let this process use."""
    import joblib

    return int(joblib.cpu_count())


class Cluster(Workers):
    """The workers of a Dask cluster, which may join and leave.

    If a worker dies, Dask itself runs its chunk again on another worker, up to the scheduler's ``allowed-failures``
    times.

    Args:
        address: address of the scheduler.
        software: required of every worker, from :func:`software_of`.

    Raises:
        EngineError: the scheduler cannot be reached, has no workers, or one of them has other software.
    """

    def __init__(self, address: str, software: dict[str, str]) -> None:
        import distributed

        self.death, self.attempts = distributed.KilledWorker, 1  # Dask has already retried
        logging.getLogger("distributed").setLevel(logging.CRITICAL)  # our error is one line
        try:
            self._client = distributed.Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            raise EngineError(f"the scheduler {address} cannot be reached: {_line(error)}") from None
        try:
            self._client.wait_for_workers(1, timeout=_FIRST_WORKER_SECONDS)
            refusals = self._client.run(_refusal, software, on_error="return")
        except TimeoutError:
            self.close()
            raise EngineError(f"the scheduler {address} has no workers: start some first") from None
        for worker, refusal in refusals.items():
            if refusal is not None:
                self.close()
                raise EngineError(f"worker {worker} cannot be used: {_line(refusal)}")
        self._executor = self._client.get_executor(pure=False)
        self._counted = (-math.inf, 0)

    @property
    def slots(self) -> int:
        when, threads = self._counted
        if time.monotonic() - when > 1:
            try:
                threads = sum(self._client.nthreads().values())
            except OSError:
                raise EngineError(_LOST) from None
            self._counted = (time.monotonic(), threads)
        return max(1, threads)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        def call(content: bytes) -> Any:  # a local function is pickled by value
            function, arguments = pickle.loads(content)
            return function(*arguments)

        # The scheduler unpickles messages and may not have mixfeat, so it gets bytes.
        future: Future[Any] = self._executor.submit(call, pickle.dumps((function, arguments)))
        return future

    def close(self) -> None:
        self._client.close()


def software_of(settings: BaseSettings) -> dict[str, str]:
    """Return everything besides the settings that a record depends on, to the last bit."""
    return {name: value for name, value in identity(settings).items() if name in ("backend", "mixfeat", "torch")}


def _advance(
    software: dict[str, str], runs: Sequence[Run], records: Sequence[Record | None], seconds: float, threads: int | None
) -> list[Record]:
    """Compute one chunk, in a worker."""
    refusal = _refusal(software)
    if refusal is not None:
        raise EngineError(f"a worker cannot be used: {refusal}")
    if threads is not None and threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    with mf.backend(software["backend"]):
        return type(runs[0]).advance(runs, records, seconds)


def _refusal(software: dict[str, str]) -> str | None:
    """Return why this process cannot work for a process with this software, or None."""
    for name, found in (("mixfeat", mf.__version__), ("torch", torch.__version__)):
        if found != software[name]:
            return f"it has {name} {found}, and this command has {software[name]}"
    if software["backend"] not in mf.backends.available():
        return f"it lacks the backend {software['backend']}, which this command uses"
    return None


# results


class Results:
    """A folder with the records of one experiment under one set of settings, one file for each run.

    Files are replaced atomically: a process that is killed at any moment leaves the old record or the new one. Each
    file has a checksum over its settings, its name and its content. A folder that is damaged, or that belongs to
    something else, is refused and not changed. One process at a time may open the folder.

    Args:
        folder: created if missing.
        experiment: name of the experiment.
        settings: JSON-serialisable; the records belong to them.
        resume: continue from the records in the folder. Without it a folder with records is refused.

    Raises:
        ResultsError: the folder cannot be used.
    """

    def __init__(self, folder: Path, experiment: str, settings: dict[str, Any], *, resume: bool = False) -> None:
        self.folder = folder
        about = {"version": _VERSION, "experiment": experiment, "settings": json.loads(json.dumps(settings))}
        self._digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).digest()
        self._lock = FileLock(folder / ".lock")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
        except Timeout:
            raise ResultsError(
                f"{folder} is in use by another process: wait for it, or choose another folder"
            ) from None
        except OSError as error:
            raise ResultsError(f"{folder} cannot be used: {error.strerror or _line(error)}") from None
        try:
            self._open(about, resume)
        except BaseException:
            self.close()
            raise

    def _open(self, about: dict[str, Any], resume: bool) -> None:
        path = self.folder / _ABOUT
        if not any(self.folder.glob(f"*{_SUFFIX}")):
            _write(path, json.dumps(about, indent=1).encode() + b"\n")
            return
        try:
            found = json.loads(path.read_bytes())
            version, experiment, settings = (found[key] for key in ("version", "experiment", "settings"))
            differing = sorted(k for k in settings.keys() | about["settings"].keys()
                               if settings.get(k) != about["settings"].get(k))  # fmt: skip
        except OSError as error:
            raise ResultsError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ResultsError(f"{path} is damaged: move {self.folder} away, or choose another folder") from None
        if version != _VERSION:
            raise ResultsError(f"{path} has version {version!r}, this mixfeat needs {_VERSION}: choose another folder")
        if experiment != about["experiment"]:
            raise ResultsError(
                f"{self.folder} belongs to the experiment {experiment!r}, not {about['experiment']!r}: "
                "choose another folder"
            )
        if differing:
            listed = ", ".join(f"{k} {settings.get(k)} there and {about['settings'].get(k)} asked" for k in differing)
            raise ResultsError(f"{self.folder} has results with other settings ({listed}): choose another folder")
        if not resume:
            raise ResultsError(
                f"{self.folder} already has results: pass --resume to continue, or choose another folder"
            )

    def get(self, name: str) -> Record | None:
        """Return the record of that name, or None.

        Raises:
            ResultsError: a file that cannot be read or is damaged.
        """
        path = self._path(name)
        try:
            head, _, content = path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ResultsError(f"{path} cannot be read: {error.strerror}") from None
        if head != self._head(name, content):
            raise ResultsError(
                f"{path} is damaged, or belongs to other settings: delete it to train this run again, or choose "
                "another folder"
            )
        return Record(**torch.load(io.BytesIO(content), weights_only=True))

    def save(self, name: str, record: Record) -> None:
        """Replace the record of that name atomically.

        Raises:
            ResultsError: a file that cannot be written.
        """
        buffer = io.BytesIO()
        torch.save(record._asdict(), buffer)
        content = buffer.getvalue()
        _write(self._path(name), self._head(name, content) + b"\n" + content)

    def close(self) -> None:
        """Release the folder."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_SUFFIX}"

    def _head(self, name: str, content: bytes) -> bytes:
        checksum = hashlib.sha256(self._digest + name.encode() + b"\0" + content).hexdigest()
        return f"mixfeat run {checksum}".encode()


def _write(path: Path, content: bytes) -> None:
    """Replace a file as a whole, or leave it."""
    try:
        with replacing(path) as part, part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ResultsError(f"{path} cannot be written: {error.strerror}") from None


def _line(error: Any) -> str:
    """Return the text of an error as one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
