"""linear_scan and its gradients against the recurrence in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tilewright
import tilewright.testing
from reference import linear_scan as reference
from tilewright.scan import linear_scan

ops = torch.ops.tilewright
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.complex64]
WIDE = {torch.complex64: torch.complex128, torch.complex128: torch.complex128}
SMALL = [  # shape, dim
    ((2, 7, 5), 1),
    ((2, 65, 33), 1),
    ((1, 9, 127), 1),
    ((2, 3, 63), 2),
    ((3, 1, 129), 2),
    ((2, 1, 17), 1),
    ((5, 1), 1),
    ((70,), 0),
    ((4, 18), 0),
    ((2, 3, 5, 2, 20), 2),
]
LARGE = [((1, 2049, 16), 1), ((3, 2047), 1), ((2, 300, 1100), 1), ((1, 4, 3001), 2)]
EMPTY = [((2, 0, 5), 1), ((0, 4, 5), 1), ((2, 4, 0), 1), ((0,), 0)]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=wide).to(device, dtype)


def decays(shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: torch.device) -> Tensor:
    """Mostly below 1 in magnitude, some above, some negative."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(shape, generator=generator, dtype=torch.float64) * 1.25 - 0.15
    if dtype.is_complex:
        size = size * torch.exp(1j * torch.rand(shape, generator=generator, dtype=torch.float64))
    return size.to(device, dtype)


def inputs(shape: tuple[int, ...], dim: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    state = shape[:dim] + shape[dim + 1 :]
    return [
        decays(shape, dtype, 0, device),
        random(shape, dtype, 1, device),
        random(state, accumulator(dtype), 2, device),
    ]


def results(function: Callable[..., Tensor], tensors: list[Tensor | None], grad: Tensor) -> list[Tensor]:
    """The output and the gradients of the tensors that are there."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad.to(out.dtype))]


def assert_close(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor], roundings: int) -> None:
    """No more than twice the error of plain torch in the same dtype, and a few roundings of the largest."""
    for name, mine, theirs, truth in zip(("h", "da", "db", "dh0"), ours, plain, exact, strict=False):
        assert mine.shape == truth.shape
        if truth.numel() == 0:
            continue
        truth = truth.cpu()
        scale, eps = truth.abs().max().item(), torch.finfo(mine.dtype).eps
        error = (mine.cpu().to(truth.dtype) - truth).abs().max().item()
        allowed = 2 * (theirs.cpu().to(truth.dtype) - truth).abs().max().item() + roundings * scale * eps
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def check(
    tensors: list[Tensor | None],
    dim: int,
    reverse: bool,
    call: Callable[..., Tensor] | None = None,
    truth: Callable[..., Tensor] | None = None,
    roundings: int = 2,
) -> None:
    """`call` against `truth`, by default linear_scan against the reference."""
    a, b, _ = tensors
    call = call or (lambda a, b, h0=None: linear_scan(a, b, h0, dim=dim, reverse=reverse))
    truth = truth or (lambda a, b, h0=None: reference.scan(a, b, h0, dim, reverse))
    grad = random(torch.broadcast_shapes(a.shape, b.shape), b.dtype, 3, b.device)
    ours = results(call, tensors, grad)
    wide = WIDE.get(b.dtype, torch.float64)
    exact = results(truth, [None if t is None else t.to(wide) for t in tensors], grad)
    plain = results(truth, [None if t is None else t.to(b.dtype) for t in tensors], grad)
    assert ours[0].dtype == b.dtype
    assert_close(ours, plain, exact, roundings)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("shape", "dim"), SMALL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(backend, dtype, shape, dim, reverse) -> None:
    check(inputs(shape, dim, dtype, backend.device), dim, reverse)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_without_a_state(backend, dtype, dim) -> None:
    check([*inputs((2, 37, 19), dim, dtype, backend.device)[:2], None], dim, False)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("shape", "dim"), LARGE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_larger_values_and_gradients(backend, dtype, shape, dim, reverse) -> None:
    if backend.name == "emulated" and (dtype != torch.float32 or math.prod(shape) > 50_000):
        shape = tuple(min(size, 300) for size in shape)
    check(inputs(shape, dim, dtype, backend.device), dim, reverse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("shape", "dim"), [((2, 5, 3), 1), ((2, 2, 6), 2), ((1, 4, 18), 1)])
def test_gradcheck(shape, dim, reverse, dtype) -> None:
    tensors = [t.requires_grad_() for t in inputs(shape, dim, dtype, torch.device("cpu"))]
    assert torch.autograd.gradcheck(lambda a, b, h0: linear_scan(a, b, h0, dim=dim, reverse=reverse), tensors)


@pytest.mark.parametrize(("shape", "dim"), EMPTY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_empty(backend, dtype, shape, dim) -> None:
    tensors = [t.requires_grad_() for t in inputs(shape, dim, dtype, backend.device)]
    h = linear_scan(*tensors, dim=dim)
    assert h.shape == shape
    h.abs().sum().backward()
    assert [t.grad.shape for t in tensors] == [t.shape for t in tensors]
    assert bool((tensors[2].grad == 0).all())


# -- layouts ----------------------------------------------------------------------------------------


def layouts(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Decays of one shape (batch, length, channels), in memory in different ways."""
    batch, length, channels = shape
    return {
        "contiguous": decays(shape, dtype, 0, device),
        "length last": decays((batch, channels, length), dtype, 0, device).transpose(1, 2),
        "batch last": decays((length, channels, batch), dtype, 0, device).permute(2, 0, 1),
        "every second": decays((batch, length, 2 * channels), dtype, 0, device)[:, :, ::2],
        "every second step": decays((batch, 2 * length, channels), dtype, 0, device)[:, ::2],
        "offset": decays((batch, length, channels + 1), dtype, 0, device)[:, :, 1:],
        "same for channels": decays((batch, length, 1), dtype, 0, device).expand(shape),
        "same for steps": decays((batch, 1, channels), dtype, 0, device).expand(shape),
        "same for batches": decays((1, length, channels), dtype, 0, device).expand(shape),
        "same for all": decays((1, 1, 1), dtype, 0, device).expand(shape),
    }


LAYOUTS = list(layouts((1, 1, 1), torch.float32, torch.device("cpu")))


@pytest.mark.parametrize("b_layout", ["contiguous", "length last", "batch last", "same for channels"])
@pytest.mark.parametrize("a_layout", LAYOUTS)
def test_any_layout_of_a_and_b(backend, a_layout, b_layout) -> None:
    shape, dtype = (2, 21, 18), torch.complex64 if b_layout == "batch last" else torch.float32
    a = layouts(shape, dtype, backend.device)[a_layout]
    b = layouts(shape, dtype, backend.device)[b_layout] + 0.5
    if b_layout == "same for channels":
        b = b[:, :, :1].expand(shape)
    h0 = random((18, 2), accumulator(dtype), 2, backend.device).t()
    check([a, b, h0], 1, False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_gradient(backend, layout) -> None:
    shape = (2, 21, 18)
    a, b, h0 = inputs(shape, 1, torch.float32, backend.device)
    grad = layouts(shape, torch.float32, backend.device)[layout]
    call = lambda a, b, h0: linear_scan(a, b, h0)  # noqa: E731
    for mine, plain in zip(
        results(call, [a, b, h0], grad), results(call, [a, b, h0], grad.contiguous()), strict=True
    ):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)


def test_inputs_are_not_written_and_nothing_outside_the_output_is(backend) -> None:
    """A view with sentinels around it."""
    for dim in (1, 2):
        a, b, h0 = inputs((2, 19, 23), dim, torch.float32, backend.device)
        copies = [t.clone() for t in (a, b, h0)]
        linear_scan(a, b, h0, dim=dim)
        assert all(torch.equal(t, copy) for t, copy in zip((a, b, h0), copies, strict=True))


def test_h_has_the_layout_of_a_dense_b(backend) -> None:
    a = decays((2, 6, 20), torch.float32, 0, backend.device)
    b = random((2, 20, 6), torch.float32, 1, backend.device).transpose(1, 2)
    assert linear_scan(a, b).stride() == b.stride()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("b_layout", [lambda t: t, lambda t: t.transpose(0, 2).contiguous().transpose(0, 2)])
def test_writes_to_a_tensor_of_the_caller(backend, b_layout, packed) -> None:
    a, b, h0 = inputs((1, 6, 33), 1, torch.float32, backend.device)
    b, cu_seqlens = b_layout(b), torch.tensor([0, 2, 6], device=backend.device) if packed else None
    h0 = torch.cat([h0, -h0]) if packed else h0
    room = torch.full((3, 6, 33), math.nan, device=backend.device)
    before = room._version
    h = linear_scan(a, b, h0, cu_seqlens=cu_seqlens, out=room[1:2])
    assert h.data_ptr() == room[1].data_ptr()
    assert room._version > before
    torch.testing.assert_close(room[1:2], linear_scan(a, b, h0, cu_seqlens=cu_seqlens))
    assert room[[0, 2]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_broadcasting(backend, dtype) -> None:
    """Gradients of what is broadcast are sums, of terms that may be larger than the sum."""
    b = random((2, 11, 17), dtype, 1, backend.device)
    for shape in ((17,), (11, 1), (2, 1, 17), (1,)):
        check([decays(shape, dtype, 0, backend.device), b, None], 1, False, roundings=16)
    a = decays((2, 11, 17), dtype, 0, backend.device)
    check([a, random((11, 1), dtype, 1, backend.device), None], 1, True, roundings=16)


def test_dtypes_are_promoted(backend) -> None:
    a, b, h0 = inputs((2, 9, 17), 1, torch.float32, backend.device)
    for low, high in ((torch.bfloat16, torch.float32), (torch.float32, torch.complex64)):
        h = linear_scan(a.to(low), b.to(high), h0)
        assert h.dtype == high
        assert torch.equal(h, linear_scan(a.to(low).to(high), b.to(high), h0))
    assert torch.equal(linear_scan(a, b, h0.bfloat16()), linear_scan(a, b, h0.bfloat16().float()))


def test_real_tensors_that_meet_complex_ones_get_real_gradients(backend) -> None:
    a = decays((2, 9, 17), torch.float32, 0, backend.device).requires_grad_()
    b = random((2, 9, 17), torch.complex64, 1, backend.device).requires_grad_()
    linear_scan(a, b).abs().sum().backward()
    assert a.grad.dtype == torch.float32
    assert b.grad.dtype == torch.complex64


def test_conjugated_views(backend) -> None:
    a, b, h0 = inputs((2, 9, 17), 1, torch.complex64, backend.device)
    expected = linear_scan(a.conj().resolve_conj(), b.conj().resolve_conj(), h0.conj().resolve_conj())
    assert torch.equal(linear_scan(a.conj(), b.conj(), h0.conj()), expected)


def test_autocast_changes_nothing(backend) -> None:
    a, b, h0 = inputs((2, 9, 17), 1, torch.float32, backend.device)
    with torch.autocast(backend.device.type, torch.bfloat16):
        h = linear_scan(a, b, h0)
        low = linear_scan(a.bfloat16(), b.bfloat16(), h0)
    assert h.dtype == torch.float32
    assert torch.equal(h, linear_scan(a, b, h0))
    assert low.dtype == torch.bfloat16


@pytest.mark.parametrize("wanted", ["a", "b", "h0", "ab", "ah0", "bh0"])
@pytest.mark.parametrize("dim", [1, 2])
def test_only_the_gradients_that_are_wanted(backend, dim, wanted) -> None:
    tensors = inputs((2, 21, 18), dim, torch.float32, backend.device)
    everything = results(lambda *t: linear_scan(*t, dim=dim), tensors, torch.ones_like(tensors[1]))[1:]
    for name, tensor in zip(("a", "b", "h0"), tensors, strict=True):
        tensor.requires_grad_(name in wanted)
    linear_scan(*tensors, dim=dim).backward(torch.ones_like(tensors[1]))
    for name, tensor, full in zip(("a", "b", "h0"), tensors, everything, strict=True):
        assert tensor.grad is None if name not in wanted else torch.equal(tensor.grad, full)


# -- packed sequences -------------------------------------------------------------------------------

BOUNDS = [[0, 40], [0, 1, 2, 40], [0, 17, 24, 40], [0, *range(3, 41)]]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((1, 40, 18), 1), ((1, 5, 40), 2), ((40,), 0), ((40, 3, 7), 0)])
def test_packed_sequences(backend, shape, dim, bounds, reverse) -> None:
    if any(size != 1 for size in shape[:dim]):
        shape = (1,) * dim + shape[dim:]
    a, b, _ = inputs(shape, dim, torch.float32, backend.device)
    h0 = random((len(bounds) - 1, *shape[dim + 1 :]), torch.float32, 2, backend.device)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32 if reverse else torch.int64, device=backend.device)
    for state in (None, h0):
        check(
            [a, b, state],
            dim,
            reverse,
            lambda a, b, h0=None: linear_scan(a, b, h0, dim=dim, reverse=reverse, cu_seqlens=cu_seqlens),
            lambda a, b, h0=None: reference.packed(a, b, h0, dim, reverse, bounds),
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_passes_from_one_sequence_to_the_next(backend, bad) -> None:
    a, b, _ = inputs((1, 40, 18), 1, torch.float32, backend.device)
    cu_seqlens = torch.tensor([0, 13, 40], device=backend.device)
    clean = linear_scan(a, b, cu_seqlens=cu_seqlens)
    b[0, 5] = bad
    h = linear_scan(a, b, cu_seqlens=cu_seqlens)
    assert not bool(torch.isfinite(h[0, 5:13]).any())
    assert torch.equal(h[0, 13:], clean[0, 13:])
    assert torch.equal(h[0, :5], clean[0, :5])


def test_no_sequences_at_all(backend) -> None:
    empty = torch.zeros(1, 0, 3, device=backend.device)
    cu_seqlens = torch.zeros(1, dtype=torch.int64, device=backend.device)
    assert linear_scan(empty, empty, torch.zeros(0, 3, device=empty.device), cu_seqlens=cu_seqlens).shape == (
        1,
        0,
        3,
    )


# -- long sequences ---------------------------------------------------------------------------------

LONG = [((40_003,), 0), ((5003, 17), 0), ((2, 2500, 20), 1), ((1, 3, 33_000), 2)]
LONG_BOUNDS = [[0, 1, 30_001, 40_003], [0, 4000, 4001, 5003]]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize(("shape", "dim"), LONG, ids=str)
def test_sequences_that_are_split(backend, shape, dim, dtype, reverse) -> None:
    """Few channels, many steps: chunks are composed before they are swept."""
    check_long(inputs(shape, dim, dtype, backend.device), dim, reverse, None)


@pytest.mark.parametrize(("shape", "dim", "bounds"), [(*LONG[0], LONG_BOUNDS[0]), (*LONG[1], LONG_BOUNDS[1])])
def test_packed_sequences_that_are_split(backend, shape, dim, bounds) -> None:
    a, b, _ = inputs(shape, dim, torch.float32, backend.device)
    h0 = random((len(bounds) - 1, *shape[dim + 1 :]), torch.float32, 2, backend.device)
    check_long([a, b, h0], dim, False, torch.tensor(bounds, device=backend.device))


def check_long(tensors: list[Tensor], dim: int, reverse: bool, cu_seqlens: Tensor | None) -> None:
    """The float64 CPU kernel, which goes step by step, stands for the reference, which would take minutes."""
    grad = random(tuple(tensors[1].shape), tensors[1].dtype, 3, tensors[1].device)
    ours = results(lambda *t: linear_scan(*t, dim=dim, reverse=reverse, cu_seqlens=cu_seqlens), tensors, grad)
    backend, tilewright._backend.C = tilewright._backend.C, tilewright._C
    try:
        wide = [t.cpu().to(WIDE.get(t.dtype, torch.float64)) for t in tensors]
        bounds = None if cu_seqlens is None else cu_seqlens.cpu()
        exact = results(
            lambda *t: linear_scan(*t, dim=dim, reverse=reverse, cu_seqlens=bounds), wide, grad.cpu()
        )
    finally:
        tilewright._backend.C = backend
    for mine, truth in zip(ours, exact, strict=True):
        error = (mine.cpu().to(truth.dtype) - truth).abs().max()
        assert error <= 2e-6 * truth.abs().max()


def test_longer_than_two_to_the_seventeenth() -> None:
    check_long(inputs((1, 140_001, 2), 1, torch.float32, torch.device("cpu")), 1, False, None)


@pytest.mark.nightly
def test_offsets_beyond_two_to_the_31st() -> None:
    """Strides so large that 32-bit offsets would wrap; only the pages that are touched exist."""
    step = 2**29 + 64
    storage = torch.empty(5 * step, dtype=torch.float32)
    a = storage.as_strided((5, 20), (step, 1))
    a.copy_(decays((5, 20), torch.float32, 0, torch.device("cpu")))
    b = random((5, 20), torch.float32, 1, torch.device("cpu"))
    assert torch.equal(linear_scan(a, b, dim=0), linear_scan(a.clone(), b, dim=0))


# -- what is not finite -----------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1])
def test_products_that_overflow_where_the_recurrence_does_not(backend, dim) -> None:
    """a parallel scan multiplies decays: 0 * inf would be NaN."""
    for dtype in (torch.float32, torch.complex64):
        a = torch.full((50, 50), 1e10, dtype=dtype, device=backend.device)
        b = torch.zeros_like(a)
        b[3] = 1e-30 if dim == 1 else 0
        assert bool((linear_scan(a, b * 0, dim=dim) == 0).all())
        check_same_as_steps(a, b, dim)


def test_split_products_that_overflow(backend) -> None:
    for shape in ((34_000,), (3000, 16)):
        a = torch.full(shape, 2.0, device=backend.device)
        b = torch.zeros_like(a)
        a[2000], b[-50] = 0.0, 1.0
        h = linear_scan(a, b, dim=0)
        assert bool((h[:-50] == 0).all())
        assert torch.equal(h[-50:].reshape(50, -1)[:, 0].cpu(), 2.0 ** torch.arange(50))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["a", "b"])
def test_nan_and_infinity_propagate_as_step_by_step(backend, where, bad, dim) -> None:
    a, b, _ = inputs((40, 40), dim, torch.float32, backend.device)
    (a if where == "a" else b)[7, 9] = bad
    (a if where == "a" else b)[20, 30] = bad
    check_same_as_steps(a, b, dim)


def check_same_as_steps(a: Tensor, b: Tensor, dim: int) -> None:
    h, expected = linear_scan(a, b, dim=dim).cpu(), reference.scan(a.cpu(), b.cpu(), None, dim)
    assert torch.equal(torch.isfinite(h), torch.isfinite(expected))
    if not h.is_complex():
        assert torch.equal(h.isnan(), expected.isnan())
        assert torch.equal(h[h.isinf()], expected[h.isinf()])
    finite = torch.isfinite(h)
    torch.testing.assert_close(h[finite], expected[finite], rtol=1e-5, atol=1e-5)


# -- the same bits ----------------------------------------------------------------------------------

REPEATED = [((3, 300, 40), 1), ((3, 40, 300), 2), ((40_000,), 0), ((4000, 16), 0)]


@pytest.mark.parametrize(("shape", "dim"), REPEATED, ids=str)
def test_same_bits_for_any_number_of_threads(shape, dim) -> None:
    tensors = inputs(shape, dim, torch.float32, torch.device("cpu"))
    grad = random(shape, torch.float32, 3, torch.device("cpu"))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(results(lambda *t: linear_scan(*t, dim=dim), tensors, grad))
    finally:
        torch.set_num_threads(before)
    for again in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], again, strict=True))


@pytest.mark.parametrize(("shape", "dim"), [((2, 70, 40), 1), ((3, 2, 150), 2), ((9000,), 0)], ids=str)
def test_same_bits_for_any_seed_of_the_emulator(shape, dim) -> None:
    tensors = inputs(shape, dim, torch.float32, torch.device("cpu"))
    grad = random(shape, torch.float32, 3, torch.device("cpu"))
    found = []
    for seed in (1, 2, 3):
        with tilewright.testing.emulated(seed):
            found.append(results(lambda *t: linear_scan(*t, dim=dim), tensors, grad))
    for again in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], again, strict=True))


# -- properties -------------------------------------------------------------------------------------


@given(data=st.data(), dtype=st.sampled_from(DTYPES), reverse=st.booleans(), with_state=st.booleans())
@settings(max_examples=60)
def test_any_shape_strides_and_options(data, dtype, reverse, with_state) -> None:
    ndim = data.draw(st.integers(1, 4))
    shape = tuple(data.draw(st.lists(st.integers(1, 20), min_size=ndim, max_size=ndim)))
    dim = data.draw(st.integers(0, ndim - 1))
    tensors = inputs(shape, dim, dtype, torch.device("cpu"))
    for i in range(2):
        order = data.draw(st.permutations(range(ndim)))
        back = sorted(range(ndim), key=order.__getitem__)
        tensors[i] = tensors[i].permute(order).contiguous().permute(back)
    if data.draw(st.booleans()):
        axis = data.draw(st.integers(0, ndim - 1))
        tensors[0] = tensors[0].narrow(axis, 0, 1).expand(shape)
    check([*tensors[:2], tensors[2] if with_state else None], dim, reverse)


@given(length=st.integers(1, 60), cut=st.integers(0, 60), dim=st.sampled_from([0, 1]))
@settings(max_examples=40)
def test_a_state_carries_on_where_a_sequence_was_cut(length, cut, dim) -> None:
    shape = (length, 17) if dim == 0 else (3, length)
    a, b, h0 = inputs(shape, dim, torch.float64, torch.device("cpu"))
    whole = linear_scan(a, b, h0, dim=dim)
    cut = min(cut, length - 1)
    first, second = ([t.narrow(dim, *part) for t in (a, b)] for part in ((0, cut), (cut, length - cut)))
    head = linear_scan(*first, h0, dim=dim)
    state = head.select(dim, cut - 1) if cut else h0
    assert torch.equal(whole, torch.cat([head, linear_scan(*second, state, dim=dim)], dim))


def test_reverse_is_the_scan_of_the_flipped_sequence(backend) -> None:
    for shape, dim in (((2, 33, 20), 1), ((2, 3, 77), 2)):
        a, b, h0 = inputs(shape, dim, torch.float32, backend.device)
        flipped = linear_scan(a.flip(dim), b.flip(dim), h0, dim=dim).flip(dim)
        torch.testing.assert_close(linear_scan(a, b, h0, dim=dim, reverse=True), flipped)


# -- the torch ops ----------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(backend, packed) -> None:
    a, b, h0 = inputs((1, 6, 5), 1, torch.float32, backend.device)
    cu_seqlens = torch.tensor([0, 2, 6], device=backend.device) if packed else None
    if packed:
        h0 = random((2, 5), torch.float32, 2, backend.device)
    for state in (None, h0):
        arguments = (a, b, state, cu_seqlens, 1, False, torch.empty_like(b))
        torch.library.opcheck(ops.linear_scan_out.default, arguments)
        torch.library.opcheck(ops.linear_scan_fwd.default, (a, b, state, cu_seqlens, 1, False))
        for h in (None, torch.zeros_like(a)):
            arguments = (b, a, h, state, cu_seqlens, 1, False)
            torch.library.opcheck(ops.linear_scan_bwd.default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_graph_breaks(packed) -> None:
    def loss(a: Tensor, b: Tensor, h0: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return linear_scan(torch.sigmoid(a), b * 2, h0, cu_seqlens=cu_seqlens, reverse=True).square().sum()

    cu_seqlens = torch.tensor([0, 2, 9]) if packed else None
    a, b, h0 = inputs((1, 9, 17), 1, torch.float32, torch.device("cpu"))
    if packed:
        h0 = random((2, 17), torch.float32, 2, torch.device("cpu"))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = []
    for function in (loss, compiled):
        leaves = [t.detach().requires_grad_() for t in (a[:, :, :1], b, h0)]
        value = function(*leaves, cu_seqlens)
        found.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for eager, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, eager)


@pytest.mark.slow
def test_writing_to_a_tensor_compiles_without_graph_breaks() -> None:
    a, b, h0 = inputs((1, 9, 17), 1, torch.float32, torch.device("cpu"))
    out = torch.empty_like(b)
    compiled = torch.compile(
        lambda room: linear_scan(a, b, h0, out=room) * 2, fullgraph=True, backend="aot_eager"
    )
    doubled = compiled(out)
    torch.testing.assert_close(out, linear_scan(a, b, h0))
    torch.testing.assert_close(doubled, out * 2)


def test_a_second_derivative_is_refused() -> None:
    a, b, _ = inputs((1, 4, 3), 1, torch.float64, torch.device("cpu"))
    h = linear_scan(a.requires_grad_(), b)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(h.sum(), a, create_graph=True)


def test_a_tensor_changed_after_the_forward_pass_is_noticed() -> None:
    a, b, _ = inputs((1, 4, 3), 1, torch.float32, torch.device("cpu"))
    h = linear_scan(a.requires_grad_(), b)
    with torch.no_grad():
        a.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


# -- bad input --------------------------------------------------------------------------------------

A = torch.zeros(2, 6, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"a": [1.0]}, TypeError, "a must be a tensor, got list"),
        ({"b": 1.0}, TypeError, "b must be a tensor, got float"),
        ({"a": A.int()}, TypeError, "a must have dtype float32, .*, got int32"),
        ({"b": A.to("meta")}, ValueError, "b must be on a CPU or CUDA device, got meta"),
        ({"a": A.to_sparse()}, ValueError, "a must be a dense tensor"),
        ({"a": A[:, :, :2]}, ValueError, r"shapes that broadcast, got \(2, 6, 2\) and \(2, 6, 3\)"),
        ({"a": torch.zeros(()), "b": torch.zeros(())}, ValueError, "at least one axis"),
        ({"dim": 3}, ValueError, r"dim must be in \[-3, 2\] .*, got 3"),
        ({"dim": 1.0}, TypeError, "dim must be an int, got float"),
        ({"reverse": 1}, TypeError, "reverse must be True or False, got 1"),
        ({"h0": 0.0}, TypeError, "h0 must be a tensor"),
        ({"h0": torch.zeros(2, 4)}, ValueError, r"h0 must have shape .* = \(2, 3\), got \(2, 4\)"),
        ({"h0": torch.zeros(2, 3).double()}, TypeError, "h0 must have dtype .*, got float64"),
        ({"h0": torch.zeros(2, 3).to(torch.complex64)}, TypeError, "h0 must have dtype .*, got complex64"),
        ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens must be a tensor"),
        ({"out": [0.0]}, TypeError, "out must be a tensor, got list"),
        ({"out": A.double()}, TypeError, "out must have dtype float32, got float64"),
        ({"out": A[:1]}, ValueError, r"out must have shape .* = \(2, 6, 3\), got \(1, 6, 3\)"),
        ({"out": A.clone().mT.contiguous().mT}, ValueError, r"out must be contiguous, got .* \(18, 1, 6\)"),
        ({"out": A}, ValueError, "out must not share memory with a"),
        ({"a": A + 1, "b": A[:1, :1], "out": A}, ValueError, "out must not share memory with b"),
        ({"out": A.clone().requires_grad_()}, ValueError, "out is written to without a gradient"),
        ({"a": A.clone().requires_grad_(), "out": A.clone()}, ValueError, "an input or out requires one"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "axes of size 1 before dim=1"),
    ],
)
def test_bad_input(arguments, error, message) -> None:
    given_arguments = {"a": A, "b": A, **arguments}
    with pytest.raises(error, match=message):
        linear_scan(given_arguments.pop("a"), given_arguments.pop("b"), **given_arguments)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        (torch.tensor([0.0, 6.0]), TypeError, "cu_seqlens must have dtype int32, int64, got float32"),
        (torch.tensor([[0, 6]]), ValueError, r"shape \(sequences \+ 1,\), got \(1, 2\)"),
        (torch.tensor([], dtype=torch.int64), ValueError, r"got \(0,\)"),
        (torch.tensor([0, 5]), ValueError, r"increase strictly from 0 to the length 6, got \[0, 5\]"),
        (torch.tensor([1, 6]), ValueError, r"got \[1, 6\]"),
        (torch.tensor([0, 3, 3, 6]), ValueError, r"got \[0, 3, 3, 6\]"),
        (torch.tensor([0, 5, 2, 6]), ValueError, r"got \[0, 5, 2, 6\]"),
        (torch.tensor([0, 99, 6]), ValueError, r"got \[0, 99, 6\]"),
        (torch.tensor([0]), ValueError, r"got \[0\]"),
    ],
)
def test_bad_packing(cu_seqlens, error, message) -> None:
    with pytest.raises(error, match=message):
        linear_scan(A[:1], A[:1], cu_seqlens=cu_seqlens)


def test_packed_states_have_the_sequences_in_front() -> None:
    with pytest.raises(ValueError, match=r"h0 must have shape \(n_seq, .*\) = \(2, 3\), got \(1, 3\)"):
        linear_scan(A[:1], A[:1], torch.zeros(1, 3), cu_seqlens=torch.tensor([0, 2, 6]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_double_precision_is_for_the_cpu(backend, dtype) -> None:
    tensor = torch.zeros(1, 4, 3, dtype=dtype, device=backend.device)
    if backend.is_cpu:
        assert linear_scan(tensor, tensor).dtype == dtype
        return
    with pytest.raises(NotImplementedError, match="computed on the CPU only"):
        linear_scan(tensor, tensor)


def test_more_axes_than_strides_can_merge() -> None:
    shape = (2,) * 9
    a = torch.zeros(shape).permute(8, 7, 6, 5, 4, 3, 2, 1, 0)
    with pytest.raises(NotImplementedError, match="axes that cannot be merged, allowed: 6"):
        linear_scan(a, torch.zeros(shape))
