"""What passes take beyond their parts where everything is in an accelerator's memory: see `calibration`.

Waiting for the device in every layer, to learn the routing, and outputs of experts that come back are in it.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from offload.measuring import calibration
from offload.measuring.calibration import Remainders, overheads_of
from offload.measuring.models import CACHED_TOKENS, CONTEXT_TOKENS, loaded, measure_model, random_model
from offload.runtime import Runtime
from placement.hardware_profile import HardwareProfile, Overheads
from placement.planner import predicted
from placement.prediction import Prediction
from placement.workload import Workload
from profiler.timing import settle

_RAM_NBYTES = 4 << 30


def measure_accelerated_passes(
    profile: HardwareProfile,
    directory: Path,
    device: str,
    repeats: int,
    quant: str | None = None,
    depths: tuple[int, ...] = calibration.DEPTHS,
) -> Overheads:
    """The overheads that make predictions of the models' passes right. None are of experts that are missing.

    Args:
        profile: with the accelerator, whose overheads are zero.
        directory: for the experts; what is written there is removed.
        device: as `offload.load` takes it.
        repeats: passes of decode; an eighth as many of a prompt, two in a round at least.
        quant: format of the models' weights; None for bf16.
        depths: layers of the models, one or two; of one, all is counted as its layers'.

    Raises:
        ValueError: the accelerator's memory does not hold the models.
        DoesNotFitError, DeviceError: as `offload.load`.
    """
    with ExitStack() as stack:
        models = [_loaded(stack, directory, device, layers, quant) for layers in depths]
        rounds = max(1, min(calibration.ROUNDS, repeats // calibration.ROUND_PASSES))
        each = max(3, repeats // rounds)
        prompts = max(2, each // 8)
        # Every shape of every model before any is timed: what one compiles or plans may slow another down.
        for passes in models:
            settle(partial(measure_model, passes.model, 1, each))
        for tokens in (calibration.SHORT_TOKENS, calibration.PROMPT_TOKENS):
            settle(partial(_prompts, models[0].model, tokens, prompts))
        for _ in range(rounds):
            for passes in models:
                passes.decode += measure_model(passes.model, 1, each)
            models[0].measure_prompts(prompts)
        return overheads_of(models[0].remainders(profile), models[-1].remainders(profile), depths)


@dataclass
class _Passes:
    """A model with its runtime, and seconds of its passes by kind."""

    model: PreTrainedModel
    runtime: Runtime
    decode: list[float] = field(default_factory=list)
    short: list[float] = field(default_factory=list)
    prompt: list[float] = field(default_factory=list)

    def measure_prompts(self, repeats: int) -> None:
        """A round of prompts."""
        for tokens, found in ((calibration.SHORT_TOKENS, self.short), (calibration.PROMPT_TOKENS, self.prompt)):
            found += _prompts(self.model, tokens, repeats, seed=len(found))

    def remainders(self, profile: HardwareProfile) -> Remainders:
        """Medians, less what is predicted."""
        decode_s = statistics.median(self.decode) - self._predicted(profile, CACHED_TOKENS).decode.seconds
        if not self.short:
            return Remainders(decode_s, decode_s)
        short_s, prompt_s = (
            statistics.median(found) - self._predicted(profile, tokens).prefill.seconds
            for tokens, found in ((calibration.SHORT_TOKENS, self.short), (calibration.PROMPT_TOKENS, self.prompt))
        )
        return Remainders(decode_s, decode_s, short_s, prompt_s)

    def _predicted(self, profile: HardwareProfile, prompt_tokens: int) -> Prediction:
        plan = self.runtime.plan
        workload = Workload(CONTEXT_TOKENS, prompt_tokens=prompt_tokens, new_tokens=2)
        return predicted(self.runtime.spec, profile, plan.ram_slots, workload, vram=plan.vram)


def _prompts(model: PreTrainedModel, tokens: int, repeats: int, seed: int = 0) -> list[float]:
    """Seconds of prompts, each another one, routed otherwise."""
    return [measure_model(model, tokens, 1, seed=seed + number)[0] for number in range(repeats)]


def _loaded(stack: ExitStack, directory: Path, device: str, layers: int, quant: str | None) -> _Passes:
    """A model with everything above."""
    made = random_model(layers, calibration.NARROW)
    model, runtime = loaded(stack, directory, made, _RAM_NBYTES, quant=quant, device=device)
    vram = runtime.plan.vram
    if vram is None or vram.window_layers or vram.slots < runtime.plan.expert_count:
        raise ValueError(f"{device} has no room for a model of {layers} layers with everything in its memory")
    return _Passes(model, runtime)
