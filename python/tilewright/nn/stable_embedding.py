"""StableEmbedding: an embedding whose training survives 8-bit optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import suggests_keywords
from ..optim.manager import GlobalOptimManager


@suggests_keywords
class StableEmbedding(torch.nn.Embedding):
    """An embedding with Xavier-uniform weights, a layer norm after the lookup and 32-bit optimizer states.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: columns of the table.
        padding_idx: a row that is zero and stays so.
        max_norm, norm_type: as in torch.nn.Embedding.
        scale_grad_by_freq: as in torch.nn.Embedding.
        sparse: as in torch.nn.Embedding. The optimizers of this package refuse the gradients it makes.
        _weight: the table, ``(num_embeddings, embedding_dim)``, instead of a fresh one.
        device, dtype: of the table. The norm is kept in torch's default dtype.

    Input: indices, int32 or int64, any shape. Output: ``(*input.shape, embedding_dim)`` of the table's dtype;
    the norm is computed in its own.

    Source: Dettmers et al. (arXiv 2110.02861), section 2.3; arguments as bitsandbytes.nn.StableEmbedding.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
            dtype=dtype,
        )
        self.norm = torch.nn.LayerNorm(embedding_dim, device=device)
        self._keep_32bit()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._keep_32bit()

    def _keep_32bit(self) -> None:
        GlobalOptimManager.get_instance().register_module_override(self, "weight", {"optim_bits": 32})

    def reset_parameters(self) -> None:
        """Draws the table anew."""
        torch.nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        """Looks indices up and normalizes what it finds."""
        looked_up = super().forward(input)
        normalized: Tensor = self.norm(looked_up.to(self.norm.weight.dtype))
        return normalized.to(self.weight.dtype)
