from __future__ import annotations

import pytest

from cpu_kernels import isa


def test_the_default_is_the_best_that_this_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(isa.ISA_VARIABLE, raising=False)
    assert isa.supports(isa.choose_isa())
    monkeypatch.setattr(isa, "cpu_features", frozenset[str])
    assert isa.choose_isa() == "generic"
    monkeypatch.setattr(isa, "cpu_features", lambda: frozenset({"avx512f", "avx512bw", "avx512bf16"}))
    assert isa.choose_isa() == "avx512_bf16"


def test_the_environment_and_the_argument_force_an_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "cpu_features", lambda: frozenset({"avx512f", "avx512bw", "avx512bf16"}))
    monkeypatch.setenv(isa.ISA_VARIABLE, "generic")
    assert isa.choose_isa() == "generic"
    assert isa.choose_isa("avx512_bf16") == "avx512_bf16"


def test_unknown_and_missing_isas_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "cpu_features", lambda: frozenset({"avx512f"}))
    monkeypatch.setenv(isa.ISA_VARIABLE, "sse9")
    with pytest.raises(ValueError, match="OFFLOAD_CPU_ISA='sse9' is unknown; choose one of generic, neon_dot, avx2, "):
        isa.choose_isa()
    monkeypatch.setenv(isa.ISA_VARIABLE, "avx512_bf16")
    with pytest.raises(ValueError, match="lacks avx512bf16, avx512bw"):
        isa.choose_isa()


def test_only_bf16_has_instructions_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(isa.ISA_VARIABLE, raising=False)
    monkeypatch.setattr(isa, "cpu_features", lambda: frozenset({"avx512f", "avx512bw", "avx512bf16", "f16c"}))
    assert [isa.isa_of_format(name) for name in ("bf16", "fp16", "fp32")] == ["avx512_bf16", "generic", "generic"]


def test_fp16_is_refused_where_it_cannot_be_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "cpu_features", frozenset[str])
    monkeypatch.setattr(isa.platform, "machine", lambda: "x86_64")
    with pytest.raises(ValueError, match="lacks f16c"):
        isa.isa_of_format("fp16")


X86 = {"avx2": {"avx2"}, "avx512_vnni": {"avx2", "avx512f", "avx512bw", "avx512vl", "avx512vnni"}}
X86["avx512_bf16"] = X86["avx512_vnni"] | {"avx512bf16"}


@pytest.mark.parametrize(
    ("features", "forced", "bf16", "int4"),
    [
        (set(), None, "generic", "generic"),
        ({"neon", "dotprod"}, None, "generic", "neon_dot"),
        ({"avx2"}, None, "generic", "avx2"),
        ({"avx2", "avxvnni"}, None, "generic", "avx2_vnni"),
        ({"avx512f", "avx512bw", "avx512vnni", "avx2", "avx512vl"}, None, "generic", "avx512_vnni"),
        (X86["avx512_bf16"], None, "avx512_bf16", "avx512_vnni"),
        (X86["avx512_bf16"], "avx512_vnni", "generic", "avx512_vnni"),
        (X86["avx512_bf16"], "avx2_vnni", "generic", "avx2_vnni"),
        (X86["avx512_bf16"], "avx2", "generic", "avx2"),
        (X86["avx512_bf16"], "generic", "generic", "generic"),
        ({"avx512f", "avx512bw", "avx512bf16"}, None, "avx512_bf16", "generic"),
    ],
)
def test_each_operation_takes_the_best_up_to_the_level(
    monkeypatch: pytest.MonkeyPatch, features: set[str], forced: str | None, bf16: str, int4: str
) -> None:
    monkeypatch.setattr(isa, "cpu_features", lambda: frozenset(features))
    monkeypatch.delenv(isa.ISA_VARIABLE, raising=False)
    if forced:
        monkeypatch.setenv(isa.ISA_VARIABLE, forced)
    assert isa.isa_of_format("bf16") == bf16
    assert isa.isa_of_format("int4") == int4
    assert isa.isa_of_format("fp8_e4m3") == "generic"


@pytest.mark.parametrize(
    ("more", "forced", "registers", "tables"),
    [
        ({"avx512vl", "avx512vbmi"}, None, 32, True),
        ({"avx512vl"}, None, 32, False),
        ({"avx512vbmi"}, None, 16, True),
        ({"avx512vl", "avx512vbmi"}, "avx2_vnni", 16, False),
    ],
)
def test_kv_blocks_take_what_the_level_allows(
    monkeypatch: pytest.MonkeyPatch, more: set[str], forced: str | None, registers: int, tables: bool
) -> None:
    features = frozenset({"avx2", "avxvnni", "avx512f", "avx512bw", "avx512vnni"} | more)
    monkeypatch.setattr(isa, "cpu_features", lambda: features)
    monkeypatch.setenv(isa.ISA_VARIABLE, forced or "")
    assert (isa.vector_registers(), isa.looks_up_bytes()) == (registers, tables)
