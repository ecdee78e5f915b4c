"""Arguments are checked at the door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from offload import request
from offload.errors import InvalidArgumentError
from offload.request import FUSED_KINDS, make_request, store_root
from prefetch.policies.geometry import Geometry
from prefetch.predictors.names import SOURCES
from prefetch.predictors.predictor import Predictor
from prefetch.scheduler.base import StepScheduler


def make(**changed: Any) -> request.Request:
    arguments: dict[str, Any] = {
        "ram": "1GiB", "nvme": "/somewhere", "context": None, "batch": 1, "prefill_chunk": 1024, "max_memory": None,
    }  # fmt: skip
    return make_request(**{**arguments, **changed})


def test_a_request_is_resolved() -> None:
    made = make(ram="2GB", nvme=Path("/disk/x"), context=77, batch=3, prefill_chunk=5)
    found = (made.ram_nbytes, made.store_root, made.context_tokens, made.batch, made.prefill_chunk_tokens)
    assert found == (2 * 10**9, Path("/disk/x"), 77, 3, 5)
    assert made.fused == set(FUSED_KINDS)


def test_kinds_are_switched_by_name() -> None:
    assert make(fused=True).fused == set(FUSED_KINDS)
    assert make(fused=False).fused == make(fused=()).fused == frozenset()
    assert make(fused=["linear", "rotary"]).fused == {"linear", "rotary"}


@pytest.mark.parametrize("fused", ["linear", ["linear", "other"], None, 1, [["linear"]], {"": 1}])
def test_other_kinds_are_refused(fused: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"fused=.*expected True, False or some of attention, decoder"):
        make(fused=fused)


def test_without_ram_a_tenth_stays_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "available_ram_nbytes", lambda: 1000)
    assert make(ram=None).ram_nbytes == 900


@pytest.mark.parametrize("name", ["context", "batch", "prefill_chunk"])
@pytest.mark.parametrize("value", [0, -1, True, False, 1.0, "4", float("nan"), float("inf")])
def test_counts_are_positive_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{name}=.*positive whole number"):
        make(**{name: value})


def test_the_chunk_may_be_left_to_the_planner() -> None:
    assert make(prefill_chunk="auto").prefill_chunk_tokens is None


@pytest.mark.parametrize("name", ["batch", "prefill_chunk"])
def test_only_the_context_may_be_left_open(name: str) -> None:
    assert make(context=None).context_tokens is None
    with pytest.raises(InvalidArgumentError, match=f"{name}=None"):
        make(**{name: None})


@pytest.mark.parametrize("value", [0, -5, True, 1.5, "many", "8Gb", b"1GiB"])
def test_ram_is_a_size(value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="ram="):
        make(ram=value)


@pytest.mark.parametrize(("size", "nbytes"), [("3GiB", 3 << 30), (12345, 12345)])
def test_max_memory_is_another_spelling_of_ram(size: int | str, nbytes: int) -> None:
    assert make(ram=None, max_memory={"cpu": size}).ram_nbytes == nbytes


@pytest.mark.parametrize(
    "value",
    [
        {},
        {0: "10GiB"},
        {0: "10GiB", "cpu": "3GiB"},
        {"disk": "1GiB"},
        {"cpu": None},
        {"cpu": 0},
        {"cpu": "x"},
        "3GiB",
        5,
        [],
    ],
)
def test_other_max_memory_is_refused(value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="max_memory"):
        make(ram=None, max_memory=value)


def test_two_spellings_at_once_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="both given"):
        make(ram="1GiB", max_memory={"cpu": "1GiB"})


@pytest.mark.parametrize("value", ["", 5, True, b"/x", 1.5, ["x"]])
def test_nvme_is_a_directory(value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="nvme="):
        make(nvme=value)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path


def test_the_tilde_is_the_home_directory(home: Path) -> None:
    assert store_root("~/stores") == home / "stores"
    with pytest.raises(InvalidArgumentError, match="full path"):
        store_root("~no-such-user-here/stores")


def test_the_default_is_in_the_cache_directory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store_root(None) == home / ".cache" / "offload"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert store_root(None) == Path("/elsewhere/offload")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/kept")
    assert store_root(None) == home / "kept" / "offload"


@pytest.mark.parametrize("value", ["", "relative/cache", "."])
def test_a_cache_home_that_is_not_absolute_does_not_count(
    value: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert store_root(None) == home / ".cache" / "offload"


class Own(StepScheduler):
    def copies(self, *_: object) -> tuple[int, ...]:
        return ()


def test_schedulers_and_predictors_are_named_or_given() -> None:
    assert (make().scheduler, make().predictor) == ("auto", "auto")
    assert make(scheduler="off").scheduler == "off"
    own = Own()
    assert make(scheduler=own).scheduler is own
    for source in ("auto", *SOURCES):
        assert make(predictor=source, prefetch="auto").predictor == source
    predictor = Predictor(Geometry((4, 4)))
    assert make(predictor=predictor, prefetch=True).predictor is predictor


@pytest.mark.parametrize("value", ["on", "", None, True, False, 3, ["off"], Own])
def test_other_schedulers_are_refused(value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"scheduler=.*expected auto, off or a StepScheduler"):
        make(scheduler=value)


@pytest.mark.parametrize("value", ["off", "expected", None, True, ["router"], Predictor])
def test_other_predictors_are_refused(value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"predictor=.*expected auto, router, transition.*LayerPredictor"):
        make(predictor=value, prefetch=True)


@pytest.mark.parametrize("prefetch", [False, "off"])
def test_a_predictor_that_nobody_asks_is_refused(prefetch: Any) -> None:
    for predictor in ("router", Predictor(Geometry((4, 4)))):
        with pytest.raises(InvalidArgumentError, match=r"predictor=.*nothing asks a predictor"):
            make(predictor=predictor, prefetch=prefetch)
    assert make(predictor="auto", prefetch=prefetch).predictor == "auto"


@pytest.mark.parametrize("scheduler", ["off", Own()])
def test_a_graph_schedules_nothing(scheduler: Any) -> None:
    above = {"device": "host", "vram": "1GiB", "step_graph": True}
    assert make(**above).step_graph
    with pytest.raises(InvalidArgumentError, match=r"step_graph=True and scheduler=.*schedules none"):
        make(scheduler=scheduler, **above)
