"""Shared by all commands: the parser, refusals, files that are written whole, and tables."""

import argparse
import ast
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mixfeat import activations
from mixfeat._files import replacing
from mixfeat.activations import Activation

__all__ = [
    "Commands", "FailedError", "Parser", "RefusedError", "activation", "add_command", "aligned", "problem_shape",
    "require_positive", "writable_file", "writable_folder", "write_json",
]  # fmt: skip

Commands = Any  # the result of ArgumentParser.add_subparsers, whose class argparse does not export


class RefusedError(Exception):
    """A request cannot be served; the message is the one line that the user sees."""


class FailedError(Exception):
    """A run failed; the message is the line that the user sees, if they have not seen one."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2; argparse would print the whole usage first."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], help: str, description: str | None = None,
    *, patient: bool = False,
) -> argparse.ArgumentParser:  # fmt: skip
    """Add a command with the option that all have, and return its parser.

    OpenMP threads of a ``patient`` command sleep while they wait.
    """
    parser: argparse.ArgumentParser = commands.add_parser(name, allow_abbrev=False, help=help, description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    parser.set_defaults(run=run, prog=parser.prog, patient=patient)
    return parser


def problem_shape(text: str) -> tuple[int, int, int, int, int]:
    """Parse ``N,P,D,C,M``: samples, patches, patch dimension, classes, filters per class."""
    try:
        n, p, d, c, m = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"needs five integers N,P,D,C,M, got {text!r}") from None
    if min(n, p, d, c, m) < 1:
        raise argparse.ArgumentTypeError(f"needs five positive integers N,P,D,C,M, got {text!r}")
    return n, p, d, c, m


def activation(text: str) -> Activation:
    """Parse an activation as Python writes it: ``PolyReLU(8, 0.1)``, ``ReLU()`` or just ``ReLU``."""
    kinds = {name: getattr(activations, name) for name in activations.__all__ if name != "Activation"}
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        kind = kinds[call.func.id] if isinstance(call.func, ast.Name) else None
        values = [ast.literal_eval(value) for value in call.args]
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, KeyError, MemoryError, RecursionError):
        kind = None
    if kind is None:
        raise argparse.ArgumentTypeError(f"needs one of {', '.join(kinds)}, as in 'PolyReLU(8, 0.1)', got {text!r}")
    try:
        found: Activation = kind(*values, **options)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    return found


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Refuse numbers of options, if given, that are not finite and positive."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise RefusedError(f"--{name} must be finite and positive, got {value}")


def writable_folder(folder: Path) -> Path:
    """Return the folder, created if missing. Only an attempt shows whether it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise RefusedError(f"folder {folder} cannot be written: {error.strerror}") from None


def writable_file(path: Path | None, option: str = "--json") -> Path | None:
    """Return the file of an option, if given; whether it can be written is found out before the work, not after."""
    if path is not None:
        if path.is_dir():
            raise RefusedError(f"{option} {path} cannot be written: it is a folder")
        writable_folder(path.parent)
    return path


def write_json(path: Path | None, document: dict[str, Any]) -> None:
    """Write the document to the path, if any, as a whole or not at all."""
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
