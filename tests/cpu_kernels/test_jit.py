"""What is compiled is kept on disk under a key that has all sources in it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from cpu_kernels import jit, sources
from cpu_kernels.weighted_sum_kernel import run_add_weighted


def test_the_stamp_is_of_all_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    stamp = sources.source_stamp()
    assert len(stamp) == 16
    assert sources.source_stamp.__wrapped__() == stamp
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "launch.py"))
    assert sources.source_stamp.__wrapped__() != stamp


def test_a_kernel_is_not_taken_from_other_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, codegen = run_add_weighted._cache, SimpleNamespace(magic_tuple=lambda: ("cpu",))
    signature = run_add_weighted.signatures[0]
    key = cache._index_key(signature, codegen)
    assert cache._index_key(signature, codegen) == key
    monkeypatch.setattr(jit, "source_stamp", lambda: "other")
    assert cache._index_key(signature, codegen) != key
