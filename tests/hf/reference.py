"""transformers itself as the reference: the same checkpoint, everything in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

# fp32: largest difference of logits relative to the largest logit; only the order of sums differs.
FP32_TOLERANCE = 1e-5

# 16 bits: where a router nearly ties, rounding alone sends a token to another expert, and transformers' own experts
# implementations differ from each other by as much as from fp32. What can be asked is to be as near to fp32 as
# transformers is: mean error over all logits at most so many times the reference's.
HALF_ERROR_RATIO = 1.25


def reference_model(directory: Path, dtype: torch.dtype, implementation: str = "eager") -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, experts_implementation=implementation)
    return model.eval()  # type: ignore[no-any-return]


def flat(out: Any) -> list[torch.Tensor]:
    """All tensors of an output but for its cache's."""
    if isinstance(out, torch.Tensor):
        return [out]
    parts = out if isinstance(out, (tuple, list)) else out.to_tuple() if hasattr(out, "to_tuple") else ()
    return [tensor for part in parts for tensor in flat(part)]


def prompt(batch: int = 1, tokens: int = 17, seed: int = 0, vocab: int = 99) -> torch.Tensor:
    return torch.randint(2, vocab, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def greedy(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int = 16, **options: Any) -> torch.Tensor:
    out = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, **options)
    assert isinstance(out, torch.Tensor)
    return out


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found.float()


class PaddedBatch:
    """Two sequences, also with the first tokens of one masked, and what transformers makes of them in fp32."""

    def __init__(self, directory: Path, new_tokens: int = 16) -> None:
        reference = reference_model(directory, torch.float32)
        self._ids, self._new_tokens = prompt(batch=2), new_tokens
        self._mask = torch.ones_like(self._ids)
        self._mask[0, :5] = 0
        self._logits = logits(reference, self._ids)
        self._tokens = self._generated(reference)

    def checked_logits(self, model: PreTrainedModel) -> torch.Tensor:
        """The model's logits, which are transformers' but for the order of sums."""
        found = logits(model, self._ids)
        assert_logits_close(found, self._logits)
        return found

    def check_tokens(self, model: PreTrainedModel) -> None:
        """The model's greedy tokens are transformers'."""
        for found, expected in zip(self._generated(model), self._tokens, strict=True):
            assert torch.equal(found, expected)

    def _generated(self, model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
        masked = greedy(model, self._ids, self._new_tokens, attention_mask=self._mask)
        return greedy(model, self._ids, self._new_tokens), masked


def assert_logits_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    bound = FP32_TOLERANCE * expected.abs().max().item()
    worst = (found - expected).abs().max().item()
    assert torch.isfinite(found).all()
    assert worst <= bound, f"logits differ by {worst:.3g}, allowed {bound:.3g}"


def assert_as_near_to_fp32(found: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor) -> None:
    """`found` is as near to the fp32 logits as transformers' own in the same dtype."""
    assert torch.isfinite(found).all()
    error, allowed = (found - exact).abs().mean().item(), HALF_ERROR_RATIO * (reference - exact).abs().mean().item()
    assert error <= allowed, f"mean error against fp32 {error:.3g}, allowed {allowed:.3g}"


def assert_same_up_to_near_ties(
    found: torch.Tensor, reference: PreTrainedModel, exact: PreTrainedModel, prompt_tokens: int
) -> None:
    """Each token of `found` is the reference's choice for the same prefix, or as good within the reference's error.

    Args:
        found: [1, prompt + new] of the model under test.
        reference: transformers in the dtype under test; chooses by the same prefix.
        exact: transformers in fp32; its largest distance from `reference` in this text says what a near-tie is.
        prompt_tokens: tokens of `found` that were given.
    """
    scores, truth = logits(reference, found)[0], logits(exact, found)[0]
    near = 2 * (scores - truth).abs().max().item()
    for position in range(prompt_tokens - 1, found.shape[1] - 1):
        row = scores[position]
        gap = (row.max() - row[found[0, position + 1]]).item()
        assert gap <= near, f"token {position + 1}: {gap:.3g} below the reference's choice, a near-tie is {near:.3g}"
