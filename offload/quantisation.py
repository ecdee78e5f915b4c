"""Which parts of a model are kept in which packed format, checked at the door."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from formats.packed import PACKED_FORMATS
from offload.errors import InvalidArgumentError

PARTS = ("experts", "dense", "lm_head")

AUTO = "auto"
"""A format that the planner chooses."""

_HEAD_OF_FORMAT = {"int4": "int8", "mxfp4": "int8"}
"""What one format for the whole model means for the output layer, where it is not the same: its errors go straight into
the probabilities, and it is a small part of the bytes. docs/performance.md has the figures."""


@dataclass(frozen=True)
class Quantisation:
    """A packed format, None for the dtype that the model computes in, or AUTO for what is left open, for each part.

    Attributes:
        experts: routed experts; in the store as in memory.
        dense: the decoder's other linear layers: attention, dense MLPs, shared experts. Routers, embeddings, norms
            and convolutions are never quantised.
        lm_head: the output layer. Where it shares its weights with the embedding, that one stays as it is.
    """

    experts: str | None = None
    dense: str | None = None
    lm_head: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether a part's format is to be chosen."""
        return AUTO in (self.experts, self.dense, self.lm_head)

    def candidates(self, own: str | None = None) -> list[Quantisation]:
        """What it may become, the most precise first; itself where nothing is open.

        Args:
            own: packed format that keeps the values of a quantised checkpoint, None of one that is not.
        """
        choices = [_UNQUANTISED, *([] if own is None else [_OF_CHECKPOINT[own]]), *_ROUNDED]
        return list(dict.fromkeys(self._filled(choice) for choice in choices))

    def _filled(self, choice: Quantisation) -> Quantisation:
        return Quantisation(**{part: getattr(choice if getattr(self, part) == AUTO else self, part) for part in PARTS})


_UNQUANTISED = Quantisation()
_ROUNDED = (Quantisation("int8", "int8", "int8"), Quantisation("int4", "int4", "int8"))
"""What AUTO may become. Of as many bits, fp8_e4m3 and mxfp4 are less precise and no faster (docs/performance.md)."""

_OF_CHECKPOINT = {
    "mxfp4": Quantisation("mxfp4", "int8", "int8"),
    "fp8_e4m3": Quantisation("fp8_e4m3", "fp8_e4m3", "int8"),
}
"""And of a checkpoint whose weights are in a format already: what is in it stays in it, and loses nothing."""


def make_quantisation(quant: str | Mapping[str, str | None] | None) -> Quantisation:
    """Resolve a user's argument.

    Args:
        quant: a format for the whole model ("int4" and "mxfp4" take int8 for the output layer), formats by part, or
            None. Parts that are not named are not quantised. "auto" leaves the format open.

    Raises:
        InvalidArgumentError: naming what it may be and what it was.
    """
    if quant is None:
        return Quantisation()
    if isinstance(quant, str):
        format = _format("quant", quant)
        return Quantisation(format, format, _HEAD_OF_FORMAT.get(quant, format))
    if not isinstance(quant, Mapping):
        raise InvalidArgumentError(f"quant={quant!r}: expected one of {_known()}, formats by part, or None")
    unknown = [part for part in quant if part not in PARTS]
    if unknown:
        raise InvalidArgumentError(f"quant={dict(quant)!r}: no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return Quantisation(**{part: _format(f"quant[{part!r}]", format) for part, format in quant.items()})


def parse_quantisation(text: str) -> str | dict[str, str | None]:
    """The command line's spelling: a format or auto, or `part=format` joined by commas; `none` is no format.

    Raises:
        InvalidArgumentError: neither; formats and parts are checked by `make_quantisation`.
    """
    if "=" not in text:
        return text
    formats: dict[str, str | None] = {}
    for entry in text.split(","):
        part, equals, format = entry.partition("=")
        if not equals or part in formats:
            raise InvalidArgumentError(
                f"quant={text!r}: expected one of {_known()}, or parts such as experts=int4,dense=int8, each once"
            )
        formats[part] = None if format == "none" else format
    return formats


def _format(name: str, format: object) -> str | None:
    if format is not None and (not isinstance(format, str) or format not in (AUTO, *PACKED_FORMATS)):
        raise InvalidArgumentError(f"{name}={format!r}: expected one of {_known()}")
    return format


def _known() -> str:
    return ", ".join((*PACKED_FORMATS, AUTO))
