"""Routing traces of the trained tiny model on several kinds of text."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from examples.tiny_moe.corpus import read_documents
from prefetch.policies.geometry import Geometry
from prefetch.traces.trace import RoutingTrace

MODEL = Path(__file__).resolve().parents[1] / "examples" / "tiny_moe" / "model"


def tiny_model_traces(prompt_tokens: int, new_tokens: int) -> Iterator[RoutingTrace]:
    """One trace for each kind of text: held-out sources and documentation, both in turn, and the model's own writing.

    A token's routing depends only on the tokens before it, so one pass over a text gives the routing of a prefill
    and of decoding what follows.
    """
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    held_out = [document for document in read_documents() if document.held_out]
    code = [document.text for document in held_out if document.name.endswith(".py")]
    prose = [document.text for document in held_out if document.name.startswith("topics/")]
    random.Random(0).shuffle(code)
    length = prompt_tokens + new_tokens
    kinds = {
        "Python source": _tokens(tokenizer, code, length, piece=length),
        "documentation": _tokens(tokenizer, prose, length, piece=length),
        "source and documentation in turn": _tokens(
            tokenizer, [text for pair in zip(code, prose, strict=False) for text in pair], length, piece=96
        ),
    }
    for name, tokens in kinds.items():
        yield record(model, tokens, prompt_tokens, f"tiny model, {name}")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prompt = torch.tensor([kinds["Python source"][:prompt_tokens]])
        written = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=True, temperature=0.7, top_p=0.9,
        )  # fmt: skip
    yield record(model, written[0].tolist(), prompt_tokens, "tiny model, its own writing")


def _tokens(tokenizer: Any, texts: list[str], length: int, piece: int) -> list[int]:
    """Texts one after another, `piece` tokens of each at most, `length` in all."""
    found: list[int] = []
    for text in texts:
        found += tokenizer(text[: 16 * piece])["input_ids"][:piece]
        if len(found) >= length:
            return found[:length]
    raise ValueError(f"{len(found)} tokens of held-out text, {length} wanted")


@torch.no_grad()
def record(model: PreTrainedModel, tokens: list[int], prompt_tokens: int, name: str) -> RoutingTrace:
    """The trace of a prefill of `prompt_tokens` and of decoding the other tokens one by one."""
    logits = model(input_ids=torch.tensor([tokens]), output_router_logits=True).router_logits
    probabilities = torch.stack([layer.float().softmax(-1) for layer in logits], dim=1)  # [tokens, layers, experts]
    top_k = int(model.config.num_experts_per_tok)
    chosen = probabilities.topk(top_k, dim=-1).indices.to(torch.int32).numpy().astype(np.uint16)
    means = torch.cat([probabilities[:prompt_tokens].mean(0, keepdim=True), probabilities[prompt_tokens:]])
    new_tokens = len(tokens) - prompt_tokens
    return RoutingTrace(
        name,
        Geometry.uniform(probabilities.shape[1], probabilities.shape[2]),
        top_k,
        np.array([prompt_tokens] + [1] * new_tokens, np.int32),
        np.array([True] + [False] * new_tokens, np.bool_),
        chosen,
        means.half().numpy(),
    )
