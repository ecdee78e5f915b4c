"""Compile what the wrappers would launch, for cards that are not here: `python -m tests.gpu_kernels.cubins`.

Runs in a process of its own, because a process that interprets kernels cannot compile them. Wrappers are called
with tensors on meta, so shapes are those of real models and take no memory; each launch is recorded instead of made.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from formats.bundle import EXPERT_FORMATS, BundleLayout
from formats.kv import KV_FORMATS, KvLayout
from formats.packed import PACKED_FORMATS, MatrixLayout
from gpu_kernels import attention, combine, expert_mlp, grouping, kv_blocks, linear, paged_attention
from gpu_kernels.configs import product_configs
from gpu_kernels.launch import DTYPE_OF_FORMAT, Threads
from tests.gpu_kernels.bundles import activations_of

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """One kernel as it would be compiled: what Triton's launcher derives from the arguments of a call."""

    label: str
    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    threads: Threads


def describe(
    label: str, kernel: Any, arguments: tuple[Any, ...], threads: Threads, constants: dict[str, Any]
) -> Launch:
    names = kernel.arg_names
    signature, fixed, aligned = {}, dict(constants), []
    for index, (name, value) in enumerate(zip(names, arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            aligned.append(index)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            fixed[name] = 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(index)
    for name in fixed:
        signature[name] = "constexpr"
    ordered = tuple((name, signature[name]) for name in names)
    return Launch(label, kernel, ordered, tuple(sorted(fixed.items())), tuple(aligned), threads)


class Recorder:
    """Stands in for `launch`."""

    def __init__(self) -> None:
        self.launches: dict[tuple[Any, ...], Launch] = {}
        self.label = ""

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        threads: Threads,
        device: Any,
        **constants: Any,
    ) -> None:
        launch = describe(f"{self.label}: {kernel.__name__}", kernel, arguments, threads, constants)
        key = (kernel.__name__, launch.signature, tuple(map(repr, launch.constants)), launch.aligned, threads)
        self.launches.setdefault(key, launch)


def record(every_config: bool) -> list[Launch]:
    """Launches of wrappers at shapes of real models: one of each kernel, or all, with every config."""
    recorder = Recorder()
    with ExitStack() as stack:
        for module in (attention, combine, expert_mlp, grouping, kv_blocks, linear, paged_attention):
            stack.enter_context(patch.multiple(module, launch=recorder))
        _experts(recorder, every_config)
        _linears(recorder, every_config)
        _attention(recorder)
        _paged_attention(recorder)
        _writing(recorder)
    launches = list(recorder.launches.values())
    return launches if every_config else list({launch.kernel.__name__: launch for launch in launches}.values())


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _experts(recorder: Recorder, every_config: bool) -> None:
    for format in EXPERT_FORMATS:
        layout = BundleLayout(2048, 768, format)
        for dtype in activations_of(format):
            for tokens in (1, 512):
                recorder.label = f"{format}, {dtype}, {tokens} tokens"
                x, ids, table = (
                    _meta(tokens, 2048, dtype=dtype),
                    _meta(tokens, 8, dtype=torch.int64),
                    _meta(128, dtype=torch.int64),
                )
                configs = product_configs(format, x.element_size(), few=tokens == 1)
                for config in configs if every_config else configs[:1]:
                    rows = expert_mlp.expert_mlp(x, ids, table, layout, "silu", config)
                combine.combine(rows, _meta(tokens, 8, dtype=torch.float32), _meta(tokens, 2048, dtype=dtype))
    recorder.label = "splits"
    table = _meta(128, dtype=torch.int64)
    expert_mlp.expert_mlp(
        _meta(1, 2048), _meta(1, 2, dtype=torch.int64), table, BundleLayout(2048, 768, "int4"), "silu"
    )
    for tokens in (1, 512):
        recorder.label = f"gpt-oss, {tokens} tokens"
        layout = BundleLayout(2880, 2880, "mxfp4", has_bias=True)
        x, table = _meta(tokens, 2880), _meta(32, dtype=torch.int64)
        expert_mlp.expert_mlp(x, _meta(tokens, 4, dtype=torch.int64), table, layout, "gpt_oss")
        recorder.label = f"without a gate, {tokens} tokens"
        layout = BundleLayout(2048, 768, "int8", has_gate=False)
        expert_mlp.expert_mlp(_meta(tokens, 2048), _meta(tokens, 4, dtype=torch.int64), table, layout, "relu2")
        recorder.label = f"a gate of the model's own, {tokens} tokens"
        layout, x, ids = BundleLayout(2048, 768, "bf16"), _meta(tokens, 2048), _meta(tokens, 8, dtype=torch.int64)
        config = expert_mlp.default_config(x, ids, layout)
        groups = grouping.group_pairs(ids, table, config.tokens)
        expert_mlp.expert_up(x, groups, table, layout, config)
    recorder.label = "one split"
    expert_mlp.expert_mlp(
        _meta(8, 2048), _meta(8, 8, dtype=torch.int64), table, BundleLayout(2048, 768, "int4"), "gelu"
    )


def _linears(recorder: Recorder, every_config: bool) -> None:
    for format in PACKED_FORMATS:
        layout = MatrixLayout(4096, 2048, format)
        codes, scales = _meta(layout.codes_nbytes, dtype=torch.uint8), _meta(layout.scales_nbytes, dtype=torch.uint8)
        for dtype in activations_of(format):
            for tokens in (1, 512):
                recorder.label = f"linear {format}, {dtype}, {tokens} tokens"
                configs = product_configs(format, dtype.itemsize, few=tokens == 1)
                for config in configs if every_config else configs[:1]:
                    linear.packed_linear(_meta(tokens, 2048, dtype=dtype), codes, scales, layout, None, config)


def _attention(recorder: Recorder) -> None:
    for label, queries, heads, depth, value in (
        ("decode", 1, 32, 128, 128), ("prompt", 512, 32, 128, 128), ("latent decode", 1, 16, 576, 512),
        ("prompt of 64", 512, 8, 64, 64),
    ):  # fmt: skip
        recorder.label = f"attention, {label}"
        kv_heads = 1 if depth == 576 else heads // 4
        q, k = _meta(1, heads, queries, depth), _meta(1, kv_heads, 4096, depth)
        out, lse = attention.attention_partial(
            q, k, _meta(1, kv_heads, 4096, value), _meta(1, dtype=torch.int32), scale=depth**-0.5, first_query=100
        )
        attention.merge_attention(out, lse, torch.bfloat16)


def _paged_attention(recorder: Recorder) -> None:
    """A step of one token and one of eight, after 131,072: grouped heads, and DeepSeek's latents."""
    for format in KV_FORMATS:
        for label, new, heads, layout in (
            ("one token", 1, 32, KvLayout(format, 4, 128, 128)),
            ("heads of 64", 1, 64, KvLayout(format, 8, 64, 64)),
            ("eight tokens", 8, 32, KvLayout(format, 4, 128, 128)),
            ("heads of 192 and 128", 1, 16, KvLayout(format, 16, 192, 128)),
            ("latents", 1, 16, KvLayout(format, 1, 576, 0, value_from_key=512)),
            ("latents of 128 heads", 2, 128, KvLayout(format, 1, 576, 0, value_from_key=512)),
        ):
            # Products of fp32, which no tensor cores take, do not stay in registers in every shape on every card.
            dtypes = [torch.bfloat16, torch.float16] if layout.is_quantised else [DTYPE_OF_FORMAT[format]]
            for dtype in dtypes if format != "fp32" or label == "eight tokens" else ():
                recorder.label = f"paged attention, {format}, {dtype}, {label}"
                told = [_meta(*shape, dtype=torch.int64) for shape in ((2,), (2048,), (1,), (1,), (1, new))]
                paged_attention.paged_attention(
                    _meta(1, heads, new, layout.key_width, dtype=dtype), *told, layout, 0.1, most_tokens=131_072
                )


def _writing(recorder: Recorder) -> None:
    for layout in (KvLayout("bf16", 4, 128, 128), KvLayout("fp32", 1, 576, 0, value_from_key=512)):
        recorder.label = f"writing tokens, {layout.format}"
        for tokens in (1, 512):
            keys = _meta(2, layout.kv_heads, tokens, layout.key_width)
            values = None if layout.value_from_key else _meta(2, layout.kv_heads, tokens, layout.value_width)
            told = [_meta(count, dtype=torch.int64) for count in (3, 20, 2)]
            kv_blocks.write_tokens(keys, values, *told, layout)


def compile_for(launch: Launch, capability: int) -> dict[str, Any]:
    """Resources of the cubin: registers, bytes of stack (which holds what is spilled) and bytes of shared memory."""
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.aligned},
    )
    options = {"num_warps": launch.threads.warps, "num_stages": launch.threads.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return {
        "label": launch.label,
        "kernel": launch.kernel.__name__,
        "capability": capability,
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": compiled.metadata.shared,
        "constants": {name: repr(value) for name, value in launch.constants},
        "warps": launch.threads.warps,
    }


_LAUNCHES: list[Launch] = []


def _prepare(every_config: bool) -> None:
    _LAUNCHES.extend(record(every_config))


def _compile(job: tuple[int, int]) -> dict[str, Any]:
    index, capability = job
    return compile_for(_LAUNCHES[index], capability)


def main() -> None:
    """Print what was compiled as JSON; arguments: "every" or "first", then capabilities."""
    every_config = sys.argv[1] == "every"
    jobs = [(index, int(cc)) for index in range(len(record(every_config))) for cc in sys.argv[2:]]
    with ProcessPoolExecutor(2, initializer=_prepare, initargs=(every_config,)) as pool:
        print(json.dumps(list(pool.map(_compile, jobs, chunksize=4))))


if __name__ == "__main__":
    main()
