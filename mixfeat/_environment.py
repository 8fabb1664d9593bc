"""Facts about the machine and the software, for bug reports and for results."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import mixfeat

__all__ = ["environment"]


def environment() -> dict[str, Any]:
    """Return the facts that results depend on: versions, processor, devices, backends and compiler."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = (
        "triton", "numpy", "matplotlib", "tqdm", "joblib", "distributed", "scikit-learn", "mnist1d", "torchvision",
    )  # fmt: skip
    gpus = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory, capability = f"{properties.total_memory / 2**30:.0f} GiB", f"{properties.major}.{properties.minor}"
        gpus.append(f"{properties.name}, {memory}, {properties.multi_processor_count} SMs, capability {capability}")
    prefixes = ("MIXFEAT_", "TRITON_", "OMP_", "THP_")
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)}
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
