"""The command line: ``mixfeat`` and ``python -m mixfeat``.

A command is a function from parsed arguments to an exit status: 0; 1 if a run failed; 2 if the request cannot be
served, with one line on stderr; 130 after Ctrl-C. Each module of this package adds a group of commands to the parser.
"""

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Sequence

import mixfeat
from mixfeat._environment import environment
from mixfeat.cli import bench, check, info, reproduce
from mixfeat.cli.common import FailedError, Parser, RefusedError

__all__ = ["environment", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = _parser().parse_args(argv)
    if argv is None and args.patient:
        _wait_without_spinning()
    argv = sys.argv[1:] if argv is None else list(argv)
    os.environ["MPLBACKEND"] = "agg"  # figures go to files; a notebook hands its own backend to every process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is shown as ?
            stream.reconfigure(errors="replace")
    try:
        status: int = args.run(args)
        sys.stdout.flush()  # here, where it may fail
        return status
    except RefusedError as refused:
        print(f"{args.prog}: error: {refused}", file=sys.stderr)
        return 2
    except FailedError as failed:
        if str(failed):
            print(f"{args.prog}: error: {failed}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = shlex.join(["mixfeat", *argv] + ["--resume"] * (getattr(args, "resume", None) is False))
        print(f"{args.prog}: stopped; continue with: {again}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        _silence()
        return 1
    except OSError as error:
        if error.filename is None:
            _silence()
        print(f"{args.prog}: error: {error.filename or 'output'} cannot be written: {error.strerror}", file=sys.stderr)
        return 1


def _silence() -> None:
    """Discard pending output; Python would fail on it again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _wait_without_spinning() -> None:
    """Start this program again with OpenMP threads that sleep while they wait, unless the user has chosen otherwise.

    Threads that spin slow small problems down tenfold on a busy machine: they take the core on which the thread that
    they wait for would run. OpenMP reads the setting when PyTorch is imported, so it is too late for this process.
    """
    if os.name == "posix" and sys.executable and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _parser() -> Parser:
    parser = Parser(prog="mixfeat", description=mixfeat.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mixfeat {mixfeat.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for group in (info, reproduce, check, bench):
        group.add_commands(commands)
    return parser
