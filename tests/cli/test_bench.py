"""`offload bench`: a model runs, and what was predicted stands beside what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from placement.datasheets import datasheet
from placement.hardware_profile import HardwareProfile
from placement.plan import Plan
from tests.cli.conftest import Invoke

SMALL = ("--prompt", "8", "-n", "4", "--prompts", "1", "--no-probe", "--ram", "64MiB", "--no-progress")


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch) -> HardwareProfile:
    """A profile that is taken for this machine's; what it says is nothing like it."""
    made = datasheet(cpu="ddr5-desktop", drive="gen4")
    made = replace(made, provenance=replace(made.provenance, kind="measured"))
    monkeypatch.setattr("offload.preparation.cached_profile", lambda root: made)
    return made


def test_predicted_beside_measured(
    invoke: Invoke, checkpoint: Path, shared_store: Path, profile: HardwareProfile
) -> None:
    options = ("--json", "--batch", "2", "--prefill-chunk", "auto")
    result = invoke("bench", checkpoint, "--nvme", shared_store, *SMALL, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    figures = found["figures"]
    for name in ("decode, tokens/s", "prefill, tokens/s", "peak RSS, MiB"):
        figure = figures[name]
        assert figure["error"] == pytest.approx(figure["predicted"] / figure["measured"] - 1), name
    plan = Plan.from_json(json.dumps(found["plan"]))
    assert plan.prediction is not None
    assert figures["decode, tokens/s"]["predicted"] == plan.prediction.decode.tokens_per_s
    assert (plan.workload.batch, plan.workload.prompt_tokens, plan.workload.context_tokens) == (2, 8, 14)
    assert plan.workload.prefill_chunk_tokens == 14, "the planner's choice"
    assert (found["prefill"]["prefill_tokens"], found["prefill"]["decode_tokens"]) == (16, 0)
    assert (found["decode"]["prefill_tokens"], found["decode"]["decode_tokens"]) == (0, 8)
    for phase in ("decode", "prefill"):
        terms = [one for name, one in figures.items() if name.startswith(phase) and name.endswith("ms a token")]
        stats, told = found[phase], getattr(plan.prediction, phase)
        measured = 1e3 * stats[f"{phase}_s"] / stats[f"{phase}_tokens"]
        assert sum(term["measured"] for term in terms) == pytest.approx(measured), "terms add up"
        assert sum(term["predicted"] for term in terms) == pytest.approx(1e3 * told.seconds / told.tokens)


def test_a_table_and_how_to_get_predictions(
    invoke: Invoke, checkpoint: Path, shared_store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = invoke("bench", checkpoint, "--nvme", shared_store, *SMALL)
    assert (result.exit_code, result.stderr) == (0, "")
    for part in ("predicted", "measured", "decode, tokens/s", "peak RSS, MiB", "offload profile", "all random"):
        assert part in result.stdout, part


def test_an_accelerator_that_no_profile_knows_is_not_predicted_as_a_cpu(
    invoke: Invoke, checkpoint: Path, shared_store: Path, profile: HardwareProfile
) -> None:
    assert profile.gpu is None
    result = invoke("bench", checkpoint, "--nvme", shared_store, *SMALL, "--json", "--device", "host", "--vram", "1MiB")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["plan"]["prediction"] is None and found["plan"]["vram"]["slots"] > 0
    assert found["figures"]["decode, tokens/s"]["predicted"] is None
    assert found["notes"][0] == "nothing was predicted of the accelerator: no profile knows it"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--context", "10"), 2, "sequences of 14 tokens"),
        (("--ram", "1MiB"), 3, "needs at least"),
        (("--skew", "1", "--trace", "nothing.trace"), 2, "give one of them"),
        (("--trace", "nothing.trace"), 5, "nothing.trace"),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_said(
    invoke: Invoke, checkpoint: Path, shared_store: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    result = invoke("bench", checkpoint, "--nvme", shared_store, *SMALL, "--json", *arguments)
    assert result.exit_code == code
    assert said in result.stderr
    assert json.loads(result.stdout)["error"]["exit_code"] == code


def test_a_model_that_is_not_there(invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("bench", tmp_path / "nowhere").exit_code == 4
