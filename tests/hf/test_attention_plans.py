"""torch's switch for cuDNN's attention: off within passes that would need a plan each, and then what it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from offload.hf import attention_plans
from offload.hf.attention_plans import avoid_plans, without_plans


class Model(torch.nn.Module):
    """Notes what the switch was; forwards within forwards, and fails, as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def forward(
        self, input_ids: torch.Tensor | None = None, *, inputs_embeds: torch.Tensor | None = None, deeper: int = 0,
        fail: bool = False,
    ) -> None:  # fmt: skip
        del input_ids, inputs_embeds
        self.seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        if fail:
            raise ValueError("told to")
        if deeper:
            self(torch.zeros(1, 1), deeper=deeper - 1)
            self.seen.append(torch.backends.cuda.cudnn_sdp_enabled())


@pytest.fixture(params=[True, False], ids=["on", "off"], autouse=True)
def before(request: pytest.FixtureRequest) -> Iterator[bool]:
    was = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(request.param)
    yield request.param
    assert torch.backends.cuda.cudnn_sdp_enabled() == request.param
    torch.backends.cuda.enable_cudnn_sdp(was)


@pytest.fixture
def model() -> Model:
    made = Model()
    avoid_plans(made)  # type: ignore[arg-type]
    return made


def test_of_few_tokens_it_is_off(model: Model, before: bool) -> None:
    few, many = torch.zeros(2, attention_plans.PLANNED_TOKENS - 1), torch.zeros(2, attention_plans.PLANNED_TOKENS)
    model(few)
    model(input_ids=few)
    model(inputs_embeds=few[..., None])
    model(many)
    model(input_ids=many)
    assert model.seen == [False, False, False, before, before]


def test_forwards_within_forwards(model: Model) -> None:
    model(torch.zeros(1, 1), deeper=2)
    assert not any(model.seen)


def test_a_pass_that_fails_leaves_what_was(model: Model) -> None:
    with pytest.raises(ValueError, match="told to"):
        model(torch.zeros(1, 1), fail=True)


def test_a_pass_that_an_earlier_hook_refuses_leaves_what_was(model: Model, before: bool) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("refused")

    handle = model.register_forward_pre_hook(refuse, prepend=True)
    with pytest.raises(ValueError, match="refused"):
        model(torch.zeros(1, 1))
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    handle.remove()
    model(torch.zeros(1, 1))
    assert model.seen == [False]


def test_the_last_of_several_turns_it_back(before: bool) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with without_plans():
            entered.set()
            leave.wait(10)

    other = threading.Thread(target=hold)
    with without_plans():
        other.start()
        assert entered.wait(10)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    leave.set()
    other.join()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
