"""CrossoverLinear: one linear layer in several forms, each where it is the fastest."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, is_grad_enabled, nn

from .._checks import check_count, check_tensor


class CrossoverLinear(nn.Module):
    """The same linear layer dense and sparse, or in two sparse forms; the number of tokens decides which one.

    It costs the memory of all its forms. Since only one set of weights can be trained, its parameters are
    frozen; gradients of the input flow. To train the layer, take `to_linear`.

    Args:
        forms: modules with `in_features` and `out_features` that compute the same, each once.
        steps: (tokens, form): up to that number of tokens, inclusive, the form of that index runs; ascending.
        beyond: the index of the form that runs for more tokens than the last step has.

    Input: ``(*, in_features)``; tokens are all positions of the leading axes. A traced or compiled model has
    the choice for each number of tokens made when it is compiled, and is compiled again on the other side of
    a step.

    Raises:
        ValueError: forms of different sizes, steps that do not ascend, an index without a form.
    """

    def __init__(self, forms: Sequence[nn.Module], steps: Sequence[tuple[int, int]], beyond: int) -> None:
        super().__init__()
        if not forms:
            raise ValueError("forms must have at least one module")
        self.in_features, self.out_features = _sizes(forms[0])
        for index, form in enumerate(forms):
            if _sizes(form) != (self.in_features, self.out_features):
                raise ValueError(
                    f"forms[{index}] must have {self.in_features} inputs and {self.out_features} outputs as "
                    f"forms[0], got {_sizes(form)}"
                )
        limits = [limit for limit, _ in steps]
        for limit in limits:
            check_count("steps: tokens", limit)
        if limits != sorted(set(limits)):
            raise ValueError(f"steps must ascend in tokens, got {limits}")
        for choice in (*(form for _, form in steps), beyond):
            if not 0 <= choice < len(forms):
                raise ValueError(f"steps and beyond must be indices of {len(forms)} forms, got {choice}")
        self.forms = nn.ModuleList(forms)
        self.steps = tuple((int(limit), int(form)) for limit, form in steps)
        self.beyond = beyond
        self.requires_grad_(False)

    @property
    def bias(self) -> Tensor | None:
        """The bias, which all forms have."""
        found: Tensor | None = self.forms[0].bias  # type: ignore[assignment]
        return found

    def form_for(self, tokens: int) -> nn.Module:
        """The form that runs for so many tokens."""
        for limit, form in self.steps:
            if tokens <= limit:
                return self.forms[form]
        return self.forms[self.beyond]

    def to_linear(self) -> nn.Linear:
        """The dense layer, trainable; it shares no memory with this one."""
        dense = next((form for form in self.forms if isinstance(form, nn.Linear)), None)
        made: Any = self.forms[0].to_linear() if dense is None else copy.deepcopy(dense)  # type: ignore[operator]
        linear: nn.Linear = made.requires_grad_(True).train(self.training)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """y ``(*, out_features)`` of x ``(*, in_features)``."""
        if is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            raise RuntimeError(
                "a CrossoverLinear holds its weights in several forms, and training would tear them apart: "
                "freeze it with requires_grad_(False), or train its to_linear()"
            )
        check_tensor("x", x)
        tokens = 1
        for length in x.shape[:-1]:
            tokens = tokens * length
        y: Tensor = self.form_for(tokens)(x)
        return y

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for name in ("weight", "bias"):  # of the dense layer: each form takes its own out of them
            value = state_dict.pop(prefix + name, None)
            if value is not None:
                state_dict.update({f"{prefix}forms.{i}.{name}": value for i in range(len(self.forms))})
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """Sizes, and which form runs when."""
        steps = ", ".join(f"form {form} up to {limit}" for limit, form in self.steps)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, tokens: {steps}, "
            f"form {self.beyond} beyond"
        )


def _sizes(form: Any) -> tuple[int, int]:
    return int(form.in_features), int(form.out_features)
