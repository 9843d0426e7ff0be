"""Watches the dense product, on any processor."""

from __future__ import annotations

from typing import Any

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
    for name, products in _OF_BLOCKS.items():  # which multiply within
        monkeypatch.setattr(_C, name, _watched_block(getattr(_C, name), products, shapes))
    return shapes


# What there is a product for, if it is given, and its rows.
_OF_BLOCKS = {
    "mamba2_inner_fwd": {"in_weight": "input", "out_weight": "inner"},
    "mamba2_inner_bwd": {
        "out_weight": "dout", "dout_weight": "dout", "dinput": "zxbcdt", "din_weight": "zxbcdt",
    },
}  # fmt: skip


def _watched_block(block: Any, products: dict[str, str], shapes: list[tuple[int, ...]]) -> Any:
    def watched(tensors: dict[str, Any], *options: Any) -> None:
        given = [rows for name, rows in products.items() if tensors[name] is not None]
        shapes.extend(tuple(tensors[rows].shape) for rows in given)
        block(tensors, *options)

    return watched
