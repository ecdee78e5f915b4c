"""Putting dense weights where the plan has them: for good in an accelerator's memory, or in a window through it."""

from __future__ import annotations

from transformers import PreTrainedModel

from offload.devices.base import Accelerator, Slab
from offload.errors import UnsupportedModelError
from offload.hf.dense_weights import DenseWeights
from offload.hf.dense_window import DenseWindow
from offload.hf.layer_kinds import decoder_layers
from placement.plan import VramPlan


class DensePlacement:
    """Dense weights of a model as a plan places them.

    Attributes:
        window: through which layers stream, None where all lie in the accelerator's memory.
    """

    def __init__(self, model: PreTrainedModel, plan: VramPlan, accelerator: Accelerator) -> None:
        """Move them.

        Args:
            model: with its dense weights in host memory; nothing has noted where they lie.
            plan: with dense weights in the accelerator's memory.
            accelerator: the plan's.

        Raises:
            DoesNotFitError: the accelerator has less room than the plan says.
            UnsupportedModelError: a layer that streams shares a weight with another module.
        """
        layers = [layer for _, layer in decoder_layers(model)]
        streamed = [layer for index, layer in enumerate(layers) if index not in plan.dense_layers]
        if not plan.window_layers:
            streamed = []
        seen: set[int] = set()
        for layer in streamed:
            own = {id(tensor) for tensor in (*layer.parameters(), *layer.buffers())}
            if seen & own:
                raise UnsupportedModelError(
                    f"{type(model).__name__}: decoder layers share weights, and cannot stream one by one; give more "
                    "vram="
                )
            seen |= own
        self._slabs: list[Slab] = [DenseWeights([model], leave=streamed).move_to(accelerator)]
        self.window = DenseWindow(accelerator, streamed, plan.window_layers) if streamed else None

    @property
    def bytes_copied(self) -> int:
        """Bytes that streamed since the model was loaded."""
        return 0 if self.window is None else self.window.bytes_copied

    def close(self) -> None:
        """Stop copying. Weights stay where they are as long as the model does."""
        if self.window is not None:
            self.window.close()
