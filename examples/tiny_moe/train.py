"""Train the example model: `python -m examples.tiny_moe.train --minutes 75 --threads 1`."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import tokenizers
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from examples.tiny_moe.corpus import MAX_POSITIONS, encode, read_documents, train_tokenizer

VOCAB, CONTEXT, SEQUENCES = 2048, 512, 8
MICRO_SEQUENCES = 4
"""Sequences per backward pass; keeps every activation below 32 MiB, where glibc starts to map and unmap each block."""
PEAK_LR, FLOOR_LR, WARMUP_STEPS = 2e-3, 5e-5, 60
BALANCE = 0.003
"""Weight of the load-balancing loss: enough that no expert dies, too little to make the routing uniform."""
CHECKPOINT_SECONDS = 300.0
VALIDATE_STEPS = 100


@dataclass
class Progress:
    """What a run has done so far; `seconds` counts training only, over all its restarts."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


def model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
    """About 11 M parameters, of which 4 M work on a token."""
    undeclared: dict[str, Any] = {"head_dim": 32}  # no field of the class, yet part of every Qwen3-MoE configuration
    return Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        router_aux_loss_coef=BALANCE,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
        **undeclared,
    )


def windows(tokens: NDArray[np.int64], seed: int) -> Iterator[Tensor]:
    """Endless batches of shape (SEQUENCES, CONTEXT + 1), every epoch shuffled and cut at another offset."""
    generator = np.random.default_rng(seed)
    while True:
        starts = np.arange(generator.integers(CONTEXT), len(tokens) - CONTEXT - 1, CONTEXT)
        generator.shuffle(starts)
        for i in range(0, len(starts) - SEQUENCES + 1, SEQUENCES):
            yield torch.from_numpy(np.stack([tokens[s : s + CONTEXT + 1] for s in starts[i : i + SEQUENCES]]))


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Mean over layers of E * sum_e(share of choices_e * mean probability_e): 1 when every expert is used alike."""
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        experts = logits.shape[-1]
        chosen = torch.bincount(probabilities.topk(top_k, dim=-1).indices.flatten(), minlength=experts)
        losses.append(experts * (chosen / chosen.sum() * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def learning_rate(step: int, done: float) -> float:
    """Linear warmup by steps, then a cosine over `done`, the share of the time budget that is used up."""
    cosine = FLOOR_LR + (PEAK_LR - FLOOR_LR) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return cosine * min(1.0, (step + 1) / WARMUP_STEPS)


@torch.no_grad()
def validate(model: Qwen3MoeForCausalLM, tokens: NDArray[np.int64], limit: int | None = None) -> tuple[float, Tensor]:
    """Mean loss in nats per token over consecutive windows, and how often each (layer, expert) was chosen."""
    model.eval()
    total, count = 0.0, 0
    config = model.config
    chosen = torch.zeros(config.num_hidden_layers, config.num_experts, dtype=torch.int64)
    for start in range(0, len(tokens) - CONTEXT, CONTEXT)[:limit]:
        window = torch.from_numpy(tokens[start : start + CONTEXT + 1])[None]
        output = model.model(window[:, :-1], use_cache=False, output_router_logits=True)
        logits = model.lm_head(output.last_hidden_state).float()
        total += F.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
        count += window.shape[1] - 1
        for layer, router in enumerate(output.router_logits):
            ids = router.float().topk(config.num_experts_per_tok, dim=-1).indices
            chosen[layer] += torch.bincount(ids.flatten(), minlength=config.num_experts)
    model.train()
    return total / count, chosen


class Trainer:
    """Weights, optimizer and progress of one run: the model computes in bf16, the optimizer keeps fp32 weights."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        self.model = Qwen3MoeForCausalLM._from_config(config, experts_implementation="grouped_mm", dtype=torch.float32)
        self.master = [p.detach().clone().requires_grad_() for p in self.model.parameters()]
        self.model = self.model.bfloat16()
        decayed = [p for p in self.master if p.ndim > 1]
        plain = [p for p in self.master if p.ndim == 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": 0.1},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)
        self.progress = Progress()

    def step(self, batch: Tensor, lr: float) -> tuple[float, float]:
        """One update; returns the cross-entropy in nats per token and the balance loss."""
        parts = batch.split(MICRO_SEQUENCES)
        losses = [self._backward(part, 1 / len(parts)) for part in parts]
        torch.nn.utils.clip_grad_norm_(self.master, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.publish()
        return sum(loss for loss, _ in losses) / len(parts), sum(balance for _, balance in losses) / len(parts)

    def _backward(self, batch: Tensor, weight: float) -> tuple[float, float]:
        """Add `weight` times the gradients of this batch to the master weights' gradients, in fp32."""
        output = self.model.model(batch[:, :-1], use_cache=False, output_router_logits=True)
        logits = self.model.lm_head(output.last_hidden_state).float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        balance = balance_loss(output.router_logits, self.model.config.num_experts_per_tok)
        (weight * (loss + BALANCE * balance)).backward()
        for master, parameter in zip(self.master, self.model.parameters(), strict=True):
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None
        return loss.item(), balance.item()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the master weights into the model."""
        for master, parameter in zip(self.master, self.model.parameters(), strict=True):
            parameter.copy_(master)

    def save(self, path: Path) -> None:
        """Write everything needed to go on; a crash leaves the previous file whole."""
        state = {
            "master": [p.detach() for p in self.master],
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    @torch.no_grad()
    def resume(self, path: Path) -> None:
        """Read back what `save` wrote."""
        state = torch.load(path, weights_only=True)
        for master, saved in zip(self.master, state["master"], strict=True):
            master.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        self.publish()


def train(
    trainer: Trainer,
    tokens: NDArray[np.int64],
    held_out: NDArray[np.int64],
    minutes: float,
    seed: int,
    checkpoint: Callable[[], None],
) -> None:
    """Train until `minutes` of training time are used up; calls `checkpoint` every few minutes and at the end."""
    progress = trainer.progress
    batches = windows(tokens, seed + progress.step)
    start, saved = time.monotonic() - progress.seconds, progress.seconds
    smoothed = math.nan
    while progress.seconds < 60 * minutes:
        batch = next(batches)
        lr = learning_rate(progress.step, progress.seconds / (60 * minutes))
        loss, balance = trainer.step(batch, lr)
        smoothed = loss if math.isnan(smoothed) else 0.95 * smoothed + 0.05 * loss
        progress.step += 1
        progress.tokens += batch.shape[0] * CONTEXT
        progress.seconds = time.monotonic() - start
        if progress.step % VALIDATE_STEPS == 0:
            validation, _ = validate(trainer.model, held_out, limit=48)
            point = {"step": progress.step, "train": round(smoothed, 4), "validation": round(validation, 4)}
            progress.curve.append(point)
            speed = progress.tokens / progress.seconds
            click.echo(
                f"{point} lr {lr:.2e} balance {balance:.2f} {speed:.0f} tokens/s {progress.seconds / 60:.1f} min"
            )
        if progress.seconds - saved > CHECKPOINT_SECONDS:
            saved = progress.seconds
            checkpoint()
    checkpoint()


def write_model(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Weights, configuration and tokenizer, as `from_pretrained` reads them."""
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**{f"{name}_token_id": value for name, value in ids.items()})
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def expert_usage(chosen: Tensor) -> list[dict[str, float]]:
    """Per layer: perplexity of the expert choice (16 = all alike), share of the most and of the least used expert."""
    share = chosen / chosen.sum(-1, keepdim=True)
    perplexity = torch.special.entr(share).sum(-1).exp()
    rows = zip(perplexity.tolist(), share.amax(-1).tolist(), share.amin(-1).tolist(), strict=True)
    return [{"perplexity": round(p, 2), "most_used": round(a, 4), "least_used": round(b, 4)} for p, a, b in rows]


@click.command()
@click.option("--minutes", default=75.0, show_default=True, help="Training time; the learning rate follows it.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", default=Path(__file__).parent / "model", type=click.Path(path_type=Path), help="Final model.")
@click.option("--run-dir", default=Path("tiny_moe_run"), type=click.Path(path_type=Path), help="Checkpoints; resumed.")
def main(minutes: float, threads: int, seed: int, out: Path, run_dir: Path) -> None:
    """Train a small Qwen3-MoE on the standard library's sources and the language reference."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    run_dir.mkdir(parents=True, exist_ok=True)
    documents = read_documents()
    kept = [d for d in documents if not d.held_out]
    held = [d for d in documents if d.held_out]
    tokenizer = train_tokenizer((d.text for d in kept), VOCAB)
    train_tokens, held_out = encode(kept, tokenizer), encode(held, tokenizer)
    held_bytes = sum(len(d.text.encode()) for d in held)
    trainer = Trainer(model_config(tokenizer))
    if (run_dir / "checkpoint.pt").exists():
        trainer.resume(run_dir / "checkpoint.pt")
    parameters = sum(p.numel() for p in trainer.master)
    click.echo(f"{parameters / 1e6:.2f} M parameters, {len(train_tokens)} + {len(held_out)} tokens")

    def checkpoint() -> None:
        trainer.save(run_dir / "checkpoint.pt")
        write_model(trainer.model, tokenizer, run_dir / "model")

    train(trainer, train_tokens, held_out, minutes, seed, checkpoint)
    loss, chosen = validate(trainer.model, held_out)
    write_model(trainer.model, tokenizer, out)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    log = {
        "parameters": parameters,
        "train_tokens": len(train_tokens),
        "validation_tokens": len(held_out),
        "validation_bytes": held_bytes,
        "validation_nats_per_token": round(loss, 4),
        "validation_bits_per_byte": round(loss * len(held_out) / held_bytes / math.log(2), 4),
        "expert_usage": expert_usage(chosen),
        "threads": threads,
        "seed": seed,
        "versions": versions,
        **asdict(trainer.progress),
    }
    (out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
    click.echo(json.dumps({k: v for k, v in log.items() if k != "curve"}, indent=1))


if __name__ == "__main__":
    main()
