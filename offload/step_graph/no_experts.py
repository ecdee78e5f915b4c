"""The experts of a captured step of a dense model: none, of whom nothing is asked."""

from __future__ import annotations

from typing import NoReturn

import torch

from offload.errors import CaptureError


class NoExperts:
    """In the place of `GraphExperts`.

    Attributes:
        tokens: of a step.
        routed: int64 [0, tokens, 0].
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.routed = torch.empty(0, tokens, 0, dtype=torch.int64)

    def queue(self, *_request: object) -> NoReturn:
        """There is no layer that could ask.

        Raises:
            CaptureError: always.
        """
        raise CaptureError("a dense model asked for experts")

    def announce(self) -> None:
        """Nothing."""

    def check(self) -> None:
        """Nothing."""

    def account(self, step_s: float) -> None:
        """Nothing."""

    def disregard(self) -> None:
        """Nothing."""

    def begin_copies(self) -> None:
        """Nothing."""

    def settle(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""
