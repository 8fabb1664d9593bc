"""Imports run one way, and no name hides a module: read off the sources, lazy imports included."""

import ast
import functools
from collections import defaultdict

import pytest
from conftest import ROOT

#: Parts of the package from top to bottom. A module imports from its own part and from parts on lower lines.
LAYERS = (
    ("cli",),
    ("benchmarks", "experiments", "validate"),
    ("_environment", "operators", "plotting", "report"),
    ("features", "nn"),
    ("data", "functional"),
    ("ops",),
    ("backends",),
    ("kernels", "reference"),
    ("activations",),
    ("_checks", "_files"),
    ("kernels.polynomial",),
)
#: The package itself imports the public names, its entry point the commands.
FACADES = ("mixfeat", "mixfeat.__main__")


@functools.cache
def modules():
    """Map the installed name of every module to its path."""
    paths = {path: path.relative_to(ROOT) for path in (ROOT / "mixfeat").rglob("*.py")}
    for folder in ("benchmarks", "kernels"):  # reached through these folders alone, whether or not a link is followed
        paths = {path: name for path, name in paths.items() if name.parts[1] != folder}
        paths |= {path: "mixfeat" / path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py")}
    return {".".join(name.with_suffix("").parts).removesuffix(".__init__"): path for path, name in paths.items()}


def bindings(node, package):
    """Map each name that an import statement binds to the full name of what it stands for."""
    if isinstance(node, ast.Import):
        return {alias.asname or alias.name: alias.name for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return {}
    parents = package.split(".")
    above = parents[: len(parents) + 1 - node.level] if node.level else []
    source = ".".join([*above, *([node.module] if node.module else [])])
    return {alias.asname or alias.name: f"{source}.{alias.name}" for alias in node.names}


@functools.cache
def imports():
    """Map every import of a module of the package, (importer, imported), to where it stands.

    Python also runs the packages that a module is in. That is left out: every package would import itself.
    """
    found = {}
    for module, path in modules().items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text())):
            for name in bindings(node, package).values():
                if name not in modules():
                    name = name.rpartition(".")[0]  # a function or class; its module is imported
                if name in modules() and name != module:
                    found[module, name] = f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"
    return found


def part(module):
    name = module.removeprefix("mixfeat.")
    return name if name == "kernels.polynomial" else name.split(".")[0]


def layer(module):
    """Number a module's line of LAYERS."""
    numbers = [number for number, parts in enumerate(LAYERS) if part(module) in parts]
    assert numbers, f"{module} belongs to no layer: add it to LAYERS in tests/test_structure.py"
    return numbers[0]


def assert_none(offending):
    lines = [imports()[edge] for edge in sorted(offending)]
    assert not lines, "\n" + "\n".join(lines)


def on_cycles(edges):
    """List the edges that lie on a cycle: those whose source can be reached from their target."""
    targets = defaultdict(set)
    for source, target in edges:
        targets[source].add(target)

    def reachable(start):
        found, pending = {start}, [start]
        while pending:
            new = targets[pending.pop()] - found
            found |= new
            pending += new
        return found

    return [(source, target) for source, target in edges if source in reachable(target)]


def test_sources_are_read():
    """Relative, absolute and lazy imports are found, under installed names."""
    assert {
        ("mixfeat.benchmarks.harness", "mixfeat.benchmarks.timing"),
        ("mixfeat.benchmarks.limits", "mixfeat.benchmarks.activation_rate"),
        ("mixfeat.benchmarks.limits", "mixfeat.kernels.cpu.build"),
        ("mixfeat.kernels.triton.activation", "mixfeat.kernels.polynomial"),
        ("mixfeat.functional", "mixfeat.ops.cross_entropy"),
        ("mixfeat.backends", "mixfeat.kernels.cpu"),
    } <= imports().keys()
    assert on_cycles([("a", "b"), ("b", "c"), ("c", "b"), ("c", "d")]) == [("b", "c"), ("c", "b")]


def test_no_import_is_circular():
    assert_none(on_cycles(imports()))


def test_imports_run_downwards():
    """cli -> experiments -> nn -> functional -> ops -> (kernels | reference) -> kernels.polynomial.

    ``import mixfeat`` stands for its public names, the highest of which are in ``nn``.
    """
    public = layer("mixfeat.nn")
    inner = [(source, target) for source, target in imports() if source not in FACADES]
    assert_none(
        (source, target)
        for source, target in inner
        if part(source) != part(target)
        and layer(source) >= (public if target == "mixfeat" else layer(target))
    )  # fmt: skip


def test_public_names_need_no_command():
    """``import mixfeat`` loads neither commands nor experiments nor benchmarks."""
    public = layer("mixfeat.nn")
    assert_none((source, target) for source, target in imports() if source == "mixfeat" and layer(target) < public)


def test_kernels_import_nothing_of_mixfeat():
    kernels = [(source, target) for source, target in imports() if source.startswith("mixfeat.kernels")]
    assert_none((source, target) for source, target in kernels if not target.startswith("mixfeat.kernels"))


@pytest.mark.parametrize("package", [name for name, path in modules().items() if path.name == "__init__.py"])
def test_no_name_hides_a_module(package):
    """``import package.submodule`` gives the module: the package binds that name to nothing else."""
    hidden = []
    for node in ast.parse(modules()[package].read_text()).body:
        names = [name for name, source in bindings(node, package).items() if source != f"{package}.{name}"]
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        place = f"{modules()[package].relative_to(ROOT)}:{node.lineno}"
        hidden += [f"{place} hides {package}.{name}" for name in names if f"{package}.{name}" in modules()]
    assert not hidden, "\n" + "\n".join(hidden)
