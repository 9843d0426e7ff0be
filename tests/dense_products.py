"""Watches the dense product, on any processor."""

from __future__ import annotations

import pytest
from torch import Tensor

from tilewright import _C
from tilewright.scan import dense


def watched_products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Makes our dense product the faster one here; returns the shapes of the rows it will be given."""
    shapes: list[tuple[int, ...]] = []
    matmul = dense._matmul

    def watched(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.append(tuple(a.shape))
        return matmul(a, b, bias)

    monkeypatch.setattr(dense, "is_better", lambda: True)
    monkeypatch.setattr(dense, "_matmul", watched)
    monkeypatch.setattr(_C, "cpu_level", lambda: "avx512")
    return shapes
