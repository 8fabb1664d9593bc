"""``mixfeat check`` and ``mixfeat compile-report``: are the kernels right, and what do compilers make of them?"""

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import torch

import mixfeat
from mixfeat import backends, report, validate
from mixfeat._environment import environment
from mixfeat._files import replacing
from mixfeat.cli.common import (
    Commands,
    RefusedError,
    activation,
    add_command,
    problem_shape,
    require_positive,
    writable_file,
    write_json,
)
from mixfeat.kernels import cuda

__all__ = ["add_commands"]


def add_commands(commands: Commands) -> None:
    """Add ``check`` and ``compile-report``."""
    checking = add_command(
        commands,
        "check",
        _check,
        patient=True,
        help="verify the kernels on this machine",
        description="Compare every operator, on every backend that runs here, with the reference in float64: values "
        "and gradients for random inputs, contiguous and strided, and the same bits from a second call. The exit "
        "status is 1 if anything fails.",
    )
    for name, choices in (
        ("operator", validate.OPERATORS), ("backend", mixfeat.backends.NAMES), ("dtype", validate.DTYPES)
    ):  # fmt: skip
        text = f"one or more of {', '.join(choices)} (default: all)"
        checking.add_argument(f"--{name}", nargs="+", choices=list(choices), metavar=name.upper(), help=text)
    checking.add_argument("--seed", type=int, default=0, metavar="INT", help="seed of the inputs (default: 0)")
    checking.add_argument("--quick", action="store_true", help="check small shapes only")
    checking.add_argument(
        "--shape", type=problem_shape, metavar="N,P,D,C,M",
        help="a problem that replaces all shapes: samples, patches, patch dimension, classes, filters per class",
    )  # fmt: skip
    checking.add_argument(
        "--activation", type=activation, metavar="ACTIVATION", help="replaces all others, such as 'PolyReLU(8, 0.1)'"
    )
    checking.add_argument(
        "--seconds", type=float, metavar="FLOAT", help="time to repeat with new inputs, shared by all checks"
    )
    checking.add_argument("--junit", type=Path, metavar="FILE", help="also write a report in JUnit's XML")
    reporting = add_command(
        commands,
        "compile-report",
        _compile_report,
        help="compile the GPU kernels and report registers, spills and instructions; needs no GPU",
        description="Compile every Triton configuration that ships, and the CUDA C++ kernel, and print registers, "
        "stack, memory accesses and the instructions of main loops. The exit status is 1 if anything spills.",
    )
    for name, known in (("targets", report.TARGETS), ("kernels", report.KERNELS)):
        text = f"one or more of {', '.join(known)}, separated by commas (default: all)"
        reporting.add_argument(f"--{name}", metavar="LIST", default=",".join(known), help=text)
    reporting.add_argument(
        "--shapes", action="store_true",
        help="list the launches of the benchmarks' named shapes on an H100 and an A100 instead; excludes --targets",
    )  # fmt: skip


def _check(args: argparse.Namespace) -> int:
    wanted = args.backend or []
    interpreted = "triton" in wanted and not torch.cuda.is_available()
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first needed, below
    require_positive(args, "seconds")
    json_file, junit = writable_file(args.json), writable_file(args.junit, "--junit")
    available = mixfeat.backends.available()
    for name in wanted:
        if name not in available:
            raise RefusedError(
                f"--backend {name} is not available here: {mixfeat.backends.describe()['backends'][name]}"
            )
    chosen = [name for name in available if name in wanted or not wanted]
    cells = validate.checks(chosen, _operators(args), args.dtype or validate.DTYPES)
    if not cells:
        raise RefusedError("nothing to check: cuda trains networks in float32, and triton has no float64")
    if interpreted:
        print("No GPU here: triton means Triton's interpreter, on small shapes.\n")
    form = "{:<26}  {:<10}  {:<9}  {:>6}  {:<22}  {:>9}  {:>9}  {:>9}  {}"
    print(form.format("operator", "backend", "dtype", "shapes", "worst of", "error", "PyTorch's", "budget", ""))
    outcomes = []
    for cell in cells:
        outcome = validate.check(
            *cell, seed=args.seed, quick=args.quick, shape=args.shape, activation=args.activation,
            seconds=(args.seconds or 0) / len(cells),
        )  # fmt: skip
        outcomes.append(outcome)
        numbers = ["", "", "", ""]
        if outcome.worst:
            name, worst = max(outcome.worst.items(), key=lambda item: item[1]["of budget"])
            numbers = [name, *(f"{worst[key]:.1e}" for key in ("error", "plain", "budget"))]
        print(form.format(*cell, outcome.cases, *numbers, "PASS" if outcome.passed else "FAIL"), flush=True)
        for failure in outcome.failures:
            print(f"    {failure}")
    failed = sum(not outcome.passed for outcome in outcomes)
    print(f"\n{failed} of {len(outcomes)} checks FAILED" if failed else f"\nall {len(outcomes)} checks passed")
    rows = [asdict(outcome) | {"passed": outcome.passed} for outcome in outcomes]
    asked = {"seed": args.seed, "quick": args.quick, "shape": args.shape}
    asked["activation"] = str(args.activation) if args.activation else None
    write_json(json_file, {**asked, "environment": environment(), "checks": rows})
    if junit:
        with replacing(junit) as temporary:
            _junit(outcomes).write(temporary, "utf-8", xml_declaration=True)
    return 1 if failed else 0


def _operators(args: argparse.Namespace) -> list[str]:
    """List the requested operators; with a shape, those that it fits."""
    names = args.operator or list(validate.OPERATORS)
    if args.shape:
        without = [name for name in names if not validate.OPERATORS[name].problem(args.shape)]
        if args.operator and without:
            raise RefusedError(f"--shape must be without --operator {', '.join(without)}, which takes images")
        names = [name for name in names if name not in without]
    if args.activation and not any(validate.OPERATORS[name].activates for name in names):
        raise RefusedError(f"--activation must be with an operator that has one, got {', '.join(names)}")
    return names


def _junit(outcomes: list[validate.Outcome]) -> ElementTree.ElementTree:
    """Write the outcomes as a report of tests, which continuous integration shows."""
    suite = ElementTree.Element(
        "testsuite", name="mixfeat check", tests=str(len(outcomes)), errors="0",
        failures=str(sum(not outcome.passed for outcome in outcomes)),
        time=f"{sum(outcome.seconds for outcome in outcomes):.3f}",
    )  # fmt: skip
    for outcome in outcomes:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"mixfeat.{outcome.operator}", name=f"{outcome.backend}, {outcome.dtype}",
            time=f"{outcome.seconds:.3f}",
        )  # fmt: skip
        if outcome.failures:
            failure = ElementTree.SubElement(case, "failure", message=outcome.failures[0])
            failure.text = "\n".join(outcome.failures)
    return ElementTree.ElementTree(suite)


def _compile_report(args: argparse.Namespace) -> int:
    lists = {}
    for name, known in (("targets", report.TARGETS), ("kernels", report.KERNELS)):
        lists[name] = [word for word in getattr(args, name).split(",") if word]
        unknown = [word for word in lists[name] if word not in known]
        if unknown or not lists[name]:
            raise RefusedError(f"--{name} must be of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    json_file = writable_file(args.json)
    try:
        import triton
    except ModuleNotFoundError as error:
        raise RefusedError(f"{error.name} is missing: pip install triton") from None
    if args.shapes:
        if lists["targets"] != list(report.TARGETS):
            raise RefusedError(f"--shapes must be without --targets, got {args.targets}")
        return _report_shapes(lists["kernels"], json_file)
    reason = cuda.unavailable()
    if reason and "gradient_descent" in lists["kernels"]:
        if lists["kernels"] == ["gradient_descent"]:
            raise RefusedError(f"gradient_descent cannot be compiled here: {reason}")
        print(f"gradient_descent is left out: {reason}\n")
    form = "{:<7}  {:>4}  {:>5}  {:>6}  {:>6}  {:>7}  {:>8}  {:>9}  {:>6}  {}"
    print(
        form.format("target", "regs", "stack", "shared", "LDL+STL", "matrix", "16 bytes", "occupancy", "/eval", "case")
    )
    rows = []
    for case, compiled in report.compile_report(lists["targets"], lists["kernels"]):
        row = compiled.row()
        rows.append({"case": str(case), **row})
        occupancy, per_evaluation = row["occupancy"], row["instructions_per_evaluation"]
        print(form.format(
            row["target"], row["registers"], row["stack_bytes"], row["shared_bytes"],
            row["local_loads"] + row["local_stores"], sum(row["matrix_instructions"].values()),
            sum(row["vector_accesses"].values()), "" if occupancy is None else f"{occupancy:.0%}",
            "" if per_evaluation is None else f"{per_evaluation:.2f}", case,
        ), flush=True)  # fmt: skip
    spilling = [row for row in rows if row["stack_bytes"] or row["local_loads"] or row["local_stores"]]
    nvrtc = None if reason else ".".join(map(str, cuda.nvrtc_version()))
    compilers = f"triton {triton.__version__}" + (f" and NVRTC {nvrtc}" if nvrtc else "")
    print(f"\n{len(rows)} kernels compiled by {compilers}, {len(spilling)} of which spill")
    write_json(json_file, {"triton": triton.__version__, "NVRTC": nvrtc, "kernels": rows})
    return 1 if spilling else 0


def _report_shapes(kernels: list[str], json_file: Path | None) -> int:
    from mixfeat.benchmarks import launches

    form = "{:>8}  {:>13}  {:>13}  {:>8}  {:>8}  {:>12}  {:<10}  {}"
    gpus = "/".join(launches.MULTIPROCESSORS)
    print(f"programs and warps per scheduler on {gpus}; bytes and instructions over the least")
    print(form.format("launches", "programs", "warps", "MB", "of least", "instructions", "underfills", "case"))
    rows = []
    for call in launches.calls():
        if call.kernel not in kernels:
            continue
        row = launches.row(call)
        counted = None if backends.interpreted() else launches.instructions(call)
        row["instructions"], row["least_instructions"] = counted or (None, None)
        rows.append(row)
        print(form.format(
            row["launches"], "/".join(map(str, row["programs"].values())),
            "/".join(f"{warps:.1f}" for warps in row["warps_per_scheduler"].values()), f"{row['bytes'] / 1e6:.4g}",
            f"{row['bytes'] / row['least_bytes']:.1f}", f"{counted[0] / counted[1]:.2f}" if counted else "",
            " ".join(dict.fromkeys(name.partition(":")[0] for name in row["underfilled"])),
            " ".join((row["operator"], row["case"], row["direction"], row["dtype"])),
        ), flush=True)  # fmt: skip
    underfilled = [row for row in rows if row["underfilled"]]
    print(f"\n{len(rows)} calls, {len(underfilled)} of which leave multiprocessors empty that have work")
    write_json(json_file, {"calls": rows})
    return 0
