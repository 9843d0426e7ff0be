"""A small byte-level language model: a pre-norm transformer decoder that also looks up pairs of bytes.

The table of pairs holds most of the parameters and costs next to no arithmetic, as vocabularies do in larger
models. It makes the optimizer's share of a step what it is there, and the loss after a minute far better.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ByteLanguageModel(nn.Module):
    """Maps bytes, int64 `(batch, length)`, to logits of the next byte, `(batch, length, 256)`."""

    def __init__(self, width: int = 128, depth: int = 4, heads: int = 4, length: int = 64) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.pairs = nn.Embedding(128 * 128, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for table in (self.bytes, self.pairs, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of the byte after each position."""
        previous = F.pad(inputs, (1, 0))[:, :-1]
        # Seven bits each: this is English text, so hardly two pairs share a row.
        pairs = (previous & 127) * 128 + (inputs & 127)
        x = self.bytes(inputs) + self.pairs(pairs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy, in nats per byte."""
        logits: Tensor = self(inputs)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Block(nn.Module):
    """Causal self-attention, then two linear layers with a GELU between; each added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, length, width)` to the same."""
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return y
