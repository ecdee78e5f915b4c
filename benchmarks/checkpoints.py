"""The random-weight checkpoints that benchmarks run on: made once, then found again."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedConfig

from benchmarks.harness import say
from examples.make_checkpoint import make_config, write_checkpoint
from offload.preparation import PreparedCheckpoint, prepare_checkpoint
from offload.request import make_request
from placement.plan import Plan

MODEL_TYPE = "qwen3_moe"

_TAGS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_DOUBLINGS = {"embed_tokens": 7, "down_proj": 3}
_ROUTER = "mlp.gate.weight"


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3-MoE. `top_k` of `experts` experts compute each token of each layer.

    Attributes:
        router_skew: deviation of the logarithm of the lengths of a router's rows: the longer an expert's, the more
            often its logits are among the largest. 0: all experts are about equally popular.
    """

    layers: int
    hidden: int
    experts: int
    expert_intermediate: int
    top_k: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    dtype: str = "bfloat16"
    seed: int = 0
    router_skew: float = 0.0

    @property
    def name(self) -> str:
        """A file name that differs where the weights do."""
        return (
            f"{MODEL_TYPE}-{self.layers}x{self.hidden}-{self.experts}x{self.expert_intermediate}-top{self.top_k}"
            f"-{self.heads}.{self.kv_heads}x{self.head_dim}-v{self.vocab}-{self.dtype}-{self.seed}"
            f"{f'-skew{self.router_skew:g}' if self.router_skew else ''}"
        )

    def config(self) -> PreTrainedConfig:
        """The configuration of transformers."""
        sizes = {
            name: getattr(self, name)
            for name in (
                "layers", "hidden", "experts", "expert_intermediate", "top_k", "heads", "kv_heads", "head_dim", "vocab",
            )
        }  # fmt: skip
        return make_config(MODEL_TYPE, sizes, {"norm_topk_prob": True})

    @property
    def expert_parameters(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.expert_intermediate

    @property
    def active_parameters(self) -> int:
        """Weights that one token is multiplied with: its experts, attention, router and output head."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = self.top_k * self.expert_parameters + attention + self.hidden * self.experts
        return self.layers * layer + self.hidden * self.vocab

    @property
    def element_nbytes(self) -> int:
        """Bytes of one weight."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype.itemsize


FULL = Shape(
    layers=24, hidden=1024, experts=64, expert_intermediate=512, top_k=8, heads=16, kv_heads=4, head_dim=64, vocab=32000
)
LIKE_MIXTRAL = Shape(
    layers=16, hidden=1024, experts=8, expert_intermediate=3584, top_k=2, heads=16, kv_heads=4, head_dim=64, vocab=32000
)
"""3 GB with few wide experts, as Mixtral has them."""

QUICK = Shape(
    layers=6, hidden=512, experts=32, expert_intermediate=256, top_k=4, heads=8, kv_heads=2, head_dim=64, vocab=4000
)


def ensure_checkpoint(shape: Shape, work: Path) -> Path:
    """The checkpoint of a shape under `work`; written unless it is there."""

    def write(directory: Path) -> None:
        write_checkpoint(shape.config(), directory, dtype=getattr(torch, shape.dtype), seed=shape.seed)
        for file in weight_files(directory):
            _spread_routing(file, shape.router_skew)

    return written_once(work, shape.name, write)


def written_once(work: Path, name: str, write: Callable[[Path], None]) -> Path:
    """The checkpoint of a name under `work`; written unless it is there, and there only when it is whole.

    Args:
        work: directory for checkpoints.
        name: of the checkpoint's directory.
        write: writes it to a directory that is not there yet.
    """
    directory = work / "checkpoints" / name
    if not directory.exists():
        say(f"writing the checkpoint {name}")
        unfinished = directory.with_name(f"{name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write(unfinished)
        unfinished.rename(directory)
    return directory


def _spread_routing(file: Path, router_skew: float) -> None:
    """Scale embeddings and the experts' down projections by powers of two, and routers' rows as `Shape` says.

    In weights of one standard deviation attention's mean over the context outweighs the token: all tokens of a
    sequence go to nearly the same experts, and a cache of an eighth of them never misses. Scaled, routing follows the
    token, and the experts' outputs are large enough beside it for a wrong one to show in the logits.
    """
    weights = np.memmap(file, dtype=np.uint8, mode="r+")
    start = 8 + int.from_bytes(weights[:8].tobytes(), "little")
    header = json.loads(weights[8:start].tobytes())
    for name, tensor in header.items():
        doublings = next((count for part, count in _DOUBLINGS.items() if part in name), 0)
        is_skewed = router_skew > 0 and name.endswith(_ROUTER)
        if doublings or is_skewed:
            first, last = tensor["data_offsets"]
            values = torch.from_numpy(weights[start + first : start + last]).view(_TAGS[tensor["dtype"]])
            values *= 2**doublings
        if is_skewed:
            rows = values.view(tensor["shape"])
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            rows *= torch.exp(router_skew * torch.randn(len(rows), 1, generator=generator)).to(rows.dtype)
    weights.flush()


def store_root(work: Path) -> Path:
    """Where expert stores of the benchmarks lie."""
    return work / "stores"


def weight_files(checkpoint: Path) -> list[Path]:
    """The files that hold weights."""
    return sorted(checkpoint.glob("*.safetensors"))


def weights_nbytes(checkpoint: Path) -> int:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in weight_files(checkpoint))


def prepare(checkpoint: Path, ram: int | None, context: int, root: Path) -> PreparedCheckpoint:
    """Plan a checkpoint; `ram` None allows all experts to be resident. The caller closes `.checkpoint`."""
    request = make_request(
        ram=1 << 50 if ram is None else ram,
        nvme=root,
        context=context,
        batch=1,
        prefill_chunk=1024,
        max_memory=None,
    )
    return prepare_checkpoint(checkpoint, request)


def plan_for(checkpoint: Path, ram: int | None, context: int) -> Plan:
    """The plan that `offload.load` makes; `ram` None allows all experts to be resident."""
    prepared = prepare(checkpoint, ram, context, Path())
    prepared.checkpoint.close()
    return prepared.plan


def budget_for(checkpoint: Path, resident: float, context: int) -> int:
    """The budget with which a share of the experts is resident, at least two experts."""
    plan = plan_for(checkpoint, None, context)
    fixed = plan.peak_ram_nbytes - plan.ram.slot_nbytes
    return fixed + max(2, round(resident * plan.expert_count)) * plan.slot_nbytes


def vram_for(checkpoint: Path, share: float, *, device: str, ram: int | str, context: int, root: Path) -> int:
    """The `vram=` with which a share of the experts, at least two, lies on a device beside all that has to be there.

    Args:
        checkpoint: directory.
        share: of the experts.
        device: "cuda:N", or "host" for an accelerator that host memory plays.
        ram: budget of host memory.
        context: tokens.
        root: of stores.
    """
    request = make_request(
        ram=ram, nvme=root, context=context, batch=1, prefill_chunk=1024, max_memory=None, device=device,
        vram=str(1 << 40) if device == "host" else None,
    )  # fmt: skip
    prepared = prepare_checkpoint(checkpoint, request)
    prepared.close()
    plan = prepared.plan
    assert plan.vram is not None
    use = plan.vram.use
    return use.total_nbytes - use.slot_nbytes + max(2, round(share * plan.expert_count)) * plan.slot_nbytes


def vocabulary(checkpoint: Path) -> int:
    """Token ids run from 0 to here, exclusively."""
    return int(json.loads((checkpoint / "config.json").read_text())["vocab_size"])


def random_tokens(count: int, vocab: int, seed: int) -> list[int]:
    """A prompt of uniformly random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(vocab, (count,), generator=generator)]
