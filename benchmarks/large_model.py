"""A model of the size of Qwen3-30B-A3B in int4, decoded and prefilled from RAM and within a small budget from disk.

Its weights never exist in 16 bits: bundles and layers are random codes, written straight into a store.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from benchmarks import checkpoints
from benchmarks.equality import gate_close, relative_rms
from benchmarks.harness import Report, Spread, say
from benchmarks.machine import stream_speed
from formats.bundle import BundleLayout
from formats.pack import pack_matrix
from offload.assembly import assemble
from offload.hf.experts_interface import experts_modules
from offload.hf.quantise import linears_to_quantise, put_back, take_out
from offload.hf.quantised_linear import QuantisedLinear
from offload.hf.skeleton import make_skeleton
from offload.hf.spec import build_spec, measure_without_experts
from offload.quantisation import make_quantisation
from offload.store import BundleSource, ExpertGroup, NoProgress, Progress
from placement.kv import KvChoice
from placement.model_spec import ModelSpec
from placement.plan import Plan
from placement.planner import make_plan
from placement.workload import Workload

LIKE_30B_A3B = checkpoints.Shape(
    layers=48, hidden=2048, experts=128, expert_intermediate=768, top_k=8, heads=32, kv_heads=4, head_dim=128,
    vocab=151936,
)  # fmt: skip

QUANT = "int4"
_CONTEXT_TOKENS = 1024
_SMALL_RAM_NBYTES = 8 << 30
EVERYTHING = 1 << 50
_STREAM_NBYTES = 600 << 20
_TOKENS_BETWEEN_STREAMS = 8
_EMBEDDING_SCALE = 4.0
"""Large beside what attention adds, so that routing follows the token; see `checkpoints`."""

LOGITS_TOLERANCE = 0.1
"""Root mean square of the difference between a token's logits after decoding and in a prompt, relative to theirs."""


@dataclass(frozen=True)
class LargeScale:
    """How much to run: `rounds` times `new_tokens` decoded and `prompt_tokens` read; so many from disk."""

    rounds: int
    new_tokens: int
    prompt_tokens: int
    from_disk_tokens: int


FULL = LargeScale(rounds=3, new_tokens=32, prompt_tokens=512, from_disk_tokens=16)
QUICK = LargeScale(rounds=1, new_tokens=4, prompt_tokens=32, from_disk_tokens=2)


class RandomBundles:
    """Experts of random codes; a `BundleSource`."""

    def __init__(self, shape: checkpoints.Shape, format: str, modules: Sequence[str]) -> None:
        layout = BundleLayout(shape.hidden, shape.expert_intermediate, format)
        self.groups = tuple(ExpertGroup(module, shape.experts, layout) for module in modules)
        self.name = f"random-{shape.name}"
        self.identity = hashlib.sha256(f"{self.name} {format}".encode()).hexdigest()

    @cached_property
    def _template(self) -> npt.NDArray[np.uint8]:
        """One expert, packed from gaussian weights."""
        layout = self.groups[0].layout
        bundle = np.zeros(layout.nbytes, np.uint8)
        generator = np.random.default_rng(0)
        for name in ("gate", "up", "down"):
            rows, columns = layout.shape(name)
            weights = generator.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
            for part, raw in zip((name, f"{name}_scale"), pack_matrix(weights, layout.format), strict=True):
                component = layout.components[part]
                bundle[component.offset : component.offset + component.nbytes] = raw.view(np.uint8).reshape(-1)
        return bundle

    def fill_bundle(self, group_index: int, expert: int, out: npt.NDArray[np.uint8]) -> None:
        """The template with its codes turned by as many bytes as the expert's number says."""
        template = self._template
        out[:] = template
        for name in ("gate", "up", "down"):
            component = self.groups[0].layout.components[name]
            codes = template[component.offset : component.offset + component.nbytes]
            turn = 64 * (1 + group_index * self.groups[0].count + expert) % component.nbytes
            out[component.offset : component.offset + component.nbytes - turn] = codes[turn:]
            out[component.offset + component.nbytes - turn : component.offset + component.nbytes] = codes[:turn]

    def check_unchanged(self) -> None:
        """Nothing can have changed."""


class PreparedRandom:
    """A model of random weights, as `offload.preparation` prepares one from files."""

    finishes_beside_conversion: ClassVar[bool] = False

    def __init__(
        self,
        shape: checkpoints.Shape,
        ram: int,
        context_tokens: int = _CONTEXT_TOKENS,
        kv: KvChoice | None = None,
        lm_head: str | None = None,
    ) -> None:
        """Plan a model in `QUANT`, its output layer in a format of its own if `lm_head` names one."""
        quant = QUANT if lm_head is None else {"experts": QUANT, "dense": QUANT, "lm_head": lm_head}
        quantisation = make_quantisation(quant)
        self._skeleton = make_skeleton(shape.config(), torch.bfloat16)
        modules = [name for name, _ in experts_modules(self._skeleton)]
        assert quantisation.experts is not None
        self.bundles: BundleSource = RandomBundles(shape, quantisation.experts, modules)
        self._formats = linears_to_quantise(self._skeleton, quantisation)
        self.spec: ModelSpec = build_spec(
            self._skeleton, self.bundles.groups, measure_without_experts(self._skeleton), name=self.bundles.name,
            context_tokens=context_tokens, casts=False, formats=self._formats, alone=list(self._formats),
            quantisation=quantisation,
        )  # fmt: skip
        self.plan: Plan = make_plan(self.spec, Workload(context_tokens), ram, kv=kv)

    def finish(self, progress: Progress) -> PreTrainedModel:
        """Random weights in place of those that a checkpoint would have."""
        model = self._skeleton
        generator = torch.Generator().manual_seed(0)
        taken = take_out(model, self._formats, self._formats)
        shapes = {parameter: layer.shape for layer in taken for parameter in layer.parameters}
        for name, module in model.named_modules():
            for own, parameter in list(module._parameters.items()):
                if parameter is not None:
                    scale = _EMBEDDING_SCALE if "embed" in name else 0.02
                    weight = torch.ones(parameter.shape) if parameter.dim() == 1 else None
                    weight = torch.randn(parameter.shape, generator=generator) * scale if weight is None else weight
                    module._parameters[own] = nn.Parameter(weight.to(parameter.dtype), requires_grad=False)
        rotary: Any = model.get_decoder().rotary_emb
        model.get_decoder().rotary_emb = type(rotary)(rotary.config)
        put_back(model, taken, lambda name: torch.randn(shapes[name], generator=generator) * 0.02)
        return model.eval()  # type: ignore[no-any-return]

    def close(self) -> None:
        """There is nothing to close."""


def run(work: Path, shape: checkpoints.Shape, scale: LargeScale) -> Report:
    """The benchmark; needs the store's room on disk, and RAM for all of it."""
    report = Report("large_model")
    rows = report.tables.setdefault(f"{QUANT}, tokens/s", [])
    say("writing the store and reading it into RAM")
    model = load_random(work, shape, EVERYTHING)
    _gate(report, model, shape)
    nbytes = weights_of_a_token_nbytes(model, shape)
    decode, shares, prefill = [], [], []
    for round_index in range(scale.rounds):
        say(f"round {round_index + 1}")
        prefill.append(prefill_speed(model, shape, scale.prompt_tokens))
        speed, share = decode_beside_stream(model, shape, scale.new_tokens, nbytes)
        decode.append(speed)
        shares += share
    rows.append({"where": "all in RAM", "task": "decode", "tokens/s": Spread.of(decode)})
    rows.append({"where": "all in RAM", "task": f"prefill {scale.prompt_tokens}", "tokens/s": Spread.of(prefill)})
    report.tables["Decode beside the stream"] = [
        {"MB read a token": nbytes / 1e6, "share of read bandwidth": Spread.of(shares)}
    ]
    report.target("decode / (stream / bytes of a token)", Spread.of(shares).median, "at least", 0.85)
    report.target("prefill, tokens/s", Spread.of(prefill).median, "at least", 50.0)
    _runtime(model).close()
    del model
    gc.collect()
    say("from disk")
    model = load_random(work, shape, _SMALL_RAM_NBYTES)
    peak = _runtime(model).plan.peak_ram_nbytes
    speed = decode_speed(model, shape, scale.from_disk_tokens)
    rows.append({"where": f"{peak / 2**30:.1f} GiB and disk", "task": "decode", "tokens/s": Spread.of([speed])})
    stats = _runtime(model).stats()
    report.notes.append(f"From disk: hit rate {stats.hit_rate:.2f}, {stats.bytes_read / 1e9:.1f} GB read.")
    report.notes.append("Random weights: their routing is nearly uniform, which no cache can predict.")
    _runtime(model).close()
    return report


def load_random(work: Path, shape: checkpoints.Shape, ram: int, lm_head: str | None = None) -> PreTrainedModel:
    """A model of random weights within so many bytes of RAM; its store is written once. lm_head: format of its own."""
    return assemble(PreparedRandom(shape, ram, lm_head=lm_head), checkpoints.store_root(work), NoProgress())


def _runtime(model: PreTrainedModel) -> Any:
    return model.offload


def weights_of_a_token_nbytes(model: PreTrainedModel, shape: checkpoints.Shape) -> int:
    """Weights that one token is multiplied with."""
    experts = _runtime(model).plan.slot_nbytes * shape.layers * shape.top_k
    linears = sum(
        module.codes.nbytes + module.scales.nbytes for module in model.modules() if isinstance(module, QuantisedLinear)
    )
    routers = 2 * shape.layers * shape.hidden * shape.experts
    return int(experts + linears + routers)


@torch.no_grad()
def _gate(report: Report, model: PreTrainedModel, shape: checkpoints.Shape) -> None:
    ids = torch.tensor([checkpoints.random_tokens(33, shape.vocab, 1)])
    expected = model(input_ids=ids, logits_to_keep=1).logits[0].float().numpy()
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    found = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[0].float().numpy()
    gate_close(report, "logits: decoded = in a prompt", found, expected, relative_rms, LOGITS_TOLERANCE)


@torch.no_grad()
def prefill_speed(model: PreTrainedModel, shape: checkpoints.Shape, count: int) -> float:
    """Tokens a second of a prompt of `count` random tokens."""
    ids = torch.tensor([checkpoints.random_tokens(count, shape.vocab, 2)])
    cache = DynamicCache(config=model.config)
    before = perf_counter()
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return count / (perf_counter() - before)


def decode_speed(model: PreTrainedModel, shape: checkpoints.Shape, count: int) -> float:
    """Tokens a second of `count` random tokens, one at a time, after 18."""
    return count / sum(_token_seconds(model, shape, count))


def decode_beside_stream(
    model: PreTrainedModel, shape: checkpoints.Shape, count: int, token_nbytes: int
) -> tuple[float, list[float]]:
    """As `decode_speed`, and the share that each eight tokens have of what memory gives right before and after them."""
    stream = torch.ones(_STREAM_NBYTES // 4)
    seconds = _token_seconds(model, shape, count)
    times: list[float] = []
    shares: list[float] = []
    before = stream_speed(stream)
    while len(times) < count:
        some = [next(seconds) for _ in range(min(_TOKENS_BETWEEN_STREAMS, count - len(times)))]
        after = stream_speed(stream)
        shares.append(len(some) * token_nbytes / sum(some) / ((before + after) / 2))
        times += some
        before = after
    return count / sum(times), shares


def _token_seconds(model: PreTrainedModel, shape: checkpoints.Shape, count: int) -> Iterator[float]:
    """Seconds of each of `count` tokens."""
    cache = DynamicCache(config=model.config)
    tokens = checkpoints.random_tokens(16 + 2 + count, shape.vocab, 3)
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens[:16]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    for index, token in enumerate(tokens[16:]):
        before = perf_counter()
        with torch.no_grad():
            model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        if index >= 2:
            yield perf_counter() - before
