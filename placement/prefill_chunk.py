"""How many prompt tokens go through the model at once: as many as it takes to compute behind what is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from placement.plan import Plan
from placement.planner import PlanInfeasibleError
from placement.workload import Workload

SMALLEST_CHUNK_TOKENS = 128

_WITHIN = 1.02
"""What is predicted to take so much longer than the least is as good; the smallest such chunk is taken."""


def choose_chunk(workload: Workload, make: Callable[[Workload], Plan]) -> Workload:
    """The workload with the chunk that is predicted to do best.

    Each chunk of a prompt reads nearly all experts that have no slot. A layer's reads hide behind its products as far
    as these take as long (SARATHI, arXiv 2308.16369, sizes chunks by what they hide too), so a longer chunk reads less
    often, and takes activations that expert slots go without.

    Args:
        workload: its own chunk does not matter. Judged by a prompt as long as the context and its new tokens.
        make: the plan of a workload, with a prediction.

    Raises:
        PlanInfeasibleError: not even the smallest chunk fits.
        ValueError: a plan has no prediction.
    """
    longest = workload.context_tokens
    sizes, size = [], min(SMALLEST_CHUNK_TOKENS, longest)
    while size < longest:
        sizes.append(size)
        size *= 2
    judged = replace(workload, prompt_tokens=longest)
    seconds: dict[int, float] = {}
    for size in (*sizes, longest):
        try:
            plan = make(replace(judged, prefill_chunk_tokens=size))
        except PlanInfeasibleError:
            if not seconds:
                raise
            # Longer chunks take more.
            break
        if plan.prediction is None:
            raise ValueError("a plan without a prediction does not say which chunk is best")
        prompt, token = plan.prediction.prefill.terms.total_s, plan.prediction.decode.terms.total_s
        seconds[size] = prompt + workload.new_tokens * token
    least = min(seconds.values())
    best = next(size for size, total_s in seconds.items() if total_s <= _WITHIN * least)
    return replace(workload, prefill_chunk_tokens=best)
