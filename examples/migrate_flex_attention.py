"""FlexAttention's code with one import changed: the same values, and gradients on a CPU."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from tilewright.compat.flex_attention import (
    create_block_mask,
    flex_attention,
)  # was: torch.nn.attention.flex_attention

documents = torch.tensor([0] * 100 + [1] * 250 + [2] * 162)  # three documents packed into a row of 512


def within_document(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    return (documents[q] == documents[kv]) & (q >= kv)


torch.manual_seed(0)
q = torch.randn(1, 8, 512, 64, requires_grad=True)
k, v = (torch.randn(1, 2, 512, 64, requires_grad=True) for _ in range(2))
mask = create_block_mask(within_document, None, None, 512, 512, device="cpu")
out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
gradients = torch.autograd.grad(out.square().sum(), (q, k, v))

dense = (documents[:, None] == documents) & torch.ones(512, 512, dtype=torch.bool).tril()
expected = scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True)
expected_gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
for ours, theirs in zip(gradients, expected_gradients, strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
print(f"{mask.sparsity():.0f}% of the mask's blocks are empty; output and gradients are SDPA's")
