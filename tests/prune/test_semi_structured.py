"""The semi-structured linear layer's kernels: formats bit by bit, results and gradients against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semi_cases import FLOATS, HALVES, Run, check_close, n_of, pruned, random
from torch import Tensor

import tilewright.testing
from reference import prune_semi_structured as reference
from tilewright import _C
from tilewright.prune.ops import semi_structured as ops
from tilewright.prune.patterns import NOfM
from tilewright.prune.semi_structured import (
    compress_weight,
    decompress_weight,
    fitting_pattern,
    wrong_groups,
)

PATTERNS = ["2:4", "1:4", "3:8", "2:5", "7:31", "3:32"]
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.float16: torch.int16,
        torch.bfloat16: torch.int16}  # fmt: skip


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(BITS[tensor.dtype])


# ---- formats ----


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_pattern_of_a_group(backend, dtype):
    """All 16 of two neighbouring groups; those of more than two are refused."""
    fitting = [kept for kept in itertools.product([0, 1], repeat=4) if sum(kept) <= 2]
    rows = [first + second for first in fitting for second in fitting]
    kept = torch.tensor(rows, dtype=torch.bool)
    weight = random(*kept.shape, dtype=dtype).masked_fill(~kept, 0)
    values, indices = compress_weight(weight.to(backend.device))
    expected = reference.compress(weight, kept, 2, 4)
    assert torch.equal(bits(values), bits(expected[0]))
    assert torch.equal(indices.cpu(), expected[1])
    assert not wrong_groups(indices, 8, NOfM(2, 4)).any()
    assert torch.equal(bits(decompress_weight(values, indices)), bits(weight))


@pytest.mark.parametrize("kept", [k for k in itertools.product([0, 1], repeat=4) if sum(k) > 2])
def test_groups_that_keep_too_many(kept):
    weight = torch.zeros(3, 12)
    weight[1, 8:] = torch.tensor(kept, dtype=torch.float32)
    with pytest.raises(ValueError, match=rf"2:4: row 1, group 2 \(columns 8 to 11\) keeps {sum(kept)}"):
        compress_weight(weight)


@pytest.mark.parametrize("pattern", [*PATTERNS, "1:2", "31:32", "5:16"])
@pytest.mark.parametrize("out", [1, 7])
@pytest.mark.parametrize("groups", [0, 1, 2, 9])
def test_formats(backend, pattern, out, groups):
    n, m = n_of(pattern)
    weight = pruned(out, groups * m, pattern, torch.bfloat16)
    weight[:, ::3] = 0  # groups that are not full
    values, indices = compress_weight(weight.to(backend.device), pattern)
    expected = reference.compress(weight, weight != 0, n, m)
    assert torch.equal(bits(values), bits(expected[0]))
    assert torch.equal(indices.cpu(), expected[1])
    assert not wrong_groups(indices, groups * m, NOfM(n, m)).any()
    assert torch.equal(bits(decompress_weight(values, indices, pattern)), bits(weight))


def test_negative_zeros_and_nan_bits(backend):
    """-0.0 is pruned, unless it fills a group up; kept elements keep all their bits."""
    payload = torch.tensor([0x7FC12345, -0x3FEDCC], dtype=torch.int32).view(torch.float32)
    weight = torch.tensor([[0.0, 0.0, 1.0, -0.0, 0.0, 2.0, -0.0, 3.0, -0.0, 0.0, 0.0, 0.0]])
    weight[0, 0], weight[0, 10] = payload[0], payload[1]
    values, indices = compress_weight(weight.to(backend.device))
    expected = [weight[0, 0], weight[0, 2], weight[0, 5], weight[0, 7], weight[0, 8], weight[0, 10]]
    assert torch.equal(bits(values[0]), bits(torch.stack(expected)))
    dense = decompress_weight(values, indices).cpu()
    assert torch.equal(bits(dense)[0, [3, 6]], torch.zeros(2, dtype=torch.int32))
    assert torch.equal(bits(dense)[0, 8], bits(weight)[0, 8])


def test_a_mask_decides_what_is_kept(backend):
    weight = torch.zeros(2, 8)
    weight[:, 5] = 1.0
    mask = torch.tensor([False, False, True, True, False, True, False, False]).expand(2, 8)
    values, indices = compress_weight(weight.to(backend.device), mask=mask.to(backend.device))
    expected = reference.compress(weight, mask, 2, 4)
    assert torch.equal(values.cpu(), expected[0])
    assert torch.equal(indices.cpu(), expected[1])


@pytest.mark.parametrize("pattern", ["2:4", "3:8"])
def test_strided_weights(backend, pattern):
    weight = pruned(24, 48, pattern)
    strided = torch.empty(48, 24).t().copy_(weight).to(backend.device)
    for a, b in zip(compress_weight(weight, pattern), compress_weight(strided, pattern), strict=True):
        assert torch.equal(a.cpu(), b.cpu())


def test_fitting_pattern():
    assert fitting_pattern(pruned(3, 16, "2:4")) == NOfM(2, 4)
    assert fitting_pattern(pruned(3, 16, "1:8")) == NOfM(2, 4)
    assert fitting_pattern(pruned(3, 48, "5:16")) == NOfM(5, 16)
    assert fitting_pattern(pruned(30, 48, "3:4")) == NOfM(3, 4)
    assert fitting_pattern(torch.zeros(3, 8)) == NOfM(2, 4)
    with pytest.raises(ValueError, match=r"\(3, 16\) fits no n:m pattern: .* keep 4 of 4, 8 of 8, 16 of 16"):
        fitting_pattern(torch.ones(3, 16))
    with pytest.raises(ValueError, match=r"rows of 15 do not divide into groups of 4, 8, 16"):
        fitting_pattern(torch.ones(3, 15))


# ---- results and gradients ----


def make_run(
    tokens: int, out: int, columns: int, pattern: str, dtype: torch.dtype, activation: str, bias: bool
) -> Run:
    weight = pruned(out, columns, pattern, dtype, seed=1) / columns**0.5
    b = random(out, dtype=dtype, seed=2) if bias else None
    return Run(
        random(tokens, columns, dtype=dtype), weight, b, random(tokens, out, dtype=dtype, seed=3), activation
    )


def check(run: Run, pattern: str, backend, dtype: torch.dtype) -> None:
    check_close(run.ours(pattern, backend.device), run.plain(dtype), run.plain(torch.float64), dtype)


# tokens, out, in: each way a kernel goes, with ragged edges
SIZES = [
    (0, 5, 8),
    (1, 7, 12),
    (3, 65, 96),
    (8, 4, 160),
    (9, 33, 64),
    (13, 5, 1028),
    (33, 129, 72),
    (65, 63, 36),
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_two_of_four(backend, sizes, dtype):
    check(make_run(*sizes, "2:4", dtype, "none", True), "2:4", backend, dtype)


@pytest.mark.parametrize("pattern", PATTERNS[1:])
@pytest.mark.parametrize("tokens", [1, 7, 17, 65])
@pytest.mark.parametrize("dtype", FLOATS)
def test_other_patterns(backend, pattern, tokens, dtype):
    m = n_of(pattern)[1]
    check(
        make_run(tokens, 9, 3 * m if m > 8 else 5 * m, pattern, dtype, "none", False), pattern, backend, dtype
    )


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations(backend, activation, tokens, dtype):
    check(make_run(tokens, 10, 32, "2:4", dtype, activation, True), "2:4", backend, dtype)


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_long_rows(backend, tokens):
    """Several of the pieces that rows are walked in, and their remainders."""
    for dtype in FLOATS:
        check(make_run(tokens, 6, 2052, "2:4", dtype, "none", True), "2:4", backend, dtype)


def strided(x: Tensor, kind: str) -> Tensor:
    if kind == "transposed":
        return torch.empty(x.shape[1], x.shape[0], dtype=x.dtype).t().copy_(x)
    if kind == "gaps":
        return torch.empty(x.shape[0], 2 * x.shape[1] + 1, dtype=x.dtype)[:, ::2][:, : x.shape[1]].copy_(x)
    return x[:1].expand_as(x)


@pytest.mark.parametrize("kind", ["transposed", "gaps", "expanded"])
@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides(backend, kind, tokens, dtype):
    run = make_run(tokens, 16, 64, "2:4", dtype, "none", True)
    x, weight, bias, dy = run.inputs
    check(Run(strided(x, kind), weight, bias, strided(dy, kind), "none"), "2:4", backend, dtype)


@settings(max_examples=25)
@given(
    tokens=st.integers(0, 70), out=st.integers(1, 70), groups=st.integers(1, 40),
    pattern=st.sampled_from(PATTERNS), dtype=st.sampled_from(FLOATS),
    activation=st.sampled_from(ops.ACTIVATIONS),
    level=st.sampled_from(_C.cpu_levels()), kind=st.sampled_from(["plain", "transposed", "gaps", "expanded"]),
)  # fmt: skip
def test_any_sizes(tokens, out, groups, pattern, dtype, activation, level, kind):
    before = _C.cpu_level()
    _C.set_cpu_level(level)
    try:
        run = make_run(tokens, out, groups * n_of(pattern)[1], pattern, dtype, activation, True)
        x, *rest = run.inputs
        run = Run(x if kind == "plain" else strided(x, kind), *rest, activation)
        found = run.ours(pattern, torch.device("cpu"))
        check_close(found, run.plain(dtype), run.plain(torch.float64), dtype)
    finally:
        _C.set_cpu_level(before)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("tokens", [1, 7, 90])
def test_activations_are_as_exact_as_float32(backend, activation, tokens):
    """Relative to the result, also where it is small; what exponents round to grows with them."""
    x = torch.linspace(-9, 9, tokens * 4).reshape(tokens, 4).to(backend.device)
    values, indices = (t.to(backend.device) for t in compress_weight(pruned(37, 4, "2:4"), "2:4"))
    y, z = ops._fwd(x, values, indices, None, 2, 4, activation, True)
    z = z.double()
    exact = {
        "relu": lambda: z.clamp(min=0),
        "gelu": lambda: z * torch.special.erfc(-z / 2**0.5) / 2,
        "gelu_tanh": lambda: z * torch.sigmoid((8 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)),
        "silu": lambda: z * torch.sigmoid(z),
    }[activation]()
    allowed = 1e-6 * exact.abs() * (1 + z.abs() ** 3 / 16) + 1e-30
    assert bool(((y.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("pattern", ["2:4", "2:5"])
@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
def test_gradcheck(pattern, activation):
    n, m = n_of(pattern)
    values, indices = compress_weight(pruned(5, 20, pattern, torch.float64), pattern)
    x, bias = random(4, 20, dtype=torch.float64), random(5, dtype=torch.float64, seed=5)
    leaves = [t.requires_grad_() for t in (x, values, bias)]
    torch.autograd.gradcheck(lambda x, v, b: ops.linear(x, v, indices, b, n, m, activation), leaves)


def test_no_second_derivative():
    values, indices = compress_weight(pruned(4, 8, "2:4"))
    y = ops.linear(random(2, 8).requires_grad_(), values.requires_grad_(), indices, None, 2, 4, "none")
    with pytest.raises(NotImplementedError, match=r"SemiStructuredLinear has no second derivative"):
        torch.autograd.grad(y.sum(), values, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 4, 30])
def test_same_bits_every_time(dtype, tokens):
    run = make_run(tokens, 70, 132, "2:4", dtype, "none", True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run.ours("2:4", torch.device("cpu"))[:3])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("tokens", [2, 17])
def test_same_bits_for_every_order_of_warps(tokens):
    for dtype in HALVES:
        run = make_run(tokens, 20, 80, "2:4", dtype, "none", True)
        results = []
        for seed in (1, 2, 3):
            with tilewright.testing.emulated(seed=seed):
                results.append(run.ours("2:4", torch.device("cpu"))[:3])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("tokens", [1, 20])
def test_nan_and_infinity(backend, tokens):
    """Where a kept weight meets them; a pruned weight may or may not."""
    weight = pruned(8, 32, "2:4")
    values, indices = compress_weight(weight.to(backend.device))
    x = random(tokens, 32)
    x[0, 3] = float("nan")
    y = ops.linear(x.to(backend.device), values, indices, None, 2, 4, "none").cpu()
    assert y[0][weight[:, 3] != 0].isnan().all()
    assert y[1:].isfinite().all()


# ---- as torch ops ----


@pytest.mark.parametrize("pattern", ["2:4", "3:8"])
def test_opcheck(pattern):
    n, m = n_of(pattern)
    weight = pruned(6, 16, pattern)
    values, indices = compress_weight(weight, pattern)
    x, dz, bias = random(3, 16), random(3, 6), random(6)
    checks = [
        (ops._fwd, (x, values, indices, bias, n, m, "gelu", True)),
        (ops._fwd, (x, values, indices, None, n, m, "none", False)),
        (ops._input_gradient, (dz, values, indices, n, m)),
        (ops._weight_gradient, (dz, x, values, indices, n, m)),
        (ops.compress, (weight, None, n, m)),
        (ops.decompress, (values, indices, n, m)),
    ]
    for op, arguments in checks:
        torch.library.opcheck(op, arguments)


# ---- bad input ----


def test_bad_weights():
    weight = pruned(4, 8, "2:4")
    with pytest.raises(TypeError, match=r"pattern must be 'n:m' .*, got 24"):
        compress_weight(weight, 24)
    for text in ("2:4:8", "a:4", "-2:4", "", "row"):
        with pytest.raises(ValueError, match=r"pattern must be .n:m. .*got"):
            compress_weight(weight, text)
    for text in ("4:4", "0:4", "2:33"):
        with pytest.raises(ValueError, match=f"pattern '{text}': needs 1 <= n < m <= 32"):
            compress_weight(weight, text)
    with pytest.raises(ValueError, match=r"rows of 8 elements, which do not divide into groups of 5"):
        compress_weight(weight, "2:5")
    with pytest.raises(
        TypeError, match=r"weight must have dtype float32, float16, bfloat16, float64, got int"
    ):
        compress_weight(torch.zeros(2, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"weight must have shape \(out, in\), got \(4,\)"):
        compress_weight(torch.zeros(4))
    with pytest.raises(TypeError, match=r"mask must have dtype bool"):
        compress_weight(weight, mask=torch.zeros(4, 8))
    with pytest.raises(ValueError, match=r"weight is not zero where the mask prunes it, at row 0"):
        compress_weight(weight, mask=torch.zeros(4, 8, dtype=torch.bool))


def test_bad_compressed_forms():
    values, indices = compress_weight(pruned(4, 8, "2:4"))
    wrong = indices.clone()
    wrong[2, 0] = wrong[2, 0] & 15
    with pytest.raises(ValueError, match=r"indices are not those of 2:4: row 2, group 1"):
        decompress_weight(values, wrong)
    with pytest.raises(ValueError, match=r"indices must have shape \(out, ceil\(in / 8\)\) = \(4, 1\)"):
        decompress_weight(values, indices[:3])
    with pytest.raises(TypeError, match=r"indices must have dtype uint8, got int64"):
        decompress_weight(values, indices.long())
    with pytest.raises(ValueError, match=r"indices are not those of 1:2: row"):
        decompress_weight(values, torch.full_like(indices, 255), "1:2")


def test_the_binding_checks_too():
    values, indices = compress_weight(pruned(4, 8, "2:4"))
    with pytest.raises(TypeError, match=r"x must have dtype float32, got float64"):
        ops._fwd(random(2, 8, dtype=torch.float64), values, indices, None, 2, 4, "none", False)
    with pytest.raises(ValueError, match=r"x: must have shape \(2, 8\), got \(2, 9\)"):
        ops._fwd(random(2, 9), values, indices, None, 2, 4, "none", False)
    with pytest.raises(ValueError, match=r"positions: must have shape \(4, 1\), got \(4, 2\)"):
        ops._fwd(random(2, 8), values, indices.repeat(1, 2), None, 2, 4, "none", False)
    with pytest.raises(ValueError, match=r"values must be contiguous"):
        ops._fwd(random(2, 8), values.t().contiguous().t(), indices, None, 2, 4, "none", False)
