"""Dense weights of a module as one block of bytes, and pointing the module's tensors into such a block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from offload.devices.base import Device, Slab

_ALIGNMENT_BYTES = 64


class DenseWeights:
    """The parameters and buffers of some modules, each tensor once, laid out one after the other.

    Tensors stay the objects that they are: only their memory changes, so whoever holds one sees it move.

    Attributes:
        nbytes: of the block.
    """

    def __init__(self, modules: Iterable[nn.Module], leave: Iterable[nn.Module] = ()) -> None:
        """Lay out; nothing moves.

        Args:
            modules: with all below them.
            leave: modules whose own tensors, and those below, are not meant.
        """
        left = {id(tensor) for module in leave for tensor in _tensors(module)}
        self._modules = [child for module in modules for child in module.modules()]
        self._places: list[tuple[torch.Tensor, int]] = []
        known: set[int] = set()
        at = 0
        for module in dict.fromkeys(self._modules):
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is None or id(tensor) in known or id(tensor) in left or tensor.is_meta:
                    continue
                known.add(id(tensor))
                self._places.append((tensor, at))
                at += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self.nbytes = at

    def move_to(self, device: Device) -> Slab:
        """Move all tensors to a slab of a device, for good; whoever keeps the slab keeps them.

        Raises:
            DoesNotFitError: the device has no room.
        """
        slab = device.allocate(max(self.nbytes, 1))
        self.copy_to(slab.tensor())
        self.point_to(slab.tensor())
        return slab

    def copy_to(self, block: torch.Tensor) -> None:
        """Copy all tensors to a block, uint8 [nbytes or more] on any device."""
        for tensor, at in self._places:
            _view(block, tensor, at).copy_(tensor.detach())

    def point_to(self, block: torch.Tensor) -> None:
        """Let the tensors be views of a block that has their bytes."""
        for tensor, at in self._places:
            tensor.data = _view(block, tensor, at)
        for module in self._modules:
            moved = getattr(module, "weights_moved", None)
            if moved is not None:
                moved()


def alignment_nbytes(model: nn.Module, layers: Sequence[nn.Module], *, quantised: bool) -> int:
    """Bytes that a block of a model's dense weights, and a window of two layers, take beside the weights, at most.

    Args:
        model: or its skeleton.
        layers: its decoder layers.
        quantised: a matrix may become three tensors.
    """
    widest = max((len(_tensors(layer)) for layer in layers), default=0)
    return _ALIGNMENT_BYTES * (3 if quantised else 1) * (len(_tensors(model)) + 2 * widest)


def _view(block: torch.Tensor, tensor: torch.Tensor, at: int) -> torch.Tensor:
    nbytes = tensor.numel() * tensor.element_size()
    return block[at : at + nbytes].view(tensor.dtype).view(tensor.shape)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
