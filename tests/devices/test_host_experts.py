"""The ways in which experts of 16-bit weights are computed for many tokens."""

from __future__ import annotations

import pytest
import torch

from offload.devices import host_experts
from offload.devices.host_experts import FEW_TOKENS, FEW_TOKENS_IN_PAIRS
from tests.moe.rig import Rig


@pytest.mark.parametrize("kind", ["silu", "gpt_oss", "unknown"])
@pytest.mark.parametrize("panels", [False, True])
@pytest.mark.parametrize("tokens", [FEW_TOKENS_IN_PAIRS, FEW_TOKENS_IN_PAIRS + 1, FEW_TOKENS, FEW_TOKENS + 3])
def test_rows_panels_and_torchs_products_agree(
    tokens: int, panels: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_experts, "takes_panels", lambda dtype: panels)
    rig = Rig(kind=kind, format="bf16")
    hidden = torch.randn(tokens + 1, rig.layout.hidden, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    # All go to the first expert, but one, which a second has alone.
    ids = torch.zeros(len(hidden), 1, dtype=torch.int64)
    ids[-1] = 1
    weights = torch.ones(len(hidden), 1, dtype=torch.bfloat16)
    rig.assert_close(rig.step(0, hidden, ids, weights), rig.reference(0, hidden, ids, weights))
    rig.close()
