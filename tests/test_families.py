"""What every differentiable op owes its callers, whatever its family."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import tilewright as tw
from tilewright import attention, scan
from tilewright.prune import activation_ops
from tilewright.prune.ops import block_sparse, semi_structured


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def selective_scan() -> tuple[Callable[..., Tensor], list[Tensor]]:
    u, delta, A, B, C = tensors((2, 24, 300), (2, 24, 300), (24, 4), (2, 4, 300), (2, 4, 300))
    return scan.selective_scan, [u, delta.sigmoid(), -A.exp(), B, C]


def mamba_inner() -> tuple[Callable[..., Tensor], list[Tensor]]:
    xz, conv, x_proj, delta_proj, out_proj, A = tensors(
        (2, 24, 200), (12, 4), (10, 12), (12, 2), (5, 12), (12, 4)
    )
    return (
        lambda xz, conv, x_proj, delta_proj, out_proj, A: scan.mamba_inner(
            xz, conv, None, x_proj, delta_proj, out_proj, None, A
        ),
        [xz, conv, x_proj, delta_proj, out_proj, -A.exp()],
    )


def ssd_chunk_scan() -> tuple[Callable[..., Tensor], list[Tensor]]:
    x, dt, A, B, C = tensors((2, 100, 4, 16), (2, 100, 4), (4,), (2, 100, 1, 16), (2, 100, 1, 16))
    return lambda *t: scan.ssd_chunk_scan(*t, chunk_size=32), [x, dt.sigmoid(), -A.exp(), B, C]


def block_sparse_attention() -> tuple[Callable[..., Tensor], list[Tensor]]:
    mask = attention.BlockMask.sliding_window(300, 100, block_size=64)
    shapes = [(1, heads, 300, 32) for heads in (4, 2, 2)]
    return lambda q, k, v: attention.block_sparse_attention(q, k, v, mask), tensors(*shapes)


def pruned(pattern: str | tw.prune.Block) -> nn.Linear:
    layer = nn.Linear(96, 64)
    with torch.no_grad():
        layer.weight.mul_(tw.prune.mask(layer.weight, pattern, None if pattern == "2:4" else 0.5))
    return layer


def block_sparse_linear() -> tuple[Callable[..., Tensor], list[Tensor]]:
    layer = tw.nn.BlockSparseLinear.from_linear(pruned(tw.prune.Block(16, 16)), block=16)
    return (
        lambda x, values, bias: block_sparse.block_sparse_linear(x, values, layer._pattern, bias, 64, "gelu"),
        [*tensors((70, 96)), layer.values.detach(), layer.bias.detach()],
    )


def semi_structured_linear() -> tuple[Callable[..., Tensor], list[Tensor]]:
    layer = tw.nn.SemiStructuredLinear.from_linear(pruned("2:4"))
    return (
        lambda x, values, bias: semi_structured.linear(x, values, layer.indices, bias, 2, 4, "none"),
        [*tensors((70, 96)), layer.values.detach(), layer.bias.detach()],
    )


def activation_sparse_linear() -> tuple[Callable[..., Tensor], list[Tensor]]:
    x, weight_t, bias = tensors((2, 96), (96, 64), (64,))
    scale = torch.ones(96)

    def half(x: Tensor, *weights: Tensor) -> Tensor:
        return activation_ops.activation_sparse_linear(x, scale, None, 48, *weights)

    return half, [x, weight_t, bias]


CASES = {
    "selective_scan": selective_scan,
    "mamba_inner": mamba_inner,
    "ssd_chunk_scan": ssd_chunk_scan,
    "linear_scan": lambda: (scan.linear_scan, tensors((2, 300, 40), (2, 300, 40))),
    "causal_conv1d": lambda: (scan.causal_conv1d, tensors((2, 24, 300), (24, 4), (24,))),
    "gated_rms_norm": lambda: (scan.gated_rms_norm, tensors((2, 150, 100), (100,), (2, 150, 100))),
    "block_sparse_attention": block_sparse_attention,
    "block_sparse_linear": block_sparse_linear,
    "semi_structured_linear": semi_structured_linear,
    "activation_sparse_linear": activation_sparse_linear,
}


@pytest.mark.parametrize("case", CASES)
def test_forward_mode_is_refused(case: str) -> None:
    """It would take a result without a tangent for one that does not depend on the inputs."""
    function, inputs = CASES[case]()
    for i, x in enumerate(inputs):

        def of_one(x: Tensor, i: int = i) -> Tensor:
            return function(*inputs[:i], x, *inputs[i + 1 :])

        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
            of_one(forward_ad.make_dual(x, torch.ones_like(x)))
        with pytest.raises(RuntimeError, match="functorch transforms"):
            torch.func.jvp(of_one, (x,), (torch.ones_like(x),))


def test_decode_steps_refuse_forward_mode() -> None:
    x, state, weight = tensors((2, 8), (2, 8, 4), (8, 4))
    ssm, A, B = tensors((2, 8, 16), (8, 16), (2, 16))
    cases: list[tuple[str, Callable[[Tensor], Tensor], Tensor]] = [
        ("x", lambda x: scan.causal_conv1d_update(x, state, weight), x),
        ("conv_state", lambda state: scan.causal_conv1d_update(x, state, weight), state),
        ("dt", lambda dt: scan.selective_state_update(ssm, x, dt, A, B, B), x),
    ]
    for name, function, at in cases:
        before = [t.clone() for t in (state, ssm)]
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"{name} has a tangent"):
            function(forward_ad.make_dual(at, torch.ones_like(at)))
        with pytest.raises(NotImplementedError, match=f"{name} has a tangent"):
            torch.func.jvp(function, (at,), (torch.ones_like(at),))
        assert all(torch.equal(*pair) for pair in zip((state, ssm), before, strict=True))


def results(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def same(case: str) -> Callable[[Tensor, Tensor], bool]:
    """mamba_inner's projections are torch's, whose sums depend on the number of threads."""
    return torch.allclose if case == "mamba_inner" else torch.equal


@pytest.mark.parametrize("case", CASES)
def test_threads_at_once(case: str) -> None:
    """Calls from several threads, of which each may have its own number of threads, give the same bits."""
    problem = CASES[case]()
    expected, found, threads = results(*problem), [], torch.get_num_threads()

    def work(number: int) -> None:
        torch.set_num_threads(number)
        found.extend(results(*problem) for _ in range(3))

    workers = [threading.Thread(target=work, args=(number,)) for number in (1, 2, 3)]
    try:
        for worker in workers:
            worker.start()
    finally:
        for worker in workers:
            worker.join()
        torch.set_num_threads(threads)
    assert len(found) == 9
    assert all(map(same(case), [t for other in found for t in other], expected * 9))


@pytest.mark.parametrize("case", CASES)
def test_more_threads_than_there_can_be_shares(case: str) -> None:
    problem, threads = CASES[case](), torch.get_num_threads()
    expected = results(*problem)
    try:
        torch.set_num_threads(70)
        assert all(map(same(case), results(*problem), expected))
    finally:
        torch.set_num_threads(threads)
