"""Watches the dense product, on any processor."""

from __future__ import annotations

import pytest
from torch import Tensor

from tilewright import _C
from tilewright.scan import dense


def watched_products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Makes our dense product the faster one here; returns the shapes of the inputs it will be given."""
    shapes: list[tuple[int, ...]] = []
    multiply = dense._multiply

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.append(tuple(x.shape))
        return multiply(x, weight, bias)

    monkeypatch.setattr(dense, "is_better", lambda: True)
    monkeypatch.setattr(dense, "_multiply", watched)
    monkeypatch.setattr(_C, "cpu_level", lambda: "avx512")
    return shapes
