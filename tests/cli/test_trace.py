"""`offload trace`: what a run routed is written, shown, and planned with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from offload.traces import read_trace, write_trace
from placement.plan import Plan
from prefetch.traces.replay import belady_for, replay
from prefetch.traces.synthetic import SyntheticRouting, draw
from prefetch.traces.trace import RoutingTrace
from tests.cli.conftest import PROMPT, Invoke

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
MIXTRAL = CONFIGS / "mixtral-8x7b"
DESKTOP = ("--cpu", "ddr5-desktop", "--drive", "gen4", "--ram", "16GiB", "--quant", "int4", "--context", "1024")


@pytest.fixture(scope="module")
def mixtral_trace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RoutingTrace]:
    trace = draw(SyntheticRouting(32, 8, 2, skew=0.9, locality=1.0), 64, 64, 2)
    file = tmp_path_factory.mktemp("traces") / "mixtral.trace"
    write_trace(file, trace)
    return file, trace


def test_a_run_is_recorded(invoke: Invoke, checkpoint: Path, shared_store: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.trace"
    arguments = ("-p", PROMPT, "-n", "12", "--ram", "64MiB", "--nvme", shared_store, "-o", file, "--no-progress")
    result = invoke("trace", "record", checkpoint, *arguments, "--temperature", "0")
    assert (result.exit_code, result.stderr) == (0, "")
    trace = read_trace(file)
    # The last token that is chosen goes through no model.
    assert trace.pass_tokens.tolist() == [len(PROMPT)] + [1] * 11
    assert trace.pass_prefill.tolist() == [True] + [False] * 11
    assert "prompt of 8 tokens" in trace.name
    result = invoke("plan", checkpoint, "--trace", file, "--ram", "64MiB", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    result = invoke("trace", "record", checkpoint, *arguments, "--seed", "5", "--json")
    assert json.loads(result.stdout)["tokens"] == len(read_trace(file).experts)


def test_figures(invoke: Invoke, mixtral_trace: tuple[Path, RoutingTrace], tmp_path: Path) -> None:
    file, trace = mixtral_trace
    found = json.loads(invoke("trace", "show", file, "--json").stdout)
    assert (found["layers"], found["experts"], found["top_k"]) == (32, 256, 2)
    assert (found["passes"], found["prefill_passes"], found["tokens"], found["decode_tokens"]) == (65, 1, 128, 64)
    assert 0.3 < found["skew"] < 1.5
    rates = [(point["slots"], point["lru"], point["belady"]) for point in found["hits"]]
    assert [slots for slots, _, _ in rates] == sorted({slots for slots, _, _ in rates})
    assert [lru for _, lru, _ in rates] == sorted(lru for _, lru, _ in rates)
    assert rates[-1][1] == 1.0
    for slots, _, belady in rates[::4]:
        assert belady == replay(trace, belady_for(trace), slots).decode_hit_rate
    result = invoke("trace", "show", file, "--html", tmp_path / "trace.html")
    assert (result.exit_code, result.stderr) == (0, "")
    text = re.sub(r"\s+", " ", result.stdout)
    for part in ("like rank^-", "best possible", "beyond chance", "256 experts in all"):
        assert part in text, part
    page = (tmp_path / "trace.html").read_text()
    assert "Plotly" in page
    assert "Hit rate of decode" in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=.https?:", page), "nothing is fetched"


def test_a_plan_takes_a_trace(invoke: Invoke, mixtral_trace: tuple[Path, RoutingTrace]) -> None:
    file, trace = mixtral_trace
    plans = [
        Plan.from_json(invoke("plan", MIXTRAL, *DESKTOP, "--json", *more).stdout) for more in ((), ("--trace", file))
    ]
    told = [plan.prediction for plan in plans]
    assert told[0] is not None and told[1] is not None
    assert told[1].decode.ram_hit_rate > told[0].decode.ram_hit_rate + 0.1
    assert trace.name in told[1].routing


def test_a_simulation_with_its_timeline(
    invoke: Invoke, mixtral_trace: tuple[Path, RoutingTrace], tmp_path: Path
) -> None:
    file, _ = mixtral_trace
    timeline = tmp_path / "timeline.json"
    result = invoke("plan", MIXTRAL, *DESKTOP, "--trace", file, "--simulate", "--timeline", timeline, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    both = json.loads(result.stdout)
    plan = Plan.from_json(json.dumps(both["plan"]))
    assert plan.prediction is not None
    simulated = both["simulation"]["decode"]
    assert simulated["hit_rate"] == pytest.approx(plan.prediction.decode.ram_hit_rate, abs=0.03)
    assert simulated["tokens_per_s"] == pytest.approx(plan.prediction.decode.tokens_per_s, rel=0.15)
    events = json.loads(timeline.read_text())["traceEvents"]
    assert {event["cat"] for event in events if event["ph"] == "X"} == {"cpu", "disk"}
    result = invoke("plan", MIXTRAL, *DESKTOP, "--skew", "0.5", "--simulate", "--policy", "lfu", "--locality", "1")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "simulated" in result.stdout
    assert "expert events" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--timeline", "t.json"), "go with --simulate"),
        (("--simulate", "--policy", "best"), "expected auto or one of"),
        (("--simulate", "--locality", "1", "--trace", "FILE"), "of a synthetic trace"),
        (("--skew", "1", "--trace", "FILE"), "give one of them"),
        (("--trace", "OTHER"), "record one of this model"),
    ],
    ids=str,
)
def test_what_cannot_be_meant(
    invoke: Invoke, mixtral_trace: tuple[Path, RoutingTrace], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    write_trace(tmp_path / "other.trace", draw(SyntheticRouting(4, 8, 2), 4, 8, 0))
    files = {"FILE": str(mixtral_trace[0]), "OTHER": str(tmp_path / "other.trace")}
    result = invoke("plan", MIXTRAL, *DESKTOP, *(files.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert said in result.stderr


def test_files_that_are_no_traces(invoke: Invoke, mixtral_trace: tuple[Path, RoutingTrace], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.trace"
    damaged.write_bytes(mixtral_trace[0].read_bytes()[:-1])
    assert invoke("trace", "show", damaged).exit_code == 4
    assert invoke("plan", MIXTRAL, *DESKTOP, "--trace", damaged).exit_code == 4
    assert invoke("trace", "show", tmp_path / "nothing").exit_code == 5
    short = tmp_path / "short.trace"
    write_trace(short, draw(SyntheticRouting(2, 4, 1), 0, 1, 0))
    result = invoke("trace", "show", short)
    assert result.exit_code == 2
    assert "two tokens" in result.stderr
    write_trace(short, draw(SyntheticRouting(2, 4, 1), 5, 0, 0))
    assert "need two passes of decode" in invoke("trace", "show", short).stdout


def test_recording_needs_a_prompt_and_a_place(invoke: Invoke, checkpoint: Path, tmp_path: Path) -> None:
    assert invoke("trace", "record", checkpoint, "-o", tmp_path / "x").exit_code == 2
    assert invoke("trace", "record", checkpoint, "-p", "a").exit_code == 2
