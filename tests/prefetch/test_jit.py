"""What is compiled is kept on disk under a key that has all sources in it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from prefetch import jit


def test_a_function_is_not_taken_from_other_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = jit.entry("int64(int64)")(lambda x: x + 1)
    assert compiled(2) == 3
    codegen, signature = SimpleNamespace(magic_tuple=lambda: ("cpu",)), compiled.signatures[0]
    key = compiled._cache._index_key(signature, codegen)
    assert key[-1] == jit.source_stamp.__wrapped__()
    assert compiled._cache._index_key(signature, codegen) == key
    monkeypatch.setattr(jit, "source_stamp", lambda: "other")
    assert compiled._cache._index_key(signature, codegen) != key
