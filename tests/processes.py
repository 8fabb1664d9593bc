"""Processes that run Python code, forked from one that has imported what takes a fresh interpreter seconds.

This module imports nothing of mixfeat: the code of a process is the first to do so.
"""

import os
import sys
import tempfile
import types
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(["torch.distributed", "joblib", "matplotlib.backends.backend_agg", "sklearn.datasets"])


class Ended(NamedTuple):
    """What is left of a process: its exit status, that of a signal below 0, and what it wrote."""

    status: int | None
    stdout: str
    stderr: str


def run(*codes: str, environment: Mapping[str, str] = os.environ, timeout: float = 300) -> list[Ended]:
    """Run each code as the main module of a process in the repository's root, all at once; wait until they end.

    Variables that are read when a process starts or PyTorch is imported, such as LD_LIBRARY_PATH and OMP_NUM_THREADS,
    have the values of these tests.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"{folder}/{i}" for i in range(len(codes))]
        processes = [
            SERVER.Process(target=_interpret, args=(code, output, dict(environment)))
            for code, output in zip(codes, outputs, strict=True)
        ]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        written = [[Path(output + end).read_text(errors="replace") for end in (".out", ".err")] for output in outputs]
        return [Ended(process.exitcode, *texts) for process, texts in zip(processes, written, strict=True)]


def _interpret(code: str, output: str, environment: Mapping[str, str]) -> None:
    for stream, end in enumerate((".out", ".err"), 1):
        os.dup2(os.open(output + end, os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), vars(main))
