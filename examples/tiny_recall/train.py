"""Train the recall model: `python -m examples.tiny_recall.train --minutes 4 --threads 1`."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
import transformers
from torch.nn import functional as F
from transformers import GenerationConfig, Qwen2MoeConfig, Qwen2MoeForCausalLM

from examples.tiny_recall.task import FILLERS, VOCAB, Lesson, make_lesson

REACH = 20_000
"""Largest distance of the lessons; contexts may be as long."""

PEAK_LR, WARMUP_STEPS = 3e-3, 50
LOOK_BACK, BIAS_DECAY, COPIED, QUIET, SHARPNESS, STEADY_ANGLE = 10.0, 0.8, 0.125, 0.05, 2.0, 1e-2
REPORT_STEPS = 100


class Stage(NamedTuple):
    """A part of the training.

    Attributes:
        until: share of the time at which it ends.
        sequences: of a step.
        tokens: of a context.
        facts: of a context, at most.
        questions: after it.
        reach: the largest position is about this, or the length where that is more.
    """

    until: float
    sequences: int
    tokens: int
    facts: int
    questions: int
    reach: int


STAGES = (
    Stage(0.1, 32, 24, 10, 16, 0),
    Stage(0.3, 32, 64, 24, 32, REACH),
    Stage(0.6, 8, 384, 64, 64, REACH),
    Stage(1.0, 2, 1920, 128, 128, REACH),
)
"""From few facts close by to many far away."""


def model_config() -> Qwen2MoeConfig:
    """Two layers, as recall takes: one looks at the token before, one for the key that was asked for."""
    undeclared: dict[str, Any] = {"head_dim": 64}
    return Qwen2MoeConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        shared_expert_intermediate_size=64,
        max_position_embeddings=2 * REACH,
        # Half of a head's channels turn by less than a radian over the whole reach: keys are found at any distance.
        rope_parameters={"rope_type": "default", "rope_theta": 1e8},
        initializer_range=0.125,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype="float32",
        **undeclared,
    )


@torch.no_grad()
def begin_with_induction(model: Qwen2MoeForCausalLM, generator: torch.Generator) -> None:
    """Begin near the circuit that recall takes (an induction head), which a few minutes do not find by themselves.

    First layer: heads look at the token before, for the biases of keys are the same vector as those of queries, turned
    by one position; they copy it, rotated by a random matrix, to the value. Second layer: a key looks for itself in
    that copy, with channels that hardly turn and to which fillers give little, and copies the value. Training makes
    this exact, and sharp at any distance.
    """
    config: Any = model.config
    hidden, width = config.hidden_size, model.model.layers[0].self_attn.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    angles = config.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2) / width)
    copied, values, keys = (torch.linalg.qr(torch.randn(hidden, hidden, generator=generator))[0] for _ in range(3))

    before: Any = model.model.layers[0].self_attn
    length = LOOK_BACK * BIAS_DECAY ** torch.arange(width // 2)
    before.k_proj.bias.copy_(torch.cat([length, torch.zeros(width // 2)]).repeat(config.num_key_value_heads))
    turned = torch.cat([length * torch.cos(angles), -length * torch.sin(angles)])
    before.q_proj.bias.copy_(turned.repeat(config.num_attention_heads))
    for projection in (before.q_proj, before.k_proj):
        projection.weight.mul_(0.1)
    before.v_proj.weight.copy_(values)
    before.o_proj.weight.copy_(_per_head(COPIED * copied @ values.mT, width, group))

    match: Any = model.model.layers[1].self_attn
    steady = (angles < STEADY_ANGLE).float().repeat(2).repeat(config.num_key_value_heads)[:, None]
    wanted = SHARPNESS * steady * keys
    fillers = torch.linalg.qr(model.model.embed_tokens.weight[-FILLERS:].T)[0]
    telling = torch.eye(hidden) - fillers @ fillers.T
    match.q_proj.weight.copy_(wanted.unflatten(0, (-1, width)).repeat_interleave(group, 0).flatten(0, 1))
    match.k_proj.weight.copy_(wanted @ telling @ copied.mT @ telling)
    match.v_proj.weight.copy_(values)
    match.o_proj.weight.copy_(_per_head(2 * COPIED * values.mT, width, group))
    for name, weight in model.named_parameters():
        if "down_proj" in name:
            weight.mul_(QUIET)


def _per_head(weight: torch.Tensor, width: int, group: int) -> torch.Tensor:
    """An output projection [hidden, Hk width] for query heads, each with its part of what its key-value head gives."""
    heads: torch.Tensor = weight.unflatten(1, (-1, width)) / group
    return heads.repeat_interleave(group, 1).flatten(1)


def step_loss(model: Qwen2MoeForCausalLM, lesson: Lesson) -> tuple[torch.Tensor, float]:
    """Cross-entropy in nats per answer, and the share of right answers."""
    # Without a mask, gaps between positions would be taken for ends of sequences.
    mask = torch.ones_like(lesson.ids)
    output = model.model(lesson.ids, mask, position_ids=lesson.positions, use_cache=False)
    hidden = output.last_hidden_state
    asked = lesson.targets >= 0
    logits, targets = model.lm_head(hidden[asked]), lesson.targets[asked]
    return F.cross_entropy(logits, targets), float((logits.argmax(-1) == targets).float().mean())


def train(model: Qwen2MoeForCausalLM, minutes: float, seed: int) -> dict[str, Any]:
    """Train for so long; what happened."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    start, step, seen, curve = time.monotonic(), 0, 0, []
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        stage = next(one for one in STAGES if done < one.until)
        lesson = make_lesson(stage.sequences, stage.tokens, stage.facts, stage.questions, stage.reach, generator)
        rate = PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - 0.95 * done)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, right = step_loss(model, lesson)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, seen = step + 1, seen + lesson.ids.numel()
        if step % REPORT_STEPS == 0:
            point = {"step": step, "tokens": stage.tokens, "loss": round(loss.item(), 4), "right": round(right, 4)}
            curve.append(point)
            click.echo(f"{point} {time.monotonic() - start:.0f} s")
    return {"steps": step, "tokens": seen, "minutes": minutes, "seed": seed, "curve": curve}


@click.command()
@click.option("--minutes", default=4.0, show_default=True, help="Training time; stages and learning rate follow it.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", default=Path(__file__).parent / "model", type=click.Path(path_type=Path), help="Final model.")
def main(minutes: float, threads: int, seed: int, out: Path) -> None:
    """Train a small Qwen2-MoE to recall values by their keys."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = Qwen2MoeForCausalLM(model_config())
    begin_with_induction(model, torch.Generator().manual_seed(seed))
    log = train(model, minutes, seed)
    model.generation_config = GenerationConfig()
    model.bfloat16().save_pretrained(out)
    log |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": threads,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()
