"""The recall model and its task: lessons say what they should, and the committed weights recall."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import examples.tiny_recall
from examples.tiny_recall import train
from examples.tiny_recall.recall import recall
from examples.tiny_recall.task import KEYS, VALUES, VOCAB, make_lesson, tell_facts

MODEL = Path(examples.tiny_recall.__file__).parent / "model"


@pytest.mark.parametrize(("tokens", "facts"), [(2, 1), (9, 4), (600, 250)])
def test_every_fact_is_told_once(tokens: int, facts: int) -> None:
    told = tell_facts(tokens, facts, torch.Generator().manual_seed(3))
    assert told.context.shape == (tokens,) and len(set(told.keys.tolist())) == facts
    assert torch.equal(told.context[told.places], told.keys) and torch.equal(told.context[told.places + 1], told.values)
    others = torch.ones(tokens, dtype=torch.bool)
    others[told.places] = others[told.places + 1] = False
    assert (told.context[others] >= KEYS + VALUES).all() and (told.context < VOCAB).all()
    assert (told.places.diff() >= 2).all()


@pytest.mark.parametrize("facts", [0, 6, KEYS + 1])
def test_facts_that_do_not_fit_are_refused(facts: int) -> None:
    with pytest.raises(ValueError, match=f"{facts} facts: expected 1 to"):
        tell_facts(10 if facts < 10 else 10_000, facts, torch.Generator())


def test_lessons_ask_for_what_was_told_and_teach_distance() -> None:
    lesson = make_lesson(4, 60, 20, 12, 5000, torch.Generator().manual_seed(0))
    assert lesson.ids.shape == lesson.positions.shape == lesson.targets.shape == (4, 84)
    for ids, targets in zip(lesson.ids.tolist(), lesson.targets.tolist(), strict=True):
        told = dict(pairwise(ids))
        asked = [at for at, target in enumerate(targets) if target >= 0]
        assert asked == list(range(60, 84, 2))
        assert all(told[ids[at]] == targets[at] == ids[at + 1] for at in asked)
    steps = lesson.positions.diff(dim=1)
    assert (steps >= 1).all() and 60 < int(lesson.positions.max()) < 5100
    is_value = (lesson.ids[:, 1:] >= KEYS) & (lesson.ids[:, 1:] < KEYS + VALUES)
    assert (steps[is_value] == 1).all()


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = train.Qwen2MoeForCausalLM(train.model_config())
    train.begin_with_induction(model, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.PEAK_LR / 10)
    lesson, losses = make_lesson(4, 16, 6, 8, 0, generator), []
    for _ in range(8):
        loss, right = train.step_loss(model, lesson)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and 0 <= right <= 1


def test_the_committed_weights_are_small_and_recall_in_transformers() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 3_000_000
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    found = recall(model, tell_facts(2048, 60, torch.Generator().manual_seed(7)))
    assert found.accuracy > 0.95
    assert sum(found.by_depth(4)) / 4 == pytest.approx(found.accuracy, abs=0.05)
