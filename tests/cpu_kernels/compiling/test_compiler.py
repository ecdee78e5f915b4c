"""What is compiled when, into what, and that what is kept is never taken for something else."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cpu_kernels.compiling.compiler import KernelCompiler, direct
from cpu_kernels.compiling.kept import _Files, source_stamp

compiler = KernelCompiler("cpu_kernels.compiling")


@compiler.inner()
def _times_three(x: Any, factor: Any) -> Any:
    return 3 * x * factor


@compiler.entry("int64(int64)")
def _six_times(x: int) -> int:
    result: int = _times_three(x, 1) + _times_three(x, 0) + _times_three(1, x)
    return result


@compiler.entry("float64(float64[::1], float32)")
def _scaled_sum(numbers: Any, scale: float) -> float:
    total = 0.0
    for number in numbers:
        total += number * scale
    return total


@compiler.entry("float64(float64[::1])")
def _third_of_sum(numbers: Any) -> float:
    found: float = _scaled_sum(numbers, 1 / 3)
    return found


def test_an_entry_is_compiled_when_it_is_called_and_not_again() -> None:
    assert not _six_times.overloads
    assert _six_times(2) == 12
    assert len(_six_times.overloads) == 1
    assert direct(_six_times)(3) == 18
    with pytest.raises(TypeError):
        _six_times("no number")
    assert len(_six_times.overloads) == 1


def test_an_inner_function_is_compiled_once_for_all_integers() -> None:
    _six_times(1)
    # None where it came from disk with the entry around it.
    assert len(_times_three.overloads) <= 1


def test_an_entry_that_compiled_code_calls_has_its_declared_types() -> None:
    numbers = np.arange(4.0)
    assert _third_of_sum(numbers) == sum(number * float(np.float32(1 / 3)) for number in numbers)
    assert len(_scaled_sum.overloads) <= 1


def test_python_cannot_call_what_is_compiled_into_others() -> None:
    for _ in range(2):
        with pytest.raises(TypeError, match=r"_times_three is compiled into the functions that call it"):
            _times_three(1, 2)
        _six_times(1)


def test_threads_that_call_first_at_the_same_time_compile_once() -> None:
    entry = compiler.entry("int64(int64)")(lambda x: x + 1)
    start = threading.Barrier(4)

    def call(x: int) -> int:
        start.wait()
        found: int = entry(x)
        return found

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, range(4))) == [1, 2, 3, 4]
    assert len(entry.overloads) == 1


def test_the_stamp_is_of_all_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    stamp = source_stamp("prefetch")
    assert len(stamp) == 16
    assert source_stamp.__wrapped__("prefetch") == stamp
    assert source_stamp("prefetch", "formats") not in (stamp, source_stamp("formats"))
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "links.py"))
    assert source_stamp.__wrapped__("prefetch") != stamp


def test_a_file_is_found_under_its_key_and_sources_alone(tmp_path: Path) -> None:
    old, new = _Files(str(tmp_path), "f", "old"), _Files(str(tmp_path), "f", "new")
    old.save("a", 1)
    assert (old.load("a"), old.load("b"), new.load("a")) == (1, None, None)
    old.save("b", 2)
    assert (old.load("a"), old.load("b")) == (1, 2)
    new.save("a", 3)
    assert (old.load("a"), old.load("b"), new.load("a")) == (None, None, 3)
    assert [path.suffix for path in tmp_path.iterdir()] == [".nbc"]


def test_two_functions_of_one_name_have_files_of_their_own() -> None:
    def make(value: int) -> Any:
        return compiler.entry("int64()")(lambda: value)

    one, two = make(1), make(2)
    assert (one(), two()) == (1, 2)


def test_a_function_that_closes_over_a_compiled_one_is_found_again() -> None:
    def make(value: int) -> Any:
        @compiler.inner()
        def compiled() -> int:
            return value

        return compiler.entry("int64()")(lambda: compiled())

    def key(entry: Any) -> object:
        return entry._cache._index_key("int64()", SimpleNamespace(magic_tuple=lambda: ("cpu",)))

    assert key(make(1)) == key(make(1)) != key(make(2))
    assert (make(1)(), make(2)()) == (1, 2)
