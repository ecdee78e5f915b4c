"""The tensors of a quantised checkpoint as those of the unquantised model.

Codes and scales of a tensor become one entry of the tensor's own name and shape, so that everything after reads such a
checkpoint as any other. Only headers are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from formats.packed import MXFP4
from offload.checkpoint.dtypes import DTYPE_BITS
from offload.checkpoint.mismatch import DOWNLOAD_AGAIN, mismatch
from offload.checkpoint.quantised import Encoding
from placement.tensors import EncodedSpan, TensorSpan, encoded_span

_BLOCKS, _SCALES = "_blocks", "_scales"
_SCALE_INV = "_scale_inv"
_GROUP = MXFP4.group
_FP8 = "F8_E4M3"
_FP8_SCALES = ("F32", "BF16", "F16")


def decoded_tensors(tensors: Mapping[str, TensorSpan], encoding: Encoding, dtype: str) -> dict[str, TensorSpan]:
    """Put codes and scales together.

    Args:
        tensors: the checkpoint's, by key.
        encoding: how its config says that they are quantised.
        dtype: tag of the dtype that the model computes in. MXFP4 becomes BF16 in any case, which holds every value.

    Returns:
        by key: EncodedSpans in place of codes and scales, and the other tensors as they are.

    Raises:
        CheckpointError: codes without scales or scales without codes, shapes that do not belong together, or dtypes
            that the encoding does not have.
    """
    return _decoded_mxfp4(tensors) if encoding.method == "mxfp4" else _decoded_fp8(tensors, encoding, dtype)


def decoding_nbytes(tensors: Mapping[str, TensorSpan]) -> int:
    """Bytes that decoding one of these tensors takes at most: its codes, its scales and its weights in fp32."""
    spans = [span for span in tensors.values() if isinstance(span, EncodedSpan)]
    return max((span.codes.nbytes + span.scales.nbytes + 4 * prod(span.shape) for span in spans), default=0)


def _decoded_mxfp4(tensors: Mapping[str, TensorSpan]) -> dict[str, TensorSpan]:
    decoded: dict[str, TensorSpan] = {}
    for key, span in tensors.items():
        if key.endswith(_SCALES):
            blocks = f"{key.removesuffix(_SCALES)}{_BLOCKS}"
            if blocks not in tensors:
                raise mismatch(span.file, tensor=key, expected=f"{blocks!r} for these scales", found="none")
        elif key.endswith(_BLOCKS):
            name = key.removesuffix(_BLOCKS)
            scales = _partner(tensors, key, f"{name}{_SCALES}")
            if span.dtype != "U8" or len(span.shape) < 3 or span.shape[-1] != _GROUP // 2 or not prod(span.shape):
                raise mismatch(
                    span.file, tensor=key, expected=f"U8 [..., rows, groups, {_GROUP // 2}]", found=_described(span)
                )
            _check_scales(f"{name}{_SCALES}", scales, span.shape[:-1], ("U8",))
            _check_free(tensors, name, key)
            decoded[name] = encoded_span("mxfp4", span, scales, (1, _GROUP), "BF16", DTYPE_BITS["BF16"])
        else:
            decoded[key] = span
    return decoded


def _decoded_fp8(tensors: Mapping[str, TensorSpan], encoding: Encoding, dtype: str) -> dict[str, TensorSpan]:
    rows, columns = encoding.block
    decoded: dict[str, TensorSpan] = {}
    for key, span in tensors.items():
        if key.endswith(_SCALE_INV):
            weights = key.removesuffix(_SCALE_INV)
            if weights not in tensors:
                raise mismatch(span.file, tensor=key, expected=f"{weights!r} for these scales", found="none")
            if tensors[weights].dtype != _FP8:
                raise mismatch(
                    tensors[weights].file, tensor=weights, expected=f"dtype {_FP8}, as {key!r} scales it",
                    found=tensors[weights].dtype,
                )  # fmt: skip
        elif not span.dtype.startswith("F8"):
            decoded[key] = span
        else:
            scales = _partner(tensors, key, f"{key}{_SCALE_INV}")
            if span.dtype != _FP8 or len(span.shape) < 2 or not prod(span.shape):
                raise mismatch(span.file, tensor=key, expected=f"{_FP8} [..., rows, columns]", found=_described(span))
            *others, height, width = span.shape
            grid = (*others, -(-height // rows), -(-width // columns))
            _check_scales(f"{key}{_SCALE_INV}", scales, grid, _FP8_SCALES)
            decoded[key] = encoded_span("fp8", span, scales, encoding.block, dtype, DTYPE_BITS[dtype])
    return decoded


def _partner(tensors: Mapping[str, TensorSpan], key: str, scales: str) -> TensorSpan:
    if scales not in tensors:
        raise mismatch(
            tensors[key].file, tensor=key, expected=f"its scales in {scales!r}", found="none",
            fix=f"{DOWNLOAD_AGAIN}; codes without scales are no weights",
        )  # fmt: skip
    return tensors[scales]


def _check_scales(key: str, span: TensorSpan, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if span.dtype not in dtypes or span.shape != shape:
        expected = f"{' or '.join(dtypes)} {list(shape)}, one scale for each block of codes"
        raise mismatch(span.file, tensor=key, expected=expected, found=_described(span))


def _check_free(tensors: Mapping[str, TensorSpan], name: str, key: str) -> None:
    if name in tensors:
        raise mismatch(
            tensors[name].file, tensor=name, expected=f"codes of {name!r} in {key!r} alone", found="weights too"
        )


def _described(span: TensorSpan) -> str:
    return f"{span.dtype} {list(span.shape)}"
