"""Two processes go through one list from its ends; what one compiled the other loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cpu_kernels.compiling import together
from cpu_kernels.compiling.kept import KeptFunctions
from cpu_kernels.routing_kernel import group_pairs

_MODULE = """
import os
from pathlib import Path
from cpu_kernels.compiling.compiler import KernelCompiler

compiler = KernelCompiler("cpu_kernels.compiling")

def make(number):
    compiler.address(lambda: number, __import__("numba").int64)
    with open("made", "a") as file:
        file.write(f"{number} {os.getpid()}\\n")

def wait_for_the_other(number):
    while not Path("made").exists() or f"{number} " not in Path("made").read_text():
        pass

def fail():
    if os.getpid() != int(os.environ["FIRST_PROCESS"]):
        Path("failed").touch()
        raise ValueError("no kernel")
    while not Path("failed").exists():
        pass
"""

_RUN = """
import os, sys
os.environ["FIRST_PROCESS"] = str(os.getpid())
import kernels
from cpu_kernels.compiling.kept import KeptFunctions
from cpu_kernels.compiling.together import compile_together

compile_together([
    (kernels.make, (0,)), (kernels.wait_for_the_other, (2,)), (kernels.make, (1,)), (kernels.make, (2,)),
])
print(KeptFunctions.compiled, os.getpid())
"""

_RUN_AND_FAIL = """
import os, warnings
os.environ["FIRST_PROCESS"] = str(os.getpid())
import kernels
from cpu_kernels.compiling.together import compile_together

with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    compile_together([(kernels.make, (0,)), (kernels.fail, ())])
print(told[0].message)
"""


def run(folder: Path, code: str) -> str:
    (folder / "kernels.py").write_text(_MODULE)
    paths = f"import sys; sys.path[:0] = {[str(folder), str(Path(together.__file__).parents[2])]}\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", paths + code], cwd=folder, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_another_process_compiles_from_the_end(tmp_path: Path) -> None:
    # The first waits until the other has made the last, which it then finds.
    compiled, process = map(int, run(tmp_path, _RUN).split())
    made = [line.split() for line in (tmp_path / "made").read_text().splitlines()]
    assert {number for number, maker in made if int(maker) == process} == {"0", "1", "2"}
    assert "2" in {number for number, maker in made if int(maker) != process}
    assert compiled <= 2


def test_nothing_is_started_where_all_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(together, "_OtherProcess", None)
    together.compile_together([(called.append, (1,)), (called.append, (2,))])
    assert called == [1, 2]


def test_one_process_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiles() -> None:
        KeptFunctions.compiled += 1

    monkeypatch.setattr(KeptFunctions, "compiled", 0)
    monkeypatch.setattr(together, "_OtherProcess", None)
    together.compile_together([(compiles, ()), (compiles, ())], processes=1)
    assert KeptFunctions.compiled == 2


def test_a_process_that_fails_is_told_of(tmp_path: Path) -> None:
    assert "a second process that compiles kernels ended with code 1" in run(tmp_path, _RUN_AND_FAIL)


def test_where_no_process_can_be_started_one_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiles() -> None:
        KeptFunctions.compiled += 1

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(KeptFunctions, "compiled", 0)
    monkeypatch.setattr(together.subprocess, "Popen", refuse)
    with pytest.warns(RuntimeWarning, match="could not be started .*no more processes"):
        together.compile_together([(compiles, ()), (compiles, ())])
    assert KeptFunctions.compiled == 2


def test_an_entry_is_compiled_by_its_name() -> None:
    together.prepare_named("cpu_kernels.routing_kernel", "group_pairs")
    assert group_pairs.overloads
