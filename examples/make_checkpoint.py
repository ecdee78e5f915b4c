"""Write a random-weight checkpoint of a real architecture at any size, in the layout that its hub checkpoints have.

    python examples/make_checkpoint.py OUT --arch qwen3_moe --layers 24 --experts 64 --hidden 1024 \
        --expert-intermediate 512 --top-k 8 --heads 16 --kv-heads 4 --head-dim 64 --vocab 32000

Memory stays below 100 MiB on top of what torch takes, whatever the size: names and shapes come from a model on the
meta device, and each tensor is streamed to its shard in chunks.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_POOL_NUMBERS = 1 << 22
_CHUNK_NUMBERS = 1 << 21
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}

_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "expert_intermediate": ("moe_intermediate_size", "intermediate_size"),
    "top_k": ("num_experts_per_tok", "moe_k", "moe_topk"),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "vocab": ("vocab_size",),
}


@dataclass(frozen=True)
class TensorLayout:
    """A tensor as it lies on disk: its checkpoint name, its shape and its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        """Count of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.numbers * self.dtype.itemsize


def checkpoint_layout(config: PreTrainedConfig, dtype: torch.dtype) -> list[TensorLayout]:
    """Every tensor of the architecture's hub checkpoint, in layer order. Nothing is materialised.

    Weights that transformers stacks or renames when it loads a checkpoint are taken apart and renamed back; tied
    weights appear once. Tensors that transformers keeps in fp32 are fp32.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    tensors = model.state_dict()
    for tied in model.all_tied_weights_keys:
        tensors.pop(tied, None)
    kept_in_fp32 = tuple(model._keep_in_fp32_modules_strict or ())
    layout = []
    for name, tensor in revert_weight_conversion(model, tensors).items():
        kept = any(part in name for part in kept_in_fp32)
        layout.append(TensorLayout(name, tuple(tensor.shape), torch.float32 if kept else tensor.dtype))
    return layout


class RandomWeights:
    """Seeded values: ones for norms, normal with the given standard deviation for everything else.

    Drawing every number would be many times slower than a disk, so a pool of normal numbers and a pool of signs are
    drawn once, and each chunk of a tensor is a slice of the one, at an offset of its own, with the signs of a slice of
    the other. Two tensors share values but not their arrangement. A tensor depends on the seed and on its name, shape
    and dtype alone, not on what is written before it. Biases are not zero, so that a reader that drops one is noticed.
    """

    def __init__(self, seed: int, std: float) -> None:
        self._seed = seed
        generator = np.random.default_rng(seed)
        normal = generator.standard_normal(_POOL_NUMBERS + _CHUNK_NUMBERS, dtype=np.float32) * np.float32(std)
        signs = generator.integers(0, 2, _POOL_NUMBERS + _CHUNK_NUMBERS, dtype=np.uint8)
        self._normal = torch.from_numpy(normal)
        self._signs = signs
        self._pools: dict[torch.dtype, tuple[NDArray[Any], NDArray[Any]]] = {}

    def chunks(self, tensor: TensorLayout) -> Iterator[memoryview]:
        """The tensor's bytes in order, at most `_CHUNK_NUMBERS` elements at a time; a chunk is valid until the next."""
        if "norm" in tensor.name and tensor.name.endswith("weight"):
            block = _bits(torch.ones(min(tensor.numbers, _CHUNK_NUMBERS), dtype=tensor.dtype))
            for start in range(0, tensor.numbers, _CHUNK_NUMBERS):
                yield block[: tensor.numbers - start].view(np.uint8).data
            return
        normal, signs = self._pool(tensor.dtype)
        offsets = np.random.default_rng([self._seed, zlib.crc32(tensor.name.encode())])
        buffer = np.empty(min(tensor.numbers, _CHUNK_NUMBERS), dtype=normal.dtype)
        for start in range(0, tensor.numbers, _CHUNK_NUMBERS):
            part = buffer[: tensor.numbers - start]
            first, second = offsets.integers(_POOL_NUMBERS, size=2)
            np.bitwise_xor(normal[first : first + len(part)], signs[second : second + len(part)], out=part)
            yield part.view(np.uint8).data

    def _pool(self, dtype: torch.dtype) -> tuple[NDArray[Any], NDArray[Any]]:
        if dtype not in self._pools:
            normal = _bits(self._normal.to(dtype))
            sign_bit = 8 * dtype.itemsize - 1
            self._pools[dtype] = (normal, np.left_shift(self._signs.astype(normal.dtype), sign_bit))
        return self._pools[dtype]


def _bits(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor's memory as unsigned integers of the same width; shares it."""
    width = {2: torch.uint16, 4: torch.uint32}[tensor.dtype.itemsize]
    bits: NDArray[Any] = tensor.view(width).numpy()
    return bits


def plan_shards(layout: list[TensorLayout], shard_bytes: int) -> dict[str, list[TensorLayout]]:
    """File name → tensors, filled in order; a file exceeds `shard_bytes` only when a single tensor does."""
    shards: list[list[TensorLayout]] = [[]]
    used = 0
    for tensor in layout:
        if shards[-1] and used + tensor.nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_checkpoint(
    config: PreTrainedConfig,
    out_dir: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = 2 * 10**9,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write a random checkpoint of `config`'s architecture to `out_dir`, a directory that must not exist yet.

    The same arguments give the same bytes. `progress` is called with the count of bytes just written. The directory
    appears under its name once it is complete. Raises `FileExistsError` when it exists already, `ValueError` for a
    dtype other than bfloat16, float16 or float32, and `OSError` when the disk has too little room, before it writes.
    """
    out = Path(out_dir).absolute()
    if out.exists():
        raise FileExistsError(f"{out} exists already")
    if dtype not in _DTYPES:
        raise ValueError(f"cannot write {dtype}; supported: {', '.join(str(known) for known in _DTYPES)}")
    layout = checkpoint_layout(config, dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    _check_room(out.parent, sum(tensor.nbytes for tensor in layout))
    weights = RandomWeights(seed, float(getattr(config, "initializer_range", 0.02)))
    shards = plan_shards(layout, shard_bytes)
    with _renamed_when_complete(out) as work:
        for file_name, tensors in shards.items():
            with open(work / file_name, "wb") as file:
                _write_shard(file, tensors, weights, progress)
        _write_config(config, dtype, work)
        if len(shards) > 1:
            _write_index(shards, work)
    return out


def _check_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(f"the checkpoint takes {needed / 1e9:.2f} GB, but {directory} has {free / 1e9:.2f} GB free")


@contextmanager
def _renamed_when_complete(out: Path) -> Iterator[Path]:
    """A new directory beside `out` that becomes `out` at the end, or is removed when the block raises."""
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        work.chmod(0o755)
        yield work
        work.rename(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _write_shard(
    file: BinaryIO, tensors: list[TensorLayout], weights: RandomWeights, progress: Callable[[int], None] | None
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": _DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        for chunk in weights.chunks(tensor):
            file.write(chunk)
            if progress is not None:
                progress(chunk.nbytes)


def _write_config(config: PreTrainedConfig, dtype: torch.dtype, out: Path) -> None:
    config = copy.deepcopy(config)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = dtype
    config.save_pretrained(out)
    GenerationConfig.from_model_config(config).save_pretrained(out)


def _write_index(shards: dict[str, list[TensorLayout]], out: Path) -> None:
    tensors = [tensor for shard in shards.values() for tensor in shard]
    metadata = {
        "total_parameters": sum(tensor.numbers for tensor in tensors),
        "total_size": sum(tensor.nbytes for tensor in tensors),
    }
    weight_map = {tensor.name: file_name for file_name, shard in shards.items() for tensor in shard}
    index = {"metadata": metadata, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def make_config(arch: str, sizes: dict[str, int], overrides: dict[str, Any]) -> PreTrainedConfig:
    """A configuration of `arch` from generic sizes (see `--help`) and from attributes by their own names.

    Token ids that the vocabulary does not hold become None. Raises `ValueError` for an unknown architecture, size or
    attribute.
    """
    if arch not in CONFIG_MAPPING:
        raise ValueError(f"transformers knows no architecture {arch!r}")
    default = CONFIG_MAPPING[arch]()
    values: dict[str, Any] = {}
    for option, value in sizes.items():
        for name in _attributes(default, option):
            values[name] = value
    for name, value in overrides.items():
        if name != "head_dim" and (name.startswith("_") or callable(getattr(default, name, callable))):
            raise ValueError(f"{type(default).__name__} has no attribute {name!r}")
        values[name] = value
    config: PreTrainedConfig = CONFIG_MAPPING[arch](**values)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int) and token >= config.vocab_size and name not in overrides:
            setattr(config, name, None)
    return config


def _attributes(default: PreTrainedConfig, option: str) -> tuple[str, ...]:
    """The configuration attributes that a generic size sets."""
    if option == "head_dim":
        # Latent attention has no single head size; its rotary part keeps the architecture's own.
        return ("qk_nope_head_dim", "v_head_dim") if hasattr(default, "kv_lora_rank") else ("head_dim",)
    if option == "dense_intermediate":
        if hasattr(default, "moe_intermediate_size"):
            return ("intermediate_size",)
        raise ValueError(f"{default.model_type} has no dense feed-forward layers")
    for name in _ATTRIBUTES[option]:
        if hasattr(default, name):
            return (name,)
    raise ValueError(f"{default.model_type} has no attribute for --{option.replace('_', '-')}")


def parse_size(text: str) -> int:
    """Bytes in "500MB", "2GB" (powers of ten) or "4096". Raises `ValueError`."""
    for unit, factor in _UNITS.items():
        if text.upper().endswith(unit):
            return int(float(text[: -len(unit)]) * factor)
    return int(text)


def _parse_overrides(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`key=value` with JSON values; what is not JSON is a string."""
    overrides: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, not {pair!r}")
        try:
            overrides[key] = json.loads(value)
        except json.JSONDecodeError:
            overrides[key] = value
    return overrides


@click.command(context_settings={"show_default": True})
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option("--arch", default="qwen3_moe", help="Model type as in config.json. Sizes not given are its defaults.")
@click.option("--layers", type=click.IntRange(1))
@click.option("--hidden", type=click.IntRange(1))
@click.option("--experts", type=click.IntRange(1), help="Routed experts per layer.")
@click.option("--expert-intermediate", type=click.IntRange(1))
@click.option("--dense-intermediate", type=click.IntRange(1), help="Feed-forward size of layers without experts.")
@click.option("--top-k", type=click.IntRange(1), help="Experts per token.")
@click.option("--heads", type=click.IntRange(1))
@click.option("--kv-heads", type=click.IntRange(1))
@click.option("--head-dim", type=click.IntRange(1), help="With latent attention: of the values and the unrotated part.")
@click.option("--vocab", type=click.IntRange(1))
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16")
@click.option("--shard-size", default="2GB")
@click.option("--seed", default=0)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Any other attribute of the config.")
def main(
    out_dir: Path, arch: str, dtype: str, shard_size: str, seed: int, overrides: tuple[str, ...], **sizes: int | None
) -> None:
    """Write a random-weight checkpoint of a real architecture to OUT_DIR."""
    try:
        given = {name: size for name, size in sizes.items() if size is not None}
        config = make_config(arch, given, _parse_overrides(overrides))
        torch_dtype: torch.dtype = getattr(torch, dtype)
        shard_bytes = parse_size(shard_size)
        total = sum(tensor.nbytes for tensor in checkpoint_layout(config, torch_dtype))
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task("", total=total)
            write_checkpoint(
                config,
                out_dir,
                dtype=torch_dtype,
                shard_bytes=shard_bytes,
                seed=seed,
                progress=lambda count: bar.advance(task, count),
            )
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out_dir}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
