"""Builds the CPU library ahead where PyTorch and a compiler are at hand; otherwise the first use builds it.

Under pip's build isolation PyTorch cannot be imported, and must not be pulled in a second time: nothing is built then.
"""

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def load_build():
    spec = importlib.util.spec_from_file_location("mixfeat_cpu_build", ROOT / "kernels/cpu/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildLibrary(build_ext):
    """A plain shared library, without Python in it, at the place of an extension module."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")[:-1]) / load_build().library_name())

    def build_extension(self, ext):
        builder = load_build()
        with tempfile.TemporaryDirectory() as scratch:
            try:
                library = builder.build(Path(scratch), Path(importlib.util.find_spec("torch").origin).parent)
            except builder.BuildError as error:
                print(f"mixfeat: {error}\nmixfeat: installing without; the first use will try again", file=sys.stderr)
                return
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            for old in target.parent.glob("libmixfeat_cpu*.so"):
                old.unlink()
            shutil.copyfile(library, target)

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]


ahead = importlib.util.find_spec("torch") is not None
setup(
    ext_modules=[Extension("mixfeat.kernels.cpu.library", sources=[], optional=True)] if ahead else [],
    cmdclass={"build_ext": BuildLibrary},
)
