"""Builds the CPU library where PyTorch is at hand; elsewhere makes a pure wheel, and the first use builds the library.

A wheel with the library serves every Python, and its name says so: py3-none-PLATFORM. A library that cannot be built
ends the installation: pip would keep a wheel without it, and install that one for ever.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def load_build():
    spec = importlib.util.spec_from_file_location("mixfeat_cpu_build", ROOT / "kernels/cpu/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torch_directory() -> Path | None:
    """Return where PyTorch is, also where pip's build isolation hides it: a build needs its files, not its code."""
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        return Path(spec.origin).parent
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for torch in importlib.metadata.distributions(name="torch", path=folders):
        major, minor = map(int, torch.version.split(".")[:2])
        if (major, minor) >= (2, 10):  # pip may be about to replace an older one
            return Path(torch.locate_file("torch"))
    return None


class BuildLibrary(build_ext):
    """A plain shared library, without Python in it, at the place of an extension module."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")[:-1]) / load_build().library_name())

    def build_extension(self, ext):
        builder = load_build()
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob("libmixfeat_cpu*.so"):
            old.unlink()
        with tempfile.TemporaryDirectory() as scratch:
            try:
                shutil.copyfile(builder.build(Path(scratch), torch_directory()), target)
            except builder.BuildError as error:
                raise CompileError(
                    f"{error}\nmixfeat: set MIXFEAT_SKIP_CPU_BUILD=1 to install without the CPU library; "
                    "operators on CPU tensors then build it at first use, or run in plain PyTorch"
                ) from error


class Wheel(bdist_wheel):
    """A wheel of any Python 3: the library has no Python in it."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


skip = os.environ.get("MIXFEAT_SKIP_CPU_BUILD", "0") not in ("", "0")
ahead = os.name == "posix" and not skip and torch_directory() is not None
setup(
    ext_modules=[Extension("mixfeat.kernels.cpu.library", sources=[])] if ahead else [],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
