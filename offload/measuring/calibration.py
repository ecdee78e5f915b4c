"""What whole forward passes take beyond their parts: the overheads of a profile.

Models with random weights of two depths run through the runtime with everything in RAM, as a user's model does: nothing
is hooked, because that would change which of the runtime's ways a pass takes. What the profile's curves predict of
their products and attention is taken off; what is left grows with the layers, or does not. What a curve has wrong for
every model is in the remainder, and so corrected. Their experts are narrow, so that what is looked for is a large share
of a pass. Small models would stay in the CPU's caches, in which no model of use does: before each pass these are
filled with something else, and in prompts, where experts are large in any model of use, after those of each layer: what
follows finds nothing of its own there. In prompts seconds of experts, and of this, are taken off as they were in that
very pass. How reads and kernels get on in prompts is seen in a model with wide experts.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from transformers import DynamicCache, PreTrainedModel

from formats.elements import BF16
from offload.devices.base import ExpertBatch
from offload.devices.host import HostDevice
from offload.measuring.from_disk import (
    DecodeFromDisk,
    PromptFromDisk,
    decode_from_disk,
    median_of,
    prompt_from_disk,
)
from offload.measuring.grouped_sums import grouped_output_s
from offload.measuring.models import CACHED_TOKENS, CONTEXT_TOKENS, SIZES, loaded, measure_model, random_model, run_pass
from offload.measuring.reads import FileReads
from offload.moe.layer import ExpertsLayer
from offload.runtime import Runtime
from placement.hardware_profile import HardwareProfile, Overheads, Speeds
from placement.plan import Plan
from placement.planner import READER_THREADS, predicted
from placement.prediction import Prediction
from placement.workload import Workload
from profiler.subjects import WholePasses

DEPTHS = (6, 24)
"""Far apart, so that noise of either moves what a layer takes by little."""
QUICK_DEPTHS = (6,)
"""What does not grow with layers is counted as theirs."""
NARROW, _WIDE, _WIDE_DEPTH = 64, 512, 2
"""Of experts; layers of the model whose experts come from disk."""
SHORT_TOKENS, PROMPT_TOKENS = 32, 256
_TOKENS_OF_EXPERTS = SHORT_TOKENS * 8 // 16
_CACHES_NBYTES = 128 << 20
"""More than a processor's caches hold."""
ROUND_PASSES, ROUNDS = 6, 4
"""Of decode in a round at least, and rounds at most."""


@dataclass(frozen=True)
class Remainders:
    """Seconds of passes of one model beyond what the profile predicts of its parts.

    Attributes:
        decode_s: of a pass of one token.
        stepped_s: likewise where the runtime looks for experts in every layer, as it does when not all have a slot.
        short_s: of a pass of SHORT_TOKENS tokens, beside its experts as they were.
        prompt_s: likewise of PROMPT_TOKENS tokens.
    """

    decode_s: float
    stepped_s: float
    short_s: float = 0.0
    prompt_s: float = 0.0

    def at_known_speeds(self, now: Speeds) -> Remainders:
        """What they are where the machine is as fast as its profile says; `now` is how fast it was."""
        steps, prompts = now.of_steps, now.of_prompts
        return Remainders(
            steps * self.decode_s, steps * self.stepped_s, prompts * self.short_s, prompts * self.prompt_s
        )

    @classmethod
    def median_of(cls, found: Sequence[Remainders]) -> Remainders:
        """The median of each."""
        return cls(*(statistics.median(values) for values in zip(*map(astuple, found), strict=True)))


def measure_passes(
    profile: HardwareProfile,
    directory: Path,
    repeats: int,
    quant: str | None = None,
    speeds: Callable[[], Speeds] = Speeds,
    depths: tuple[int, ...] = DEPTHS,
) -> WholePasses:
    """The overheads that make predictions of the models' passes right, and how reads and kernels slow each other down.

    Args:
        profile: with overheads of zero.
        directory: for the experts; what is written there is removed.
        repeats: passes of decode; half as many of a short prompt, a third of a long one, two in a round at least.
        quant: format of the models' weights; None for bf16.
        speeds: how fast the machine is at the moment, over what `profile` says.
        depths: layers of the models with narrow experts, one or two; of one, all is counted as its layers'.
    """
    now, shallow, deep, (decode, prompts) = _remainders(profile, directory, repeats, quant, speeds, depths)
    overheads = replace(overheads_of(shallow, deep, depths), grouped_output_s=grouped_output_s())
    curve, disk = profile.with_speeds(now).cpu.expert(quant or BF16.name), profile.disk
    assert disk is not None
    hidden = SIZES["hidden_size"]
    expert_s = curve.without_call_s(3 * hidden * _WIDE, 1, hidden + 3 * _WIDE)
    arrival_s = decode.arrival_s(expert_s, curve.call_s, overheads.step_s / now.of_steps, disk.few)
    # Arrivals as they were, beside reads as they were: nobody would scale them with the processor alone.
    overheads = replace(overheads, step_arrival_s=arrival_s, arrival_s=prompts.arrival_s)
    return WholePasses(overheads, prompts.overlap)


def overheads_of(shallow: Remainders, deep: Remainders, depths: tuple[int, ...]) -> Overheads:
    """Overheads from what is left of passes of a shallow and of a deep model, the same one where there is one depth."""
    few, many = depths[0], depths[-1]
    layer_s = deep.decode_s / many if few == many else (deep.decode_s - shallow.decode_s) / (many - few)
    pass_s = max(0.0, shallow.decode_s - few * layer_s)
    step_s = max(0.0, deep.stepped_s - deep.decode_s) / many
    # A prompt's passes are long: of their differences little would be left but noise, and of few layers enough is seen.
    short, prompt = ((seconds - pass_s) / few for seconds in (shallow.short_s, shallow.prompt_s))
    elements = SHORT_TOKENS * SIZES["hidden_size"]
    # No more than all of the short pass's: noise must not leave less than nothing for the layer.
    element_s = min((prompt - short) / (PROMPT_TOKENS / SHORT_TOKENS - 1), short) / elements
    element_s = max(0.0, element_s)
    return Overheads(pass_s, layer_s, element_s, step_s, short - element_s * elements)


class _TimedDevice(HostDevice):
    """The host, which knows how long its experts took. A tape computes its own.

    Attributes:
        experts_s: how long.
        after: called after experts, and counted with them.
    """

    def __init__(self) -> None:
        self.experts_s = 0.0
        self.after: Callable[[], object] = lambda: None

    def run_experts(self, layer: ExpertsLayer, batch: ExpertBatch, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """See `Device.run_experts`."""
        before = perf_counter()
        super().run_experts(layer, batch, hidden, out)
        self.after()
        self.experts_s += perf_counter() - before


@dataclass
class _Passes:
    """A model with its runtime, and seconds of its passes by kind: of this round; those from disk of all.

    Attributes:
        forget: leaves nothing of it in the CPU's caches.
    """

    model: PreTrainedModel
    runtime: Runtime
    device: _TimedDevice
    disk: FileReads
    forget: Callable[[], object]
    decode: list[float] = field(default_factory=list)
    stepped: list[float] = field(default_factory=list)
    short: list[float] = field(default_factory=list)
    prompt: list[float] = field(default_factory=list)
    decode_from_disk: list[DecodeFromDisk] = field(default_factory=list)
    prompts_from_disk: list[PromptFromDisk] = field(default_factory=list)
    seeds: Iterator[int] = field(default_factory=itertools.count)

    def _read(self, block_nbytes: int, blocks: int) -> float:
        """Seconds of reading the model's own store alone: what it reads is as fresh as in its passes."""
        return self.disk.read(block_nbytes, READER_THREADS, blocks)

    def measure_prompts(self, repeats: int) -> None:
        """A round of prompts."""
        self.device.after = self.forget
        self.short = self._prompts(SHORT_TOKENS, max(2, repeats // 2))
        self.prompt = self._prompts(PROMPT_TOKENS, max(2, repeats // 3))

    def warm_up(self) -> None:
        """A model's first passes meet memory that is new to it."""
        for tokens in (SHORT_TOKENS, PROMPT_TOKENS):
            self._prompts(tokens, 1)

    def measure_prompts_from_disk(self, repeats: int, call_s: float) -> None:
        """A round; `call_s` is what a call of experts takes whatever its size."""
        for _ in range(max(2, repeats // 4)):
            run = partial(self._prompts, SHORT_TOKENS, 1)
            self.prompts_from_disk.append(
                prompt_from_disk(self.runtime, self.device, run, _TOKENS_OF_EXPERTS, call_s, self._read)
            )

    @torch.no_grad()
    def measure_decode_from_disk(self, repeats: int) -> None:
        """A round."""
        cache = DynamicCache(config=self.model.config)
        run_pass(self.model, cache, torch.ones(1, CACHED_TOKENS, dtype=torch.int64))
        # What arriving takes is what is left of two times that are alike: of few of them mostly noise would be left.
        for number in range(max(3, repeats // 2)):
            run = partial(run_pass, self.model, cache, torch.tensor([[number]]))
            self.decode_from_disk.append(decode_from_disk(self.runtime, run, self._read))

    def measure_decode(self, repeats: int) -> None:
        """A round of decode."""
        self.decode = measure_model(self.model, 1, repeats, before=self.forget)
        # While routing is recorded every layer looks for its experts.
        self.runtime.record_trace()
        self.stepped = measure_model(self.model, 1, repeats, before=self.forget)
        self.runtime.observer.recorder = None

    def _prompts(self, tokens: int, repeats: int) -> list[float]:
        """Seconds of prompts without their experts."""
        found = []
        for _ in range(repeats):
            self.device.experts_s = 0.0
            (seconds,) = measure_model(self.model, tokens, 1, next(self.seeds), self.forget)
            found.append(seconds - self.device.experts_s)
        return found

    def remainders(self, profile: HardwareProfile) -> Remainders:
        """Medians of this round, less what is predicted."""
        decode_s = _predicted(profile, self.runtime, CACHED_TOKENS).decode.seconds
        decode = statistics.median(self.decode) - decode_s, statistics.median(self.stepped) - decode_s
        if not self.short:
            return Remainders(*decode)
        return Remainders(
            *decode,
            statistics.median(self.short) - _beside_experts_s(profile, self.runtime, SHORT_TOKENS),
            statistics.median(self.prompt) - _beside_experts_s(profile, self.runtime, PROMPT_TOKENS),
        )


def _remainders(
    profile: HardwareProfile,
    directory: Path,
    repeats: int,
    quant: str | None,
    speeds: Callable[[], Speeds],
    depths: tuple[int, ...],
) -> tuple[Speeds, Remainders, Remainders, tuple[DecodeFromDisk, PromptFromDisk]]:
    """(speeds, remainders of the shallow model, of the deep one, (decode, prompts) of one with wide experts from disk).

    Models take turns, and the machine is probed before and after what a round's remainders come from, so that what
    others do on it meanwhile is in all of them: they are those of a machine at the profile's speeds. Prompts are the
    shallow one's alone.
    """
    with ExitStack() as stack:
        load_one = partial(_loaded, stack, directory, quant, torch.ones(_CACHES_NBYTES // 4).sum)
        narrow = [load_one(layers, NARROW) for layers in depths]
        wide = load_one(_WIDE_DEPTH, _WIDE)
        tight = load_one(_WIDE_DEPTH, _WIDE, beside=wide.runtime.plan)
        call_s = profile.cpu.expert(wide.runtime.plan.format).call_s
        narrow[0].warm_up()
        found: list[Speeds] = []
        left: list[list[Remainders]] = []
        rounds = max(1, min(ROUNDS, repeats // ROUND_PASSES))
        each = max(3, repeats // rounds)
        after = speeds()
        for _ in range(rounds):
            before = after
            for passes in narrow:
                passes.measure_decode(each)
            narrow[0].measure_prompts(each)
            after = speeds()
            found.append(Speeds.median_of([before, after]))
            scaled = profile.with_speeds(found[-1])
            left.append([passes.remainders(scaled).at_known_speeds(found[-1]) for passes in (narrow[0], narrow[-1])])
            wide.measure_prompts_from_disk(each, call_s)
            tight.measure_decode_from_disk(each)
        shallow, deep = (Remainders.median_of(of_one) for of_one in zip(*left, strict=True))
        from_disk = median_of(tight.decode_from_disk), median_of(wide.prompts_from_disk)
        return Speeds.median_of(found), shallow, deep, from_disk


def _loaded(
    stack: ExitStack, directory: Path, quant: str | None, forget: Callable[[], object], layers: int, width: int,
    beside: Plan | None = None,
) -> _Passes:  # fmt: skip
    """A model with a slot for every expert; or, beside the plan of such a one, with few more than a token needs."""
    ram = 4 << 30
    if beside is not None:
        slots = min(beside.ram_slots - 1, layers * SIZES["num_experts_per_tok"] + 2)
        ram = beside.peak_ram_nbytes - (beside.ram_slots - slots) * beside.slot_nbytes
    model, runtime = loaded(stack, directory, random_model(layers, width), ram, quant=quant)
    runtime.device = device = _TimedDevice()
    return _Passes(model, runtime, device, FileReads(runtime.store.shard_paths), forget)


def _predicted(profile: HardwareProfile, runtime: Runtime, prompt_tokens: int) -> Prediction:
    workload = Workload(CONTEXT_TOKENS, prompt_tokens=prompt_tokens, new_tokens=2)
    return predicted(runtime.spec, profile, runtime.plan.ram_slots, workload)


def _beside_experts_s(profile: HardwareProfile, runtime: Runtime, prompt_tokens: int) -> float:
    terms = _predicted(profile, runtime, prompt_tokens).prefill.terms
    return terms.total_s - terms.cpu_experts_s
