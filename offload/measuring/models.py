"""Small models with random weights, and seconds of their passes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from offload.loading import load
from offload.runtime import Runtime

CONTEXT_TOKENS = 512
CACHED_TOKENS = 32
SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1024,
    "num_experts": 16,
    "num_experts_per_tok": 8,
    "max_position_embeddings": CONTEXT_TOKENS,
    "norm_topk_prob": True,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


def loaded(
    stack: ExitStack, directory: Path, made: PreTrainedModel, ram_nbytes: int, **options: Any
) -> tuple[PreTrainedModel, Runtime]:
    """A model through the runtime, with its experts in a store under a directory; both are gone when the stack ends.

    Args:
        stack: ends them.
        directory: of the store.
        made: the model; it is taken apart.
        ram_nbytes: what it may take.
        options: of `offload.load`.
    """
    store = stack.enter_context(TemporaryDirectory(prefix=".offload-profile-", dir=directory))
    model = load(made, ram=ram_nbytes, nvme=store, context=CONTEXT_TOKENS, progress=False, **options)
    runtime = cast("Runtime", model.offload)
    stack.callback(runtime.close)
    return model, runtime


def random_model(layers: int, width: int, sizes: dict[str, Any] | None = None) -> PreTrainedModel:
    """A model of `layers` layers with experts of `width`, on the CPU; of SIZES, or of others.

    Made without weights and filled from one block: drawing each of them takes longer than measuring.
    """
    sizes = SIZES if sizes is None else sizes
    config = AutoConfig.for_model("qwen3_moe", num_hidden_layers=layers, moe_intermediate_size=width, **sizes)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    decoder: Any = model.get_decoder()
    # Its buffers are computed, not stored.
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config)
    generator = torch.Generator().manual_seed(1)
    block = 0.02 * torch.randn(1 << 20, generator=generator)
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        if parameter.dim() < 2:
            flat.fill_(1.0)
            continue
        # Each begins elsewhere in the block: routers and experts that are alike would send all tokens the same way.
        start = int(torch.randint(len(block), (1,), generator=generator))
        for first in range(0, len(flat), len(block)):
            part = flat[first : first + len(block)]
            part.copy_(block.roll(-start - 7919 * (first // len(block)))[: len(part)])
    model.eval()
    return model


@torch.no_grad()
def measure_model(
    model: PreTrainedModel, tokens: int, repeats: int, seed: int = 2, before: Callable[[], object] = lambda: None
) -> list[float]:
    """Seconds of passes: of one token one after the other in a sequence, after a first that does not count; of more
    tokens each of a new one. `before` is called before each.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab = model.config.get_text_config().vocab_size
    found = []
    cache = DynamicCache(config=model.config)
    if tokens == 1:
        run_pass(model, cache, torch.randint(vocab, (1, CACHED_TOKENS), generator=generator))
    for _ in range(repeats + (tokens == 1)):
        if tokens > 1:
            cache = DynamicCache(config=model.config)
        ids = torch.randint(vocab, (1, tokens), generator=generator)
        before()
        began = perf_counter()
        run_pass(model, cache, ids)
        found.append(perf_counter() - began)
    return found[tokens == 1 :]


def run_pass(model: PreTrainedModel, cache: DynamicCache, ids: torch.Tensor) -> int:
    """The next token, of a pass that is done."""
    logits = model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return int(logits[0, -1].argmax())
