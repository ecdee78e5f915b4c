"""The committed model: it loads with plain transformers, predicts text that it never saw, and stays small."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import examples.tiny_moe

MODEL = Path(examples.tiny_moe.__file__).parent / "model"

# From two held-out documents: the topic on shifting and bz2.py.
TEXT = """
The shifting operations have lower priority than the arithmetic operations:

   shift_expr ::= a_expr | shift_expr ("<<" | ">>") a_expr

These operators accept integers as arguments.  They shift the first argument to the left or right by the number of
bits given by the second argument.

A right shift by *n* bits is defined as floor division by "pow(2,n)". A left shift by *n* bits is defined as
multiplication with "pow(2,n)".

class BZ2File(_compression.BaseStream):

    def close(self):
        if self._mode == _MODE_CLOSED:
            return
        try:
            if self._mode == _MODE_READ:
                self._buffer.close()
            elif self._mode == _MODE_WRITE:
                self._fp.write(self._compressor.flush())
                self._compressor = None
        finally:
            self._fp = None
            self._mode = _MODE_CLOSED
"""


def test_predicts_text_it_never_saw() -> None:
    model, report = AutoModelForCausalLM.from_pretrained(MODEL, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == TEXT
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    # An untrained model of this vocabulary has 7.6 nats per token.
    assert loss < 4.0


def test_tokenizer_round_trips_any_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    assert tokenizer.pad_token_id == 1
    for text in ("", "\t\n  x", "naïve 東京 🙂", "def f(x):\n    return x\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_files_are_small_and_name_no_machine() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 25 * 2**20
    for path in MODEL.glob("*.json"):
        assert "/home/" not in path.read_text() and "/root/" not in path.read_text()


def test_log_belongs_to_the_model() -> None:
    log = json.loads((MODEL / "training_log.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    assert log["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert len(log["expert_usage"]) == model.config.num_hidden_layers
    assert all(layer["perplexity"] > model.config.num_experts_per_tok for layer in log["expert_usage"])
    assert log["validation_nats_per_token"] < 4.0
