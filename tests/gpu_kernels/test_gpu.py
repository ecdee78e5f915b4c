"""What only a GPU can show."""

from __future__ import annotations

import pytest
import torch

from formats.bundle import BundleLayout
from formats.kv import KV_FORMATS, KvLayout
from gpu_kernels.combine import combine
from gpu_kernels.expert_mlp import expert_mlp
from gpu_kernels.paged_attention import paged_attention
from tests.gpu_kernels.bundles import fill_slots
from tests.gpu_kernels.kv_lists import random_lists

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
]


@pytest.mark.parametrize("format", ["bf16", "int8", "int4", "mxfp4", "fp8_e4m3"])
@pytest.mark.parametrize("tokens", [1, 8, 200])
def test_a_step_is_captured_in_a_graph(format: str, tokens: int) -> None:
    """Capture fails where anything waits for the device; a replay sees new inputs and a new slot table."""
    device = torch.device("cuda")
    layout = BundleLayout(256, 192, format)
    slots = fill_slots(layout, 8, device)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 256, generator=generator).bfloat16().to(device)
    ids = torch.rand(tokens, 8, generator=generator).topk(2).indices.contiguous().to(device)
    weights = torch.rand(tokens, 2, generator=generator).to(device)
    out = torch.empty_like(x)

    def step() -> torch.Tensor:
        return combine(expert_mlp(x, ids, slots.table, layout, "silu"), weights, out)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    x.copy_(torch.randn(tokens, 256, generator=generator))
    slots.table.copy_(slots.table.flip(0))
    expected = step().clone()
    out.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("format", KV_FORMATS)
def test_attention_to_blocks_is_captured_in_a_graph(format: str) -> None:
    """A replay sees a new query, longer lists, and blocks that lie elsewhere."""
    device, layout = torch.device("cuda"), KvLayout(format, 2, 128, 128)
    lists = random_lists(layout, [300, 640], device)
    lengths = lists.lengths - 64
    query = torch.randn(2, 8, 1, 128, device=device).bfloat16()
    firsts, positions = torch.zeros_like(lengths), lengths[:, None] - 1
    out = torch.empty(2, 8, 1, 128, device=device)

    def step() -> None:
        told = lists.offsets, lists.addresses, lengths, firsts, positions
        out.copy_(paged_attention(query, *told, layout, 0.1, most_tokens=640)[0])

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    query.normal_()
    lengths.copy_(lists.lengths)
    positions.copy_(lengths[:, None] - 1)
    lists.addresses[:4] = lists.addresses[:4].flip(0)
    step()
    expected = out.clone()
    out.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_kernels_run_on_the_device_of_their_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    device = torch.device("cuda", 1)
    layout = BundleLayout(64, 48, "int4")
    slots = fill_slots(layout, 2, device)
    x = torch.randn(1, 64, dtype=torch.bfloat16, device=device)
    rows = expert_mlp(x, torch.tensor([[0, 1]], device=device), slots.table, layout, "silu")
    assert rows.device == device
    assert torch.isfinite(rows).all()
