"""Models by their sizes, made up."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from formats.bundle import BundleLayout
from placement.model_spec import ExpertsSpec, ModelSpec
from placement.workload import Workload


def experts(layer: int, count: int, top_k: int, hidden: int, intermediate: int, format: str = "bf16") -> ExpertsSpec:
    return ExpertsSpec(f"model.layers.{layer}.mlp.experts", count, top_k, BundleLayout(hidden, intermediate, format))


def spec(**changed: Any) -> ModelSpec:
    sizes: dict[str, Any] = {
        "name": "toy",
        "model_type": "toy_moe",
        "dtype": "bf16",
        "dense_format": "bf16",
        "head_format": "bf16",
        "vocab_size": 1000,
        "hidden_size": 64,
        "layer_count": 4,
        "max_context_tokens": 4096,
        "dense_nbytes": 5_000_000,
        "load_scratch_nbytes": 100_000,
        "kv_nbytes_per_token": 512,
        "kv_fixed_nbytes": 0,
        "activation_nbytes_per_token": 9000,
        "attention_nbytes_per_token": 128,
        "experts": tuple(experts(layer, 8, 2, 64, 96) for layer in range(3)),
    }
    return ModelSpec(**{**sizes, **changed})


sizes = st.integers(0, 1 << 34)

specs = st.builds(
    spec,
    vocab_size=st.integers(1, 300_000),
    hidden_size=st.integers(1, 9000),
    layer_count=st.integers(1, 100),
    dense_nbytes=sizes,
    load_scratch_nbytes=sizes,
    kv_nbytes_per_token=st.integers(0, 1 << 20),
    kv_fixed_nbytes=st.integers(0, 1 << 24),
    activation_nbytes_per_token=st.integers(0, 1 << 20),
    attention_nbytes_per_token=st.integers(0, 1 << 16),
    experts=st.lists(
        st.builds(
            experts,
            layer=st.integers(0, 99),
            count=st.integers(1, 300),
            top_k=st.integers(1, 8),
            hidden=st.integers(1, 3000),
            intermediate=st.integers(1, 3000),
        ),
        min_size=1,
        max_size=5,
    ).map(tuple),
)

workloads = st.builds(
    Workload,
    context_tokens=st.integers(1, 1 << 20),
    batch=st.integers(1, 64),
    prefill_chunk_tokens=st.integers(1, 4096),
)
