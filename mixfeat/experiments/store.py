"""Where an experiment keeps what it has done: one SQLite file that survives being killed at any moment."""

import contextlib
import hashlib
import io
import json
import sqlite3
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

__all__ = ["Record", "Store", "StoreError", "merge"]

_APPLICATION_ID = 0x6D666561  # "mfea": marks the file as ours
_VERSION = 2
_SHARED_SECONDS = 60  # to wait for others who write; they take milliseconds
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE record (
    name TEXT PRIMARY KEY,      -- what was run, e.g. the method
    finished INTEGER NOT NULL,  -- 1: the result; 0: a checkpoint on the way to it
    step INTEGER NOT NULL,
    seconds REAL NOT NULL,
    state BLOB NOT NULL,        -- torch.save of a dict of tensors, read with weights_only
    sha256 TEXT NOT NULL        -- of all the others
);
"""


class StoreError(Exception):
    """A store that cannot be used; the message is one line that says why and what to do."""


class Record(NamedTuple):
    """How far one run has come: a checkpoint, or if ``finished`` its result."""

    finished: bool
    step: int
    seconds: float
    state: dict[str, Tensor]


class Store:
    """The records of one experiment with one set of settings, by name.

    Every :meth:`save` is one transaction: a process killed at any moment leaves the record before or after it, never a
    part. The file is locked while it is open, to all but those who share it. A damaged file, or one that is no store of
    this experiment, is left as it was.

    Args:
        path: of the SQLite file; created where missing.
        experiment: name of the experiment.
        settings: JSON-serialisable; records belong to them.
        resume: go on with the records that are there. Without it a file that holds any is refused.
        shared: other processes of this machine have it open too, in the same way; of those who save the same record,
            the last wins. The file must have been made before.

    Raises:
        StoreError: for a file that cannot be used.
    """

    def __init__(
        self, path: Path, experiment: str, settings: dict[str, Any], *, resume: bool = False, shared: bool = False
    ) -> None:
        self.path = path
        _check_header(path)
        try:
            self._db = sqlite3.connect(path, timeout=_SHARED_SECONDS if shared else 0, isolation_level=None)
        except sqlite3.Error as error:
            raise StoreError(f"{path} cannot be opened: {error}") from None
        try:
            # the lock taken here is kept until the connection closes or the process dies; with a write-ahead log a
            # connection keeps a shared one, which shuts out those that ask for the whole file
            self._db.execute(f"PRAGMA locking_mode = {'NORMAL' if shared else 'EXCLUSIVE'}")
            self._db.execute(f"PRAGMA journal_mode = {'WAL' if shared else 'DELETE'}")
            self._db.execute(f"BEGIN {'IMMEDIATE' if shared else 'EXCLUSIVE'}")
            if not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                self._create(experiment)
            self._read(experiment, settings, resume)
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            self.close()
            if "locked" in str(error):
                raise StoreError(
                    f"{path} is in use by another process: wait for it, or choose another folder"
                ) from None
            raise StoreError(f"{path} cannot be used: {_line(error)}") from None
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            self.close()
            raise StoreError(f"{path} is damaged ({_line(error)}): move it away, or choose another folder") from None
        except BaseException:
            self.close()
            raise

    def get(self, name: str) -> Record | None:
        """The record of that name, if there is one."""
        row = self._db.execute("SELECT * FROM record WHERE name = ?", (name,)).fetchone()
        return None if row is None else _record(row)

    def names(self) -> list[str]:
        """Of all records."""
        return [name for (name,) in self._db.execute("SELECT name FROM record ORDER BY rowid")]

    def save(self, name: str, record: Record) -> None:
        """Replace the record of that name, atomically."""
        buffer = io.BytesIO()
        torch.save(record.state, buffer)
        blob = buffer.getvalue()
        row = (name, int(record.finished), record.step, float(record.seconds), blob)
        try:
            self._db.execute("INSERT OR REPLACE INTO record VALUES (?, ?, ?, ?, ?, ?)", (*row, _checksum(*row)))
        except sqlite3.Error as error:
            raise StoreError(f"{self.path} cannot be written: {error}") from None

    def close(self) -> None:
        """Close the file and release its lock; what was not committed is undone."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _create(self, experiment: str) -> None:
        self._db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        self._db.execute(f"PRAGMA user_version = {_VERSION}")
        for statement in _SCHEMA.split(";\n"):
            self._db.execute(statement)
        self._put_meta("experiment", experiment)

    def _read(self, experiment: str, settings: dict[str, Any], resume: bool) -> None:
        problem = self._db.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)
        tables = {sql for (sql,) in self._db.execute("SELECT sql FROM sqlite_master") if sql}
        if tables != {statement.strip() for statement in _SCHEMA.split(";\n") if statement}:
            raise sqlite3.DatabaseError("its tables are not those of a store")
        found = self._get_meta("experiment")
        if found != experiment:
            raise StoreError(
                f"{self.path} belongs to the experiment {found!r}, not {experiment!r}: choose another folder"
            )
        records = [_record(row) for row in self._db.execute("SELECT * FROM record")]
        if not records:
            self._put_meta("settings", settings)
            return
        there, asked = self._get_meta("settings"), json.loads(json.dumps(settings))
        if not isinstance(there, dict):
            raise sqlite3.DatabaseError("its settings cannot be read")
        differing = sorted(key for key in there.keys() | asked.keys() if there.get(key) != asked.get(key))
        if differing:
            listed = ", ".join(f"{key} {there.get(key)} there and {asked.get(key)} asked" for key in differing)
            raise StoreError(f"{self.path} holds a run with other settings ({listed}): choose another folder")
        if not resume:
            raise StoreError(f"{self.path} already holds results: go on with --resume, or choose another folder")

    def _put_meta(self, key: str, value: Any) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value, sort_keys=True)))

    def _get_meta(self, key: str) -> Any:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        try:
            return json.loads(row[0])
        except (TypeError, ValueError):
            raise sqlite3.DatabaseError(f"its {key} cannot be read") from None


def merge(target: Path, sources: Sequence[Path]) -> int:
    """Join stores of one experiment and one set of settings in a new one, and return the number of its records.

    Of a record that several hold the one that is further is taken; finished ones must agree but for the seconds.
    ``target`` appears when it is complete.

    Raises:
        StoreError: a target that is there; sources that are no such stores, are in use, have other settings, or
            disagree.
    """
    if target.exists():
        raise StoreError(f"{target} is there already: choose another folder")
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)
    try:
        experiment, settings = _of_what(sources[0])
        with Store(part, experiment, settings) as joined:
            for path in sources:
                if not path.exists():  # which would be made
                    raise StoreError(f"{path} is not there")
                with Store(path, experiment, settings, resume=True) as store:
                    for name in store.names():
                        _join(joined, name, store.get(name), path)
            count = len(joined.names())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return count


def _join(joined: Store, name: str, record: Record | None, path: Path) -> None:
    there = joined.get(name)
    if record is not None and there is not None and there.finished and record.finished:
        same = there.step == record.step and there.state.keys() == record.state.keys()
        if not (same and all(_same(there.state[key], value) for key, value in record.state.items())):
            raise StoreError(f"{path} has another result of {name} than the stores before it")
    elif record is not None and (there is None or (record.finished, record.step) > (there.finished, there.step)):
        joined.save(name, record)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def _of_what(path: Path) -> tuple[str, dict[str, Any]]:
    """Experiment and settings of a store."""
    _check_header(path)
    try:
        db = sqlite3.connect(f"file:{urllib.parse.quote(str(path))}?mode=ro", uri=True, timeout=0)
        with contextlib.closing(db):
            found = {key: json.loads(value) for key, value in db.execute("SELECT key, value FROM meta")}
            return found["experiment"], found["settings"]
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise StoreError(f"{path} is in use by another process: wait for it") from None
        raise StoreError(f"{path} cannot be used: {error}") from None
    except (sqlite3.DatabaseError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} is damaged, or holds nothing yet ({error}): leave it out") from None


def _record(row: tuple[str, int, int, float, bytes, str]) -> Record:
    name, finished, step, seconds, blob, checksum = row
    if _checksum(name, finished, step, seconds, blob) != checksum:
        raise sqlite3.DatabaseError(f"the record of {name} has a wrong checksum")
    return Record(bool(finished), step, seconds, torch.load(io.BytesIO(blob), weights_only=True))


def _line(error: Exception) -> str:
    """What an error says, in a line; SQLite may quote much of a damaged file."""
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else f"{text[:120]}..."


def _checksum(name: str, finished: int, step: int, seconds: float, blob: bytes) -> str:
    """Of a row as it is stored, whatever damage has made of its types."""
    text = repr((name, finished, step, seconds)).encode(errors="surrogatepass")
    return hashlib.sha256(text + (blob if isinstance(blob, bytes) else b"")).hexdigest()


def _check_header(path: Path) -> None:
    """Refuse a file that is there and is not a store, before SQLite may touch it."""
    try:
        with path.open("rb") as file:
            header = file.read(100)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from None
    if not header:
        return
    if header[:16] != b"SQLite format 3\0" or header[68:72] != _APPLICATION_ID.to_bytes(4, "big"):
        raise StoreError(f"{path} is not a mixfeat store: move it away, or choose another folder")
    version = int.from_bytes(header[60:64], "big")
    if version != _VERSION:
        raise StoreError(f"{path} is of store version {version}, this mixfeat needs {_VERSION}: choose another folder")
