"""Matrices of a quantised checkpoint in memory: codes and scales, and the weights that they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from formats.pack import code_values
from placement.tensors import ComponentSource, EncodedSpan

_WEIGHTS_AT_ONCE = 1 << 18


@dataclass(frozen=True, eq=False)
class EncodedMatrix:
    """A matrix of N outputs and K inputs as it is stored; see `placement.tensors.EncodedSpan`.

    Attributes:
        encoding: "mxfp4" or "fp8".
        codes: uint8 [N, K / 32, 16], or float8_e4m3fn [N, K].
        scales: uint8 [N, K / 32], or floats [ceil(N / rows), ceil(K / columns)].
        block: (rows, columns) that share a scale.
    """

    encoding: str
    codes: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return (self.codes.shape[0], self.codes[0].numel() * (2 if self.encoding == "mxfp4" else 1))

    def rows(self, first: int, step: int, count: int) -> EncodedMatrix | None:
        """The rows first, first + step, ...; None where they are not whole blocks of scales."""
        end = first + step * count
        height = self.block[0]
        if height == 1:
            scales = self.scales[first:end:step]
        elif step == 1 and first % height == 0:
            scales = self.scales[first // height : -(-end // height)]
        else:
            return None
        return EncodedMatrix(self.encoding, self.codes[first:end:step], scales, self.block)

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights, [N, K]; see `decode_into`."""
        out = torch.empty(self.shape, dtype=dtype)
        self.decode_into(out)
        return out

    def decode_into(self, out: torch.Tensor) -> None:
        """Write the weights: each its code's value times its scale in fp32, rounded once to the dtype of `out`.

        Args:
            out: [N, K] of any floating dtype, on the CPU.
        """
        if self.encoding == "mxfp4":
            self._decode_mxfp4(out)
        else:
            self._decode_fp8(out)

    def _decode_mxfp4(self, out: torch.Tensor) -> None:
        rows, columns = self.shape
        step = max(1, _WEIGHTS_AT_ONCE // columns)
        pairs, powers = _pairs(), _powers()
        for first in range(0, rows, step):
            codes, scales = self.codes[first : first + step], self.scales[first : first + step]
            values = pairs.index_select(0, codes.reshape(-1).int()).view(torch.bfloat16).view(*scales.shape, 32)
            # bf16 has e2m1's mantissa and more, and the exponents of every scale: nothing is rounded.
            values *= powers.index_select(0, scales.reshape(-1).int()).view(*scales.shape, 1)
            out[first : first + step] = values.view(-1, columns)

    def _decode_fp8(self, out: torch.Tensor) -> None:
        rows, columns = self.shape
        height, width = self.block
        for index, scales in enumerate(self.scales):
            part = slice(index * height, min((index + 1) * height, rows))
            factors = scales.float().repeat_interleave(width)[:columns]
            out[part] = self.codes[part].float() * factors


def pick_encoded(matrix: EncodedMatrix, source: ComponentSource) -> EncodedMatrix | torch.Tensor:
    """A component out of the matrix that `source.span`, an EncodedSpan, stands for.

    Returns:
        the component, encoded where it is whole rows and blocks of the stored matrix, otherwise its weights in fp32.
    """
    transposed = isinstance(source.span, EncodedSpan) and source.span.transposed
    whole = (source.first, source.step, source.count) == (0, 1, source.span.shape[source.axis])
    if source.transposed == transposed:
        picked = matrix if whole else None
        if not whole and source.axis == (1 if transposed else 0):
            picked = matrix.rows(source.first, source.step, source.count)
        if picked is not None:
            return picked
    decoded = matrix.decode(torch.float32)
    decoded = decoded.mT if transposed else decoded
    return pick_component(decoded, source)


def pick_component(stored: torch.Tensor, source: ComponentSource) -> torch.Tensor:
    """The component out of the tensor that `source.span` holds, as a view of it."""
    end = source.first + source.step * source.count
    index = [slice(None)] * stored.dim()
    index[source.axis] = slice(source.first, end, source.step)
    picked = stored[tuple(index)]
    return picked.transpose(0, 1) if source.transposed else picked


def _pairs() -> torch.Tensor:
    """Twice the two values of each byte of MXFP4 codes in bf16, as one int32: int32 [256]."""
    values = 2 * torch.from_numpy(code_values("mxfp4")).to(torch.bfloat16)
    byte = torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], 1).view(torch.int32).view(-1)


def _powers() -> torch.Tensor:
    """Half the value of each e8m0 scale, bf16 [256]. 255, which is no number there, is 2^128 as for transformers."""
    return torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - 128).to(torch.bfloat16)
