from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import offload.loading
from offload.cli.streamer import TokenStreamer
from offload.runtime import Runtime
from placement.plan import Plan
from tests.cli.conftest import PROMPT, Invoke, character_tokenizer

SMALL = ["--ram", "100MiB"]


def minimum(checkpoint: Path) -> int:
    return offload.plan(checkpoint, ram="1GiB").minimum_ram_nbytes


def test_text_is_what_transformers_generates(
    invoke: Invoke, checkpoint: Path, shared_store: Path, expected: str
) -> None:
    least = minimum(checkpoint)
    result = invoke("run", checkpoint, "-p", PROMPT, "--ram", least, "--nvme", shared_store, "-n", 40)
    assert (result.exit_code, result.stdout) == (0, expected + "\n")
    # With two expert slots for 24 experts the figures cannot be all hits.
    assert re.fullmatch(r"decode [\d.]+ tokens/s \(39\), prefill .*hit rate .*, read \d.*\n", result.stderr)


@pytest.mark.parametrize("source", ["stdin", "file"])
def test_the_prompt_may_come_from_elsewhere(
    invoke: Invoke, checkpoint: Path, shared_store: Path, expected: str, tmp_path: Path, source: str
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    given = ["-p", "-"] if source == "stdin" else ["--prompt-file", file]
    result = invoke("run", checkpoint, *given, *SMALL, "--nvme", shared_store, "-n", 40, stdin=PROMPT)
    assert (result.exit_code, result.stdout) == (0, expected + "\n")


def test_echo_writes_the_prompt_first(invoke: Invoke, checkpoint: Path, shared_store: Path, expected: str) -> None:
    result = invoke("run", checkpoint, "-p", PROMPT, *SMALL, "--nvme", shared_store, "-n", 40, "--echo")
    assert result.stdout == PROMPT + expected + "\n"


def test_json_has_text_figures_and_plan(invoke: Invoke, checkpoint: Path, shared_store: Path, expected: str) -> None:
    options = ["--nvme", shared_store, "-n", 40, "--json", "--prefill-chunk", 3]
    result = invoke("run", checkpoint, "-p", PROMPT, *SMALL, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert list(report) == ["model", "prompt_tokens", "new_tokens", "text", "finish", "stats", "plan"]
    assert report["model"] == str(checkpoint)
    assert (report["text"], report["new_tokens"], report["finish"]) == (expected, 40, "length")
    assert report["prompt_tokens"] == len(PROMPT)
    assert report["stats"]["decode_tokens"] == 39
    assert {"hits", "misses", "bytes_read", "hit_rate", "decode_tokens_per_s"} <= set(report["stats"])
    plan = Plan.from_json(json.dumps(report["plan"]))
    assert (plan.ram_budget_nbytes, plan.workload.prefill_chunk_tokens) == (100 << 20, 3)


def test_the_end_token_ends_the_text(invoke: Invoke, checkpoint: Path, tmp_path: Path, expected: str) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "model")
    last = character_tokenizer().convert_tokens_to_ids(expected[9])
    generation = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": last}))
    result = invoke("run", model, "-p", PROMPT, *SMALL, "--nvme", tmp_path / "store", "-n", 40, "--json")
    report = json.loads(result.stdout)
    assert report["finish"] == "stop"
    assert report["text"] == expected[: expected.index(expected[9]) + 1]


def test_sampling_repeats_with_a_seed(invoke: Invoke, checkpoint: Path, shared_store: Path) -> None:
    def sample(seed: int) -> str:
        sampling = ["--temperature", 1.5, "--top-k", 50, "--top-p", 0.95, "--seed", seed]
        result = invoke("run", checkpoint, "-p", PROMPT, *SMALL, "--nvme", shared_store, "-n", 30, *sampling)
        assert result.exit_code == 0, result.stderr
        return str(result.stdout)

    first = sample(1)
    assert first == sample(1)
    assert first != sample(2)


def test_chat_uses_the_template(invoke: Invoke, checkpoint: Path, shared_store: Path, tmp_path: Path) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% for message in messages %}[{{ message.content }}]{% endfor %}>")
    arguments = ["-p", "hello", "--chat", *SMALL, "--nvme", tmp_path / "store", "-n", 5, "--echo"]
    result = invoke("run", model, *arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("[hello]>")

    result = invoke("run", checkpoint, *arguments)
    assert result.exit_code == 2
    assert "no chat template" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give the prompt"),
        (["-p", "x", "--prompt-file", "y"], "Give the prompt"),
        (["-p", ""], "empty"),
        (["--prompt-file", "/nonexistent/prompt"], "cannot be read"),
        (["-p", "x", "--top-k", "3"], "--temperature above 0"),
        (["-p", "x", "--ram", "4Gb"], "means bits"),
        (["-p", "x", "--ram", "lots"], "24GiB"),
        (["-p", "x", "-n", "0"], "-n"),
        (["-p", "x", "--temperature", "-1"], "--temperature"),
        (["-p", "x", "--dtype", "int4"], "--dtype"),
        (["-p", "x", "--context", "0"], "--context"),
    ],
)
def test_usage_errors(invoke: Invoke, arguments: list[str], message: str) -> None:
    result = invoke("run", "/nonexistent/model", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_a_prompt_that_is_not_utf8(invoke: Invoke) -> None:
    result = invoke("run", "/nonexistent/model", "-p", "-", stdin=b"\xff\xfe")
    assert result.exit_code == 2
    assert "not UTF-8" in result.stderr


def test_a_model_without_tokenizer(invoke: Invoke, checkpoint: Path, tmp_path: Path) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    result = invoke("run", model, "-p", PROMPT, *SMALL, "--nvme", tmp_path / "store")
    assert result.exit_code == 4
    assert "tokenizer" in result.stderr
    (model / "tokenizer.json").write_text('{"no": "tokenizer"}')
    result = invoke("run", model, "-p", PROMPT, *SMALL, "--nvme", tmp_path / "store")
    assert result.exit_code == 4
    assert not (tmp_path / "store").exists()


def test_interrupt_keeps_what_was_generated(
    invoke: Invoke, checkpoint: Path, shared_store: Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = TokenStreamer.put
    closed: list[Runtime] = []
    monkeypatch.setattr(Runtime, "close", lambda self, close=Runtime.close: (close(self), closed.append(self)))

    def interrupted(self: TokenStreamer, value: object) -> None:
        put(self, value)  # type: ignore[arg-type]
        if len(self.new_tokens) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(TokenStreamer, "put", interrupted)
    arguments = ["run", checkpoint, "-p", PROMPT, *SMALL, "--nvme", shared_store, "-n", 40]
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (130, expected[:5] + "\n")
    assert closed
    assert closed[0].closed
    report = json.loads(invoke(*arguments, "--json").stdout)
    assert (report["finish"], report["text"]) == ("interrupted", expected[:5])


def test_more_tokens_than_the_model_is_made_for(invoke: Invoke, checkpoint: Path, shared_store: Path) -> None:
    result = invoke("run", checkpoint, "-p", PROMPT, *SMALL, "--nvme", shared_store, "-n", 250)
    assert result.exit_code == 0
    assert "Note: up to 258 tokens with the prompt; the model is made for 256." in result.stderr


def test_attention_to_a_part_is_named_lossy(
    invoke: Invoke, checkpoint: Path, shared_store: Path, expected: str
) -> None:
    arguments = ["-p", PROMPT, *SMALL, "--nvme", shared_store, "-n", 40, "--kv-sparsity", "top-k:1"]
    result = invoke("run", checkpoint, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["text"] == expected and report["stats"]["kv"]["sparsity"]["method"] == "top-k:1"
    assert report["plan"]["kv"]["sparsity"] == "top-k:1"
    shown = invoke("plan", checkpoint, *SMALL, "--kv-sparsity", "h2o:0.2")
    assert shown.exit_code == 0 and "attended to in part by h2o:0.2 (lossy)" in re.sub(r"\s+", " ", shown.stdout)


@pytest.mark.parametrize("value", ["top-k", "best:0.1", "h2o:2"])
def test_a_sparsity_that_is_none_is_a_usage_error(invoke: Invoke, checkpoint: Path, value: str) -> None:
    result = invoke("run", checkpoint, "-p", PROMPT, *SMALL, "--kv-sparsity", value)
    assert result.exit_code == 2 and "expected one of top-k, snapkv, h2o" in re.sub(r"\s+", " ", result.stderr)
