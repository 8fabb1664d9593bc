"""``mixfeat info``: facts for a bug report."""

import argparse
from typing import Any

import torch

from mixfeat._environment import environment
from mixfeat.cli.common import Commands, add_command, problem_shape, writable_file, write_json
from mixfeat.kernels import cuda
from mixfeat.kernels.cuda import gradient_descent

__all__ = ["add_commands", "one_launch"]

# lam of the nodes; lam and 1 - lam mix the same pairs, so the larger one stands for both
_OBJECTIVES = {"ERM": None, "Midpoint": (0.5,), "Uniform, 8 nodes": (9 / 16, 11 / 16, 13 / 16, 15 / 16)}


def add_commands(commands: Commands) -> None:
    """Add ``info``."""
    parser = add_command(commands, "info", _info, "print versions, devices, backends and compiler, for a bug report")
    parser.add_argument(
        "--shape", type=problem_shape, metavar="N,P,D,C,M",
        help="also print which GPUs run gradient_descent of this shape in one launch, and why others do not",
    )  # fmt: skip


def one_launch(shape: tuple[int, int, int, int, int]) -> dict[str, str]:
    """Return for each objective and kind of GPU whether gradient_descent of this shape is one launch, or why not.

    The kinds are those of the GPUs here; without one, all for which the kernel is written.
    """
    here = [cuda.capability(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    answers = {}
    for objective, nodes in _OBJECTIVES.items():
        problem = gradient_descent.Problem(*shape, nodes, momentum=False)
        for capability in sorted({*here}) or cuda.SHARED_KIB:
            reason = gradient_descent.fits(problem, capability) or cuda.unavailable()
            answer = f"a loop over the operators, in a CUDA graph: {reason}" if reason else "one launch"
            answers[f"{objective}, sm_{capability}"] = answer
    return answers


def _info(args: argparse.Namespace) -> int:
    json_file = writable_file(args.json)
    facts = environment()
    if args.shape:
        facts["gradient_descent"] = one_launch(args.shape)
    for name, value in _lines(facts):
        print(f"{name:<28}  {value}")
    write_json(json_file, facts)
    return 0


def _lines(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    lines: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [(f"{name}: {key}", item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            lines += [(name, item) for item in value or ["none"]]
        else:
            lines.append((name, "none" if value is None else value))
    return lines
