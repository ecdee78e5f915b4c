"""Routing traces of the trained tiny model on several kinds of text."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from examples.tiny_moe.corpus import read_documents
from prefetch.policies.geometry import Geometry
from prefetch.traces.trace import RoutingTrace

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "tiny_moe" / "model"

DEPTH = 3
"""Layers ahead whose routers are asked."""

_GERMAN = """
Ein Rechner hat viele Arten von Speicher. Der schnellste ist klein und teuer, der langsamste groß und billig, und
was dazwischen liegt, soll so aussehen, als wäre alles schnell und groß. Das gelingt, solange man weiß, was als
nächstes gebraucht wird. Wer ein Buch liest, braucht meistens die nächste Seite; wer ein Wörterbuch benutzt,
irgendeine. Ein Modell aus vielen Experten ist eher wie ein Chor: Bei jedem Wort singen nur wenige, und welche es sind,
entscheidet sich erst kurz davor. Manche Sänger kommen oft an die Reihe, andere fast nie. Es lohnt sich also, die
häufigen in der ersten Reihe sitzen zu lassen. Aber auch die seltenen kommen nicht zufällig: Nach einem Komma singen
andere als nach einer Zahl, und wer gerade gesungen hat, singt oft gleich noch einmal. Aus solchen Beobachtungen lässt
sich schätzen, wer bald gebraucht wird. Die Schätzung muss nicht stimmen. Sie muss nur besser sein als die Regel, immer
den hinauszuschicken, der am längsten geschwiegen hat.
"""


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
    headers = sorted(Path(sysconfig.get_paths()["include"]).glob("*.h"))
    texts = {
        "Python source": (code, length),
        "documentation": (prose, length),
        "source and documentation in turn": ([text for pair in zip(code, prose, strict=False) for text in pair], 96),
        "C headers": ([path.read_text() for path in headers], 256),
        "JSON": ([(MODEL / "training_log.json").read_text(), (MODEL / "tokenizer.json").read_text()], length),
        "German prose": ([_GERMAN * 4], length),
    }
    kinds = {name: _tokens(tokenizer, pieces, length, piece) for name, (pieces, piece) in texts.items()}
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
    routers = [layer.get_submodule("mlp.gate") for layer in model.get_submodule("model.layers").children()]
    seen: list[torch.Tensor] = []
    hooks = [
        router.register_forward_hook(lambda _router, args, _output: seen.append(args[0].view(len(tokens), -1)))
        for router in routers
    ]
    logits = model(input_ids=torch.tensor([tokens]), output_router_logits=True).router_logits
    for hook in hooks:
        hook.remove()
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
        _ahead(routers, seen, prompt_tokens, probabilities.shape[2]),
    )


def _ahead(
    routers: list[torch.nn.Module], seen: list[torch.Tensor], prompt_tokens: int, experts: int
) -> npt.NDArray[np.float16]:
    """[passes, layers, DEPTH, experts], as `RoutingTrace.ahead`; `seen` is what each router was given, [tokens, H]."""
    found = np.zeros((1 + len(seen[0]) - prompt_tokens, len(routers), DEPTH, experts), np.float16)
    for layer, hidden in enumerate(seen):
        for ahead, router in enumerate(routers[layer + 1 : layer + 1 + DEPTH]):
            weight = router.get_parameter("weight")
            found[1:, layer, ahead] = torch.nn.functional.linear(hidden[prompt_tokens:], weight).half().numpy()
    return found
