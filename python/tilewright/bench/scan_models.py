"""Whole models of the scan family: a transformers model as it comes, and the same model swapped.

The work counted is that of the matrix products, 2 * parameters * tokens forward and twice that backward; the
scan's own is small beside it in FLOPs, and everything beside it in what the stock model spends.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from .case import OURS, Call, Case, Contender, Plan, peer

_LAYERS, _VOCABULARY = 2, 256
_LONG = 2048  # tokens, as Mamba-2 was trained with


def cases(plan: Plan) -> list[Case]:
    """Training, prefill and decode of small Mamba models with random weights, or of two layers of a model."""
    length = 128 if plan.quick else 512
    if plan.model:
        if plan.model.scan is None:
            return []
        kinds = [
            _Model("Mamba2" if plan.model.family == "mamba2" else "Mamba", plan.device, plan.model.hidden)
        ]
    else:
        kinds = [_Model(kind, plan.device) for kind in ("Mamba", "Mamba2")]
    found = [
        case for kind in kinds for case in (_training(kind, length), _forward(kind, length), _decode(kind))
    ]
    if plan.quick:
        return [found[1], found[-1]]
    if not plan.model:  # of Mamba-2 alone: a step of the other stock model takes minutes at this length
        found.append(_training(kinds[-1], _LONG, f"training_{_LONG}"))
    return found


class _Model:
    """A stock model, made when first needed, and swapped copies of it with the same weights."""

    def __init__(self, kind: str, device: torch.device, hidden: int = 768) -> None:
        self.kind, self.device, self.hidden = kind, device, hidden
        self.name = kind.lower()
        self._stock: Any = None

    def stock(self) -> Any:
        transformers = peer("transformers")
        if self._stock is None:
            config = {"hidden_size": self.hidden, "num_hidden_layers": _LAYERS, "vocab_size": _VOCABULARY}
            if self.kind == "Mamba2":
                config.update(num_heads=2 * self.hidden // 64, head_dim=64, n_groups=1)
            torch.manual_seed(0)
            make = getattr(transformers, f"{self.kind}ForCausalLM")
            self._stock = make(getattr(transformers, f"{self.kind}Config")(**config)).to(self.device)
        return copy.deepcopy(self._stock)

    def swapped(self) -> Any:
        import tilewright as tw

        model = self.stock()
        tw.swap(model)
        return model

    def tokens(self, length: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randint(_VOCABULARY, (1, length), generator=generator, device=self.device)

    def linear_layers(self, tokens: int, training: bool) -> Call:
        """A call that runs every linear layer once on as many tokens, and back if `training`."""
        layers = [layer for layer in self.stock().modules() if isinstance(layer, torch.nn.Linear)]
        inputs = [torch.randn(1, tokens, layer.in_features, device=self.device) for layer in layers]

        def step() -> None:
            for layer, x in zip(layers, inputs, strict=True):
                layer(x)

        def step_and_back() -> None:
            for layer, x in zip(layers, inputs, strict=True):
                out = layer(x.requires_grad_())
                torch.autograd.grad(out, [x, *layer.parameters()], out.detach())

        return step_and_back if training else torch.inference_mode()(step)

    def flops(self, tokens: int) -> float:
        """Of the matrix products of one forward pass."""
        inner = 2 * self.hidden
        if self.kind == "Mamba":
            rank, states = self.hidden // 16, 16
            layer = self.hidden * 2 * inner + inner * (rank + 2 * states) + rank * inner + inner * self.hidden
        else:
            layer = self.hidden * (2 * inner + 2 * 128 + inner // 64) + inner * self.hidden
        return 2.0 * tokens * (_LAYERS * layer + self.hidden * _VOCABULARY)


def _case(model: _Model, work: str, title: str, run: Callable[[Any], Call], tokens: int, passes: int) -> Case:
    """`run` gives a model's call. The linear layers alone are torch's: `scan.dense` may be faster."""
    return Case(
        f"{model.name}_{work}",
        f"{model.kind}: {title}",
        [
            Contender(OURS, lambda: run(model.swapped())),
            Contender("transformers", lambda: run(model.stock())),
            Contender(
                "torch, linear layers alone", lambda: model.linear_layers(tokens, passes > 1), yardstick=True
            ),
        ],
        flops=passes * model.flops(tokens),
        sizes={"hidden": model.hidden, "layers": _LAYERS, "tokens": tokens, "dtype": "float32"},
    )


def _training(model: _Model, length: int, work: str = "training") -> Case:
    def run(network: Any) -> Call:
        network.train()
        tokens = model.tokens(length)

        def step() -> None:
            network.zero_grad(set_to_none=True)
            network(tokens, labels=tokens, use_cache=False).loss.backward()

        return step

    return _case(model, work, f"forward and backward of {length} tokens", run, length, 3)


def _forward(model: _Model, length: int) -> Case:
    def run(network: Any) -> Call:
        network.eval()
        tokens = model.tokens(length)
        return torch.inference_mode()(lambda: network(tokens, use_cache=False))

    return _case(model, "forward", f"forward of {length} tokens", run, length, 1)


def _decode(model: _Model) -> Case:
    def run(network: Any) -> Call:
        network.eval()
        prompt = model.tokens(16)
        with torch.inference_mode():
            cache = network(prompt, use_cache=True).cache_params
        return torch.inference_mode()(lambda: network(prompt[:, :1], cache_params=cache, use_cache=True))

    return _case(model, "decode", "one token of greedy decoding", run, 1, 1)
