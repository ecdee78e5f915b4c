"""What the planner knows of a model: sizes, never tensors."""

from __future__ import annotations

from dataclasses import dataclass

from formats.bundle import BUNDLE_ALIGNMENT_BYTES, BundleLayout
from formats.elements import ELEMENT_FORMATS
from formats.packed import MatrixLayout
from placement.kv import KvShape


@dataclass(frozen=True)
class ExpertsSpec:
    """The routed experts of one layer.

    Attributes:
        module: the experts module's path in the transformers model, such as "model.layers.3.mlp.experts".
        count: experts in the layer.
        top_k: experts that a token is routed to.
        layout: bytes of one expert.
    """

    module: str
    count: int
    top_k: int
    layout: BundleLayout

    @property
    def nbytes(self) -> int:
        """Bytes of all experts of the layer, padding included."""
        return self.count * self.layout.nbytes


@dataclass(frozen=True)
class LinearSpec:
    """Linear layers of one shape in one decoder layer, or the output layer.

    Attributes:
        rows: outputs.
        columns: inputs.
        format: of the weights, as they are kept.
        count: layers of this shape.
    """

    rows: int
    columns: int
    format: str
    count: int = 1

    @property
    def weights(self) -> int:
        """Weights of all of them."""
        return self.rows * self.columns * self.count

    @property
    def nbytes(self) -> int:
        """Bytes of their weights, biases not counted."""
        if self.format in ELEMENT_FORMATS:
            return ELEMENT_FORMATS[self.format].nbytes(self.weights)
        return self.count * MatrixLayout(self.rows, self.columns, self.format).nbytes


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer, its routed experts not counted.

    Attributes:
        dense_nbytes: bytes of its weights and buffers.
        linears: every linear layer: projections, shared experts, router.
        kv_nbytes_per_token: growth of one sequence's cache with a token.
        attention_values: products of queries with keys and of weights with values, for one new and one cached token.
        window_tokens: how far back attention looks, None for all.
        experts: index into `ModelSpec.experts`, None for a layer without.
        kv_format: of the blocks in which its cache lies; None for one in one piece.
        attention_heads: of queries, each of which has a score for one new and one cached token.
    """

    dense_nbytes: int
    linears: tuple[LinearSpec, ...]
    kv_nbytes_per_token: int
    attention_values: int
    window_tokens: int | None
    experts: int | None
    kv_format: str | None = None
    attention_heads: int = 0

    @property
    def dense_format(self) -> str | None:
        """Format of its linear layers, which is that of the first; None where there is none."""
        return self.linears[0].format if self.linears else None


@dataclass(frozen=True)
class ModelSpec:
    """A model by its sizes.

    Invariant: `experts` is ordered by layer; `expert key = sum of counts of earlier entries + expert id`.

    Attributes:
        name: what the user called the model: a path or a Hub id.
        model_type: transformers' name of the architecture.
        dtype: name of the element format in which the model computes: "bf16", "fp16" or "fp32".
        dense_format: name of the format that the decoder's linear layers are kept in, experts not counted.
        head_format: name of the format of the output layer.
        vocab_size: entries of the output vocabulary.
        hidden_size: width of the residual stream.
        layer_count: decoder layers, MoE or not.
        max_context_tokens: longest sequence that the model was made for.
        dense_nbytes: bytes of all weights and buffers that are not routed experts, tied weights counted once.
        load_scratch_nbytes: bytes that loading holds beside the weights that are loaded, at most.
        kv_nbytes_per_token: bytes by which the cache of one sequence grows with a token, all layers together.
        kv_fixed_nbytes: bytes of the cache of one sequence that do not grow (linear attention, convolution states).
        activation_nbytes_per_token: bytes of activations alive at once for one new token of a forward pass, at most.
        attention_nbytes_per_token: bytes that attention holds beside for one cached token, at most.
        experts: one entry for each MoE layer; empty for a dense model.
        layers: one entry for each decoder layer; empty where sizes are enough and speed is not asked for.
        head: the output layer, None where `layers` is empty.
        head_is_shared: the output layer's weights are the embedding's, and no bytes of their own.
        kept_products_nbytes: bytes of code that torch's products keep on the host, where sizes change with every token.
        kv_shapes: keys and values of each layer of the cache; None where it is a window or a state, which is not paged.
    """

    name: str
    model_type: str
    dtype: str
    dense_format: str
    head_format: str
    vocab_size: int
    hidden_size: int
    layer_count: int
    max_context_tokens: int
    dense_nbytes: int
    load_scratch_nbytes: int
    kv_nbytes_per_token: int
    kv_fixed_nbytes: int
    activation_nbytes_per_token: int
    attention_nbytes_per_token: int
    experts: tuple[ExpertsSpec, ...]
    layers: tuple[LayerSpec, ...] = ()
    head: LinearSpec | None = None
    head_is_shared: bool = False
    kept_products_nbytes: int = 0
    kv_shapes: tuple[KvShape | None, ...] = ()

    @property
    def expert_count(self) -> int:
        """Experts of all layers together."""
        return sum(layer.count for layer in self.experts)

    @property
    def expert_nbytes(self) -> int:
        """Bytes of all experts."""
        return sum(layer.nbytes for layer in self.experts)

    @property
    def bundle_nbytes(self) -> int:
        """Bytes of the largest expert: the size of a slot; of a dense model the least that a slot can have."""
        return max((layer.layout.nbytes for layer in self.experts), default=BUNDLE_ALIGNMENT_BYTES)

    @property
    def expert_format(self) -> str:
        """Name of the experts' format; of a dense model that in which it computes."""
        return self.experts[0].layout.format if self.experts else self.dtype

    @property
    def top_k(self) -> int:
        """Experts that a token is routed to in one layer, at most."""
        return max((layer.top_k for layer in self.experts), default=0)
