"""The code of every ISA: compiled for CPUs that have it, and run here with its instructions emulated."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir

from cpu_kernels import packed_simd as simd
from cpu_kernels.isa import Isa, supports
from cpu_kernels.packed_simd import PackedCode
from formats.packed import PACKED_FORMATS

llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()

FORMATS = ("int8", "int4", "mxfp4")
I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
EMULATED: tuple[Isa, ...] = ("avx512_vnni", "avx2_vnni", "neon_dot")


def module_of_block(code: PackedCode, tokens: int) -> ir.Module:
    """void block(codes, scales, table of activations, table of sums): one call of add_block from zero."""
    module = ir.Module("block")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 4), "block")
    builder = ir.IRBuilder(function.append_basic_block())
    codes, scales, inputs, outputs = function.args
    rows = [simd.load(builder, inputs, I64, 8 * token) for token in range(tokens)]
    zeros = [ir.Constant(simd.F32_ROWS, None)] * tokens
    for token, total in enumerate(simd.add_block(builder, code, zeros, codes, scales, rows)):
        target = simd.load(builder, outputs, I64, 8 * token)
        builder.store(total, builder.inttoptr(target, simd.F32_ROWS.as_pointer()), align=4)
    builder.ret_void()
    return module


def emulate(module: ir.Module) -> None:
    """Give the intrinsics of other CPUs bodies in plain LLVM code, by what their manuals say."""
    for function in list(module.functions):
        name = function.name
        if not re.search(r"vpdpbusd|sdot|pshuf\.b\.512|tbl1", name):
            continue
        function.name = "emulated_" + name.replace(".", "_")
        builder = ir.IRBuilder(function.append_basic_block())
        if "dot" in name or "vpdpbusd" in name:
            builder.ret(four_products(builder, *function.args, signed="sdot" in name))
        else:
            table, index = function.args
            result = index
            for lane in range(index.type.count):
                at = builder.extract_element(index, ir.Constant(I32, lane))
                within = builder.add(
                    builder.zext(builder.and_(at, ir.Constant(I8, 15)), I32), ir.Constant(I32, lane & ~15)
                )
                result = builder.insert_element(result, builder.extract_element(table, within), ir.Constant(I32, lane))
            builder.ret(result)


def four_products(builder: Any, total: Any, weights: Any, values: Any, *, signed: bool) -> Any:
    lanes = total.type.count
    as_bytes, wide = ir.VectorType(I8, 4 * lanes), ir.VectorType(I32, 4 * lanes)
    weights, values = builder.bitcast(weights, as_bytes), builder.bitcast(values, as_bytes)
    products = builder.mul((builder.sext if signed else builder.zext)(weights, wide), builder.sext(values, wide))
    for byte in range(4):
        order = ir.Constant(ir.VectorType(I32, lanes), [4 * lane + byte for lane in range(lanes)])
        total = builder.add(total, builder.shuffle_vector(products, ir.Constant(wide, ir.Undefined), order))
    return total


def run(code: PackedCode, codes: np.ndarray, scales: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The sums [tokens, 16] of one block, compiled for this machine with emulated instructions."""
    module = module_of_block(code, len(x))
    module.triple = llvm.get_default_triple()
    emulate(module)
    parsed = llvm.parse_assembly(str(module))
    features = llvm.get_host_cpu_features().flatten()
    machine = llvm.Target.from_default_triple().create_target_machine(llvm.get_host_cpu_name(), features, jit=True)
    nbytes = simd.BLOCK_NBYTES[code.activation]
    blocks = np.zeros((len(x), nbytes), np.uint8)
    element, _, offset = code.activation.partition("_")
    if element == "words":
        order = x.reshape(-1, 16, 2, 2).swapaxes(-1, -2).reshape(len(x), -1)
        blocks[:, :128] = np.ascontiguousarray(order, np.int16).view(np.uint8)
    else:
        blocks[:, :64] = x.view(np.uint8)
    blocks[:, -16:-12] = np.full((len(x), 1), 0.37, np.float32).view(np.uint8)
    halves = -int(offset) * x.reshape(len(x), 2, 32).sum(-1, dtype=np.int32)
    corrections = np.concatenate([halves, halves.sum(-1, keepdims=True)], -1)
    blocks[:, -12:] = np.ascontiguousarray(corrections, np.int32).view(np.uint8)
    out = np.full((len(x), 16), np.nan, np.float32)
    inputs = np.array([row.ctypes.data for row in blocks])
    outputs = np.array([row.ctypes.data for row in out])
    with llvm.create_mcjit_compiler(parsed, machine) as engine:
        engine.finalize_object()
        function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(engine.get_function_address("block"))
        function(codes.ctypes.data, scales.ctypes.data, inputs.ctypes.data, outputs.ctypes.data)
    return out


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
@pytest.mark.parametrize("isa", [*EMULATED, "avx2"])
def test_every_isa_gives_the_bits_of_generic(isa: Isa, format: str, tokens: int) -> None:
    if isa == "avx2" and not supports("avx2"):
        pytest.skip("AVX2 is not emulated")
    random = np.random.default_rng(tokens)
    code = PackedCode(format, isa)
    codes = random.integers(0, 256, code.codes_nbytes, np.uint8)
    if format == "int8":
        codes = np.maximum(codes, 1)
    scales = random.integers(100, 140, code.scales_nbytes, np.uint8)
    if PACKED_FORMATS[format].scale == "bf16":
        values = random.standard_normal(code.scales_nbytes // 2).astype(np.float32)
        scales = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    x = random.integers(-127, 128, (tokens, 64)).astype(np.int8)
    found = run(code, codes, scales, x)
    expected = run(PackedCode(format, "generic"), codes, scales, x)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    assert np.isfinite(found).all()


def assembly(code: PackedCode, tokens: int, triple: str, cpu: str) -> str:
    module = module_of_block(code, tokens)
    module.triple = triple
    parsed = llvm.parse_assembly(str(module))
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu, opt=3)
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    return str(machine.emit_assembly(parsed))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("isa", "triple", "cpu", "instruction", "count"),
    [
        ("avx512_vnni", "x86_64-unknown-linux-gnu", "znver4", "vpdpbusd", 16),
        ("avx512_vnni", "x86_64-unknown-linux-gnu", "cascadelake", "vpdpbusd", 16),
        ("avx2_vnni", "x86_64-unknown-linux-gnu", "znver4", "vpdpbusd", 32),
        ("avx2_vnni", "x86_64-unknown-linux-gnu", "alderlake", "vpdpbusd", 32),
        ("neon_dot", "aarch64-unknown-linux-gnu", "neoverse-n1", "sdot", 64),
        ("avx2", "x86_64-unknown-linux-gnu", "haswell", "vpmadd", 32),
    ],
)
@pytest.mark.parametrize("tokens", [1, 4])
def test_it_compiles_to_the_instructions_it_is_named_after(
    format: str, isa: Isa, triple: str, cpu: str, instruction: str, count: int, tokens: int
) -> None:
    text = assembly(PackedCode(format, isa), tokens, triple, cpu)
    found = re.findall(rf"^\s+(?:{{vex}}\s+)?\S*{instruction}.*$", text, re.MULTILINE)
    assert len(found) >= count * tokens
    if isa == "avx512_vnni":
        assert sum("{1to16}" in line for line in found) == len(found), "a broadcast is not folded"
