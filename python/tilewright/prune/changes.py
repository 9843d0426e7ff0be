"""What pruning is about to do to one weight, done and taken back exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layers import Target
from .masked import drop_mask, mask_of, set_mask


class Change:
    """One weight's new mask and, for criteria that change kept weights too, its new values.

    While it is not applied, the model is as it was. `apply` writes the pruned weight, `revert` the former
    one, any number of times; `commit` sets the masks, after which `revert` takes these back, too.

    Args:
        target: whose weight.
        mask: bool, of the weight as a matrix; True = kept.
        values: the pruned weight as a matrix. None: the present one, with zeros where the mask is False.
    """

    def __init__(self, target: Target, mask: Tensor, values: Tensor | None = None) -> None:
        self.target = target
        self.mask = target.as_matrix(mask)
        self.applied = self.committed = False
        weight = target.weight.detach()
        self.other = None
        if values is not None:
            self.other = target.as_matrix(values).to(weight.dtype).masked_fill(~self.mask, 0.0)
        self.removed = None if self.other is not None else weight.masked_select(~self.mask)
        self.former_masks = [mask_of(module) for module in target.modules]

    @torch.no_grad()
    def pruned_matrix(self) -> Tensor:
        """The weight as it is, or would be, after `apply`."""
        weight = self.target.weight.detach()
        if self.applied:
            return self.target.as_matrix(weight)
        return self.target.as_matrix(
            weight.masked_fill(~self.mask, 0.0) if self.other is None else self.other
        )

    @torch.no_grad()
    def apply(self) -> None:
        """Writes the pruned weight."""
        if self.applied:
            return
        weight = self.target.weight
        if self.other is None:
            weight.masked_fill_(~self.mask, 0.0)
        else:
            self._exchange(weight)
        self.applied = True

    @torch.no_grad()
    def revert(self) -> None:
        """Writes the weight as it was, and its masks if they have changed."""
        if self.committed:
            for module in self.target.modules:
                drop_mask(module)
        if self.applied:
            weight = self.target.weight
            if self.removed is None:
                self._exchange(weight)
            else:
                weight.masked_scatter_(~self.mask.to(weight.device), self.removed.to(weight))
            self.applied = False
        if self.committed:
            for module, former in zip(self.target.modules, self.former_masks, strict=True):
                if former is not None:
                    set_mask(module, former)
            self.committed = False

    def commit(self) -> None:
        """Makes it last: applies it, and sets the masks."""
        self.apply()
        self.committed = True
        for module in self.target.modules:
            set_mask(module, self.mask)
        present = mask_of(self.target.modules[0])
        assert present is not None
        self.mask = present  # one copy for both

    def is_current(self) -> bool:
        """Whether nobody has pruned this weight again since `commit`."""
        present = mask_of(self.target.modules[0])
        return present is self.mask or _equal(present, self.mask)

    def _exchange(self, weight: Tensor) -> None:
        assert self.other is not None
        present = weight.detach().clone()
        weight.copy_(self.other)
        self.other = present


def revert_all(changes: Sequence[Change]) -> None:
    """Takes all of them back."""
    for change in reversed(changes):
        change.revert()


def _equal(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape and torch.equal(a, b.to(a.device))
