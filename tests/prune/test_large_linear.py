"""Elements behind the 2^31st of a linear layer's tensors; on the emulator, the same at sizes it can do."""

from __future__ import annotations

import torch
from tests.prune.block_sparse_cases import make_layer, random

from backends import LARGE, Backend
from tilewright.prune.ops.block_sparse import _fwd, _input_gradient, _weight_gradient


@LARGE
def test_tokens_beyond_32_bits(backend: Backend) -> None:
    """Elements of x and y behind the 2^31st: the last tokens get what they get alone."""
    into, tokens = (8192, 2**18 + 400) if backend.name == "cuda" else (512, 700)
    layer = make_layer(into, into, (128, 128), 0.1, torch.bfloat16, backend.device)
    x = torch.zeros(tokens, into, dtype=torch.bfloat16, device=backend.device)
    x[-300:] = random(300, into, dtype=torch.bfloat16, device=backend.device)
    y, _ = _fwd(x, layer.values, layer.pattern, None, into, "none", False)
    alone, _ = _fwd(x[-300:], layer.values, layer.pattern, None, into, "none", False)
    torch.testing.assert_close(y[-300:], alone)
    assert not y[:300].any()
    dx = _input_gradient(x, layer.values, layer.pattern, into)
    torch.testing.assert_close(dx[-300:], _input_gradient(x[-300:], layer.values, layer.pattern, into))
    shape = list(layer.values.shape)
    dvalues = _weight_gradient(x, x, layer.pattern, shape)
    torch.testing.assert_close(dvalues, _weight_gradient(x[-300:], x[-300:], layer.pattern, shape))
