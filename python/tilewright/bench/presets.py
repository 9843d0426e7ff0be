"""Sizes of published models, as their configs state them, and what of a model each family times.

`tilewright bench --preset NAME` makes its cases from these by the code that makes all others. One layer is
enough: a model is a stack of it.
"""

from __future__ import annotations

from dataclasses import dataclass

_WIDTH = 4  # of the causal convolution in every Mamba


@dataclass(frozen=True)
class Attention:
    """`length` is the longest sequence it was trained on; `window` 0 where it sees all of it."""

    heads: int
    kv_heads: int
    head_dim: int
    length: int
    causal: bool = True
    window: int = 0


@dataclass(frozen=True)
class Mlp:
    """`gated`: two projections up, of which one is the gate."""

    inner: int
    gated: bool = True


@dataclass(frozen=True)
class Scan:
    """A Mamba block's recurrence. `heads` is 0 in Mamba-1, which has a step size a channel."""

    inner: int
    states: int
    heads: int = 0

    @property
    def head_dim(self) -> int:
        """Channels of a head of Mamba-2."""
        return self.inner // self.heads


@dataclass(frozen=True)
class Model:
    """A model: `hidden` channels, `layers` times the same layer. `config` is where its sizes were read."""

    config: str
    layers: int
    hidden: int
    attention: Attention | None = None
    mlp: Mlp | None = None
    scan: Scan | None = None

    @property
    def family(self) -> str:
        """What kind of layer it is a stack of."""
        if self.scan is None:
            return "llama" if self.mlp and self.mlp.gated else "encoder"
        return "mamba2" if self.scan.heads else "mamba"

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear layer of one layer of the model, by what it does."""
        found: dict[str, tuple[int, int]] = {}
        if self.attention:
            queries = self.attention.heads * self.attention.head_dim
            keys = self.attention.kv_heads * self.attention.head_dim
            found |= {"q": (queries, self.hidden), "k": (keys, self.hidden), "v": (keys, self.hidden)}
            found |= {"o": (self.hidden, queries)}
        if self.mlp:
            found |= {"gate": (self.mlp.inner, self.hidden)} if self.mlp.gated else {}
            found |= {"up": (self.mlp.inner, self.hidden), "down": (self.hidden, self.mlp.inner)}
        if self.scan and self.scan.heads:
            columns = 2 * self.scan.inner + 2 * self.scan.states + self.scan.heads
            found |= {"in": (columns, self.hidden), "out": (self.hidden, self.scan.inner)}
        elif self.scan:
            rank, inner, states = -(-self.hidden // 16), self.scan.inner, self.scan.states
            found |= {"in": (2 * inner, self.hidden), "x": (rank + 2 * states, inner), "dt": (inner, rank)}
            found |= {"out": (self.hidden, inner)}
        return found

    def parameters(self) -> list[tuple[int, ...]]:
        """Shapes of the parameters of one layer, without biases of linear layers."""
        found: list[tuple[int, ...]] = list(self.linear_layers().values())
        found += [(self.hidden,)] * (2 if self.attention else 1)  # norms
        if self.scan and self.scan.heads:
            channels = self.scan.inner + 2 * self.scan.states
            return [*found, (channels, _WIDTH), (channels,), *[(self.scan.heads,)] * 3, (self.scan.inner,)]
        if self.scan:
            inner = self.scan.inner
            return [*found, (inner, _WIDTH), (inner,), (inner, self.scan.states), (inner,), (inner,)]
        return found


MODELS = {
    "llama-1b": Model("meta-llama/Llama-3.2-1B", 16, 2048, Attention(32, 8, 64, 131072), Mlp(8192)),
    "llama-8b": Model("meta-llama/Meta-Llama-3-8B", 32, 4096, Attention(32, 8, 128, 8192), Mlp(14336)),
    "mistral-7b": Model(
        "mistralai/Mistral-7B-v0.1", 32, 4096, Attention(32, 8, 128, 32768, window=4096), Mlp(14336)
    ),
    "qwen-0.5b": Model("Qwen/Qwen2.5-0.5B", 24, 896, Attention(14, 2, 64, 32768), Mlp(4864)),
    "qwen-7b": Model("Qwen/Qwen2.5-7B", 28, 3584, Attention(28, 4, 128, 131072), Mlp(18944)),
    "bert-base": Model(
        "google-bert/bert-base-uncased", 12, 768, Attention(12, 12, 64, 512, causal=False), Mlp(3072, False)
    ),
    "vit-b": Model(
        "google/vit-base-patch16-224", 12, 768, Attention(12, 12, 64, 197, causal=False), Mlp(3072, False)
    ),
    "mamba-130m": Model("state-spaces/mamba-130m", 24, 768, scan=Scan(1536, 16)),
    "mamba-2.8b": Model("state-spaces/mamba-2.8b", 64, 2560, scan=Scan(5120, 16)),
    "mamba2-130m": Model("state-spaces/mamba2-130m", 24, 768, scan=Scan(1536, 128, 24)),
    "mamba2-1.3b": Model("state-spaces/mamba2-1.3b", 48, 2048, scan=Scan(4096, 128, 64)),
}
