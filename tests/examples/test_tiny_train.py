"""The training script's parts, on a text and a model small enough for a test."""

from pathlib import Path

import numpy as np
import pytest
import torch

from examples.tiny_moe import corpus, train

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" for i in range(400)]


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> train.Trainer:
    torch.manual_seed(0)
    monkeypatch.setattr(train, "VOCAB", 300)
    config = train.model_config(corpus.train_tokenizer(TEXTS, 300))
    config.num_hidden_layers = 1
    return train.Trainer(config)


def test_split_depends_on_the_name_alone() -> None:
    documents = corpus.read_documents()
    held_out = [d for d in documents if d.held_out]
    assert 0.01 < len(held_out) / len(documents) < 0.1
    assert all(corpus.Document(d.name, "").held_out for d in held_out)
    assert not any("_sysconfigdata" in d.name or "/test/" in d.name for d in documents)


def test_documents_are_separated() -> None:
    tokenizer = corpus.train_tokenizer(TEXTS, 300)
    tokens = corpus.encode([corpus.Document("a", TEXTS[0]), corpus.Document("b", TEXTS[1])], tokenizer)
    assert np.flatnonzero(tokens == 0)[0] == 0
    assert (tokens == 0).sum() == 2
    assert tokenizer.decode(tokens, skip_special_tokens=True) == TEXTS[0] + TEXTS[1]


def test_batches_are_windows_of_the_text() -> None:
    tokens = np.arange(20_000, dtype=np.int64)
    batches = train.windows(tokens, seed=0)
    for _ in range(10):
        batch = next(batches)
        assert batch.shape == (train.SEQUENCES, train.CONTEXT + 1)
        assert (batch.diff(dim=1) == 1).all()
    assert torch.equal(next(train.windows(tokens, seed=1)), next(train.windows(tokens, seed=1)))


def test_balance_loss_is_one_when_all_experts_are_used_alike() -> None:
    even = torch.eye(4)[torch.arange(64) % 4]
    assert train.balance_loss((even,), top_k=1).item() == pytest.approx(1.0)
    collapsed = 100.0 * torch.eye(4)[torch.zeros(64, dtype=torch.int64)]
    assert train.balance_loss((collapsed,), top_k=1).item() == pytest.approx(4.0)


def test_learning_rate_warms_up_and_falls() -> None:
    assert train.learning_rate(0, 0.0) < train.learning_rate(train.WARMUP_STEPS, 0.0) == train.PEAK_LR
    assert train.learning_rate(10_000, 1.0) == pytest.approx(train.FLOOR_LR)
    assert train.learning_rate(10_000, 1.5) == pytest.approx(train.FLOOR_LR)


def test_loss_falls_and_a_run_resumes_where_it_stopped(trainer: train.Trainer, tmp_path: Path) -> None:
    batch = torch.arange(2 * 65).reshape(2, 65) % 7
    losses = [trainer.step(batch, 2e-3)[0] for _ in range(8)]
    assert losses[-1] < losses[0] - 1.0
    trainer.progress.step = 8
    trainer.save(tmp_path / "checkpoint.pt")
    torch.manual_seed(1)
    resumed = train.Trainer(trainer.model.config)
    resumed.resume(tmp_path / "checkpoint.pt")
    assert resumed.progress == trainer.progress
    assert resumed.step(batch, 2e-3) == trainer.step(batch, 2e-3)


def test_expert_usage_of_one_expert_and_of_all() -> None:
    usage = train.expert_usage(torch.tensor([[8, 0, 0, 0], [2, 2, 2, 2]]))
    assert usage[0] == {"perplexity": 1.0, "most_used": 1.0, "least_used": 0.0}
    assert usage[1]["perplexity"] == 4.0
