"""``mixfeat info``: facts for a bug report."""

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import mixfeat
from mixfeat.cli.common import Commands, add_command, writable_file, write_json

__all__ = ["add_commands", "environment"]


def add_commands(commands: Commands) -> None:
    """Add ``info``."""
    add_command(commands, "info", _info, "versions, devices, backends, compiler: for a bug report")


def environment() -> dict[str, Any]:
    """Return what results depend on here: versions, processor, devices, backends and compiler."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = ("triton", "numpy", "matplotlib", "tqdm", "joblib", "distributed", "scikit-learn", "torchvision")
    gpus = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory, capability = f"{properties.total_memory / 2**30:.0f} GiB", f"{properties.major}.{properties.minor}"
        gpus.append(f"{properties.name}, {memory}, {properties.multi_processor_count} SMs, capability {capability}")
    variables = {
        name: value for name, value in sorted(os.environ.items()) if name.startswith(("MIXFEAT_", "TRITON_", "OMP_"))
    }
    return {
        "mixfeat": mixfeat.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda or torch.version.hip,
        **{package: version(package) for package in packages},
        "platform": platform.platform(),
        "CPU": _cpu_model(),
        "CPU instruction set (torch)": torch.backends.cpu.get_cpu_capability(),
        "CPU cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "GPUs": gpus,
        "environment variables": variables,
        **mixfeat.backends.describe(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _info(args: argparse.Namespace) -> int:
    json_file = writable_file(args.json)
    facts = environment()
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
