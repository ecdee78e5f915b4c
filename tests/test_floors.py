"""Packages import from floors below their own only, and importing the project is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "offload": 4,
    "profiler": 3,
    "placement": 2,
    "prefetch": 1,
    "cpu_kernels": 1,
    "gpu_kernels": 1,
    "formats": 0,
    "cpu_kernels.compiling": 0,
}
"""A package within another has a floor of its own: what compiles kernels serves all who have some."""

OUTSIDE = {"benchmarks", "examples", "tests"}
FRAMEWORKS = {"torch", "transformers", "numba", "safetensors"}
INPUT_AND_OUTPUT = {"os", "io", "pathlib", "shutil", "tempfile", "mmap", "socket", "subprocess", "urllib", "psutil"}
PACKAGES = [package for package in FLOORS if "." not in package]
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported_names(path: Path) -> set[str]:
    """The names that a module imports, anywhere in it, with those of what they are in."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it leads"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported(path: Path) -> set[str]:
    """First parts of them."""
    return {name.split(".")[0] for name in imported_names(path)}


def package_of(name: str) -> str:
    """The package with a floor that a dotted name is in, the innermost; its first part where none has."""
    parts = name.split(".")
    within = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((package for package in within if package in FLOORS), parts[0])


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_package_is_looked_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(PACKAGES)
    assert {package_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in MODULES} == set(FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_lead_down(path: Path) -> None:
    package = package_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for other in map(package_of, imported_names(path)):
        assert other not in OUTSIDE
        if other in FLOORS and other != package:
            assert FLOORS[other] < FLOORS[package], f"{package} must not know {other}"


@pytest.mark.parametrize(
    "path", [path for path in MODULES if name(path).startswith(("placement", "formats"))], ids=name
)
def test_records_and_planning_are_pure(path: Path) -> None:
    assert not imported(path) & (FRAMEWORKS | INPUT_AND_OUTPUT)
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("open", "print")
        )


@pytest.mark.parametrize("path", [path for path in MODULES if name(path).startswith("prefetch")], ids=name)
def test_policies_know_no_tensors(path: Path) -> None:
    # Their kernels are compiled; a model is nothing they know.
    assert not imported(path) & ((FRAMEWORKS - {"numba"}) | INPUT_AND_OUTPUT)


@pytest.mark.parametrize("module", ["offload", "offload.errors", "placement.planner", "profiler.memory"])
def test_importing_is_cheap(module: str) -> None:
    heavy = ("torch", "transformers", "numba", "llvmlite", "safetensors", "triton", "scipy")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]", f"import {module} brings {found.stdout}"
