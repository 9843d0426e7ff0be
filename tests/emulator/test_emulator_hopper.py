"""What Hopper adds to the emulator: barriers that count bytes, tiles by the copy engine, matrix products."""

import math

import numpy as np
import pytest

from tilewright import _C_emulated

selftest = _C_emulated.selftest

SEEDS = range(4)
finds_races = pytest.mark.skipif(selftest.ADDRESS_SANITIZER, reason="the compiler has room for one sanitizer")


@pytest.fixture(autouse=True)
def default_options():
    yield
    _C_emulated.emulator_set_seed(0)


@pytest.fixture(params=SEEDS)
def seed(request):
    _C_emulated.emulator_set_seed(request.param)
    return request.param


def floats(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_ring_of_mbarriers(seed):
    values = floats(7, 64)
    np.testing.assert_array_equal(selftest.mbarrier_ring(values.ravel()), values[:, ::-1].ravel())


def test_missing_mbarrier_wait_shows():
    """As a race, values nobody wrote, or because arrivals that came too soon let phases pass unseen."""
    values = floats(2, 64)
    for seed in SEEDS:
        _C_emulated.emulator_set_seed(seed)
        try:
            out = selftest.mbarrier_ring(values.ravel(), with_waits=False)
        except RuntimeError as error:
            assert "deadlock" in str(error) or "a race on byte" in str(error)  # noqa: PT017
        else:
            assert np.isnan(np.array(out, np.float32)).any()


# ---- Tiles ---------------------------------------------------------------------------------------


def unswizzled(tile):
    """Rows of 64 elements in eight pieces: in row r piece p is at place p xor r % 8."""
    pieces = np.array(tile, np.uint16).reshape(-1, 8, 8)
    return np.stack([row[np.arange(8) ^ r % 8] for r, row in enumerate(pieces)]).reshape(-1, 64)


# sizes, box and coordinates of axes, innermost last; the order of the axes in memory
TILES = [
    ((1, 1, 8, 64), (1, 1, 8, 64), (0, 0, 0, 0), (0, 1, 2, 3)),
    ((2, 3, 20, 128), (1, 1, 16, 64), (1, 2, 3, 64), (0, 1, 2, 3)),
    ((2, 3, 20, 128), (1, 1, 16, 64), (1, 2, 12, 96), (0, 2, 1, 3)),
    ((2, 3, 21, 40), (1, 1, 32, 64), (1, 0, 5, 0), (0, 2, 1, 3)),
    ((2, 3, 9, 64), (1, 1, 16, 64), (0, 1, -4, -8), (1, 0, 2, 3)),
    ((2, 3, 9, 64), (1, 1, 8, 64), (0, 1, 9, 0), (0, 1, 2, 3)),
    ((2, 3, 9, 64), (1, 1, 8, 64), (2, 0, 0, 0), (0, 1, 2, 3)),
    ((2, 3, 9, 64), (2, 3, 9, 64), (0, 0, 0, 0), (0, 1, 2, 3)),
]


@pytest.mark.parametrize(("sizes", "box", "at", "order"), TILES)
def test_tiles_of_a_tensor(sizes, box, at, order):
    values = np.arange(1, math.prod(sizes) + 1, dtype=np.uint16).reshape(sizes)
    stored = np.ascontiguousarray(values.transpose(order))
    strides = np.empty(4, int)
    strides[list(order)] = np.array(stored.strides) // 2
    padded = np.zeros([s + 2 * 80 if axis == 3 else s + 2 * 40 for axis, s in enumerate(sizes)], np.uint16)
    margins = (40, 40, 40, 80)
    padded[tuple(slice(m, m + s) for m, s in zip(margins, sizes, strict=True))] = values
    expected = padded[tuple(slice(m + a, m + a + b) for m, a, b in zip(margins, at, box, strict=True))]
    tile = selftest.tma_tile(
        stored.ravel(), sizes[::-1], [int(s) for s in strides[::-1]], box[::-1], at[::-1]
    )
    np.testing.assert_array_equal(unswizzled(tile), expected.reshape(-1, 64))


def test_a_tile_lands_at_the_wait_and_not_before(seed):
    values = np.arange(8 * 64, dtype=np.uint16)
    arguments = (values, (64, 8, 1, 1), (1, 64, 64, 64), (64, 8, 1, 1), (0, 0, 0, 0))
    if selftest.ADDRESS_SANITIZER:
        assert set(selftest.tma_tile(*arguments, waits=False)) == {0xFFFF}
    else:
        with pytest.raises(RuntimeError, match=r"reads what a copy to the mbarrier at byte 32768 .* wrote"):
            selftest.tma_tile(*arguments, waits=False)
    np.testing.assert_array_equal(unswizzled(selftest.tma_tile(*arguments)), values.reshape(8, 64))


@pytest.mark.parametrize(("sizes", "box", "at", "order"), TILES)
def test_stores_of_tiles(sizes, box, at, order):
    """What is stored to a tensor of zeros is what a load of the same box finds there, and nothing else."""
    stored_sizes = [sizes[axis] for axis in order]
    strides = np.empty(4, int)
    strides[list(order)] = np.array(np.empty(stored_sizes, np.uint16).strides) // 2
    place = (sizes[::-1], [int(s) for s in strides[::-1]], box[::-1], at[::-1])
    tile = np.arange(1, math.prod(box) + 1, dtype=np.uint16)
    stored = np.array(selftest.tma_stored(tile, *place), np.uint16)
    loaded = np.array(selftest.tma_tile(stored, *place), np.uint16)
    inside = loaded != 0
    np.testing.assert_array_equal(loaded[inside], tile[inside])
    expected = math.prod(max(0, min(a + b, s) - max(a, 0)) for s, b, a in zip(sizes, box, at, strict=True))
    assert inside.sum() == (stored != 0).sum() == expected


@pytest.mark.parametrize(
    ("sizes", "strides", "box", "message"),
    [
        ((64, 8, 1, 1), (1, 60, 64, 64), (64, 8, 1, 1), "axis 1 has a stride of 120 bytes"),
        ((64, 8, 1, 1), (1, 64, 0, 64), (64, 8, 1, 1), "axis 2 has a stride of 0 bytes"),
        ((64, 8, 1, 1), (1, 56, 64, 64), (64, 8, 1, 1), "axis 1 has a stride of 112 bytes"),
        ((64, 8, 1, 1), (2, 64, 64, 64), (64, 8, 1, 1), "axis 0 has a stride of 4 bytes"),
        ((64, 0, 1, 1), (1, 64, 64, 64), (64, 8, 1, 1), "axis 1 has size 0"),
        ((64, 8, 1, 1), (1, 64, 64, 64), (64, 300, 1, 1), "axis 1 has a box of 300"),
        ((64, 8, 1, 1), (1, 64, 64, 64), (128, 8, 1, 1), "rows of 256 bytes"),
    ],
)
def test_maps_that_the_driver_would_refuse(sizes, strides, box, message):
    with pytest.raises(RuntimeError, match=f"tensor map: {message}"):
        selftest.tma_tile([0] * 512, sizes, strides, box, (0, 0, 0, 0))


# ---- Products ------------------------------------------------------------------------------------


def halves(values, kind):
    if kind == "fp16":
        return values.astype(np.float16).view(np.uint16)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def widened(bits, kind):
    if kind == "fp16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def product(kind, depth, columns, across, in_registers, fault=0):
    a, b = halves(floats(64, depth), kind), halves(floats(depth, columns, seed=1), kind)
    stored = b if across else np.ascontiguousarray(b.T)
    found = selftest.wgmma_product(kind, a.ravel(), stored.ravel(), columns, across, in_registers, fault)
    return np.array(found, np.float32).reshape(64, columns), widened(a, kind) @ widened(b, kind)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("depth", [64, 128])
@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("in_registers", [False, True])
def test_products(kind, depth, columns, across, in_registers):
    for fault in (0, 4):
        found, expected = product(kind, depth, columns, across, in_registers, fault)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_products_do_not_depend_on_the_seed():
    found = set()
    for seed in SEEDS:
        _C_emulated.emulator_set_seed(seed)
        found.add(product("bf16", 128, 128, True, True)[0].tobytes())
    assert len(found) == 1


@pytest.mark.parametrize("in_registers", [False, True])
def test_results_land_at_the_wait_and_not_before(in_registers, seed):
    found, _ = product("bf16", 64, 64, False, in_registers, fault=1)
    assert np.isnan(found).all()


def test_operands_are_read_as_late_as_the_wait(seed):
    if not selftest.ADDRESS_SANITIZER:
        with pytest.raises(RuntimeError, match=r"a race on byte .* a product of warp"):
            product("bf16", 64, 64, False, False, fault=2)
        return
    found, expected = product("bf16", 64, 64, False, False, fault=2)
    assert (np.abs(found - expected) > 1e-3).any()


def test_accumulators_written_under_way_are_reported(seed):
    with pytest.raises(RuntimeError, match=r"selftest_hopper.cu:\d+: wgmma: its accumulators were written"):
        product("bf16", 64, 64, False, False, fault=3)


# ---- Races with what works beside the threads ----------------------------------------------------

COPY = r"a copy to the mbarrier at byte \d+ \(begun last at selftest_races.cu:\d+\)"
PRODUCT = r"a product of warp \d+ \(begun last at selftest_races.cu:\d+\)"
STORE = r"a store of thread \d+ \(begun last at selftest_races.cu:\d+\)"
THREAD = r"thread \d+ \(which waits last at selftest_races.cu:\d+\)"

# Who races, in either order, and what lacks.
ORDERS = {
    "threads read a copy: the wait for its mbarrier": (THREAD, COPY, "barrier or wait"),
    "threads read one of two copies: the wait for the other's mbarrier": (THREAD, COPY, "barrier or wait"),
    "a product reads a copy: the wait for its mbarrier": (PRODUCT, COPY, "barrier or wait"),
    "a copy over what threads read: the read before the arrival": (COPY, THREAD, "barrier or wait"),
    "a copy over what a product reads: its wait before the arrival": (COPY, PRODUCT, "barrier or wait"),
    "a copy over what threads wrote: the fence": (COPY, THREAD, "fence_async_proxy"),
    "threads write what their product reads: its wait": (THREAD, PRODUCT, "barrier or wait"),
    "threads write what the younger of two products reads: its wait": (THREAD, PRODUCT, "barrier or wait"),
    "threads write what the product of other warps reads: a barrier": (THREAD, PRODUCT, "barrier or wait"),
    "a product reads what threads wrote: the fence": (PRODUCT, THREAD, "fence_async_proxy"),
    "a product reads what threads wrote: the barrier": (PRODUCT, THREAD, "barrier or wait"),
    "a store reads what threads wrote: the fence": (STORE, THREAD, "fence_async_proxy"),
    "a store reads what threads wrote: the barrier": (STORE, THREAD, "barrier or wait"),
    "a thread writes what its store reads: its wait": (THREAD, STORE, "barrier or wait"),
    "a thread writes what the younger of two stores reads: its wait": (THREAD, STORE, "barrier or wait"),
    "a thread writes what another's store reads: its wait before the barrier": (
        THREAD,
        STORE,
        "barrier or wait",
    ),
    "a copy over what a store reads: its wait": (COPY, STORE, "barrier or wait"),
}


def test_every_order_is_tested():
    assert sorted(ORDERS) == sorted(selftest.hopper_orders())


@pytest.mark.parametrize("what", ORDERS)
def test_a_whole_order_is_no_race(what, seed):
    selftest.hopper_order(what, lacks=False)


@finds_races
@pytest.mark.parametrize("what", ORDERS)
def test_an_order_that_lacks_something_is_reported(what, seed):
    one, other, lacking = ORDERS[what]
    sides = f"({one} (reads|writes) what {other}|{other} (reads|writes) what {one}) (wrote|read), "
    message = rf"a race on byte \d+ of shared memory: {sides}and no {lacking} is between them"
    with pytest.raises(RuntimeError, match=message):
        selftest.hopper_order(what, lacks=True)
    selftest.hopper_order(what, lacks=False)


# ---- Misuse --------------------------------------------------------------------------------------

MISUSES = {
    "mbarrier that nobody initialised": r"selftest_hopper.cu:\d+: the mbarrier has not been initialised",
    "mbarrier initialised twice": "initialised already",
    "mbarrier for no arrivals": "got 0 arrivals, allowed: 1 to",
    "mbarrier written over": "the mbarrier has been written over",
    "mbarrier that lacks an arrival": r"deadlock.*threads 0-127 in mbarrier_wait for parity 0 "
    r"\(selftest_hopper.cu:\d+\), an mbarrier at byte 1024 in phase 0 that lacks 1 of 2 arrivals",
    "copy of less than was announced": "deadlock.*lacks 0 of 1 arrivals and copies of 1024 bytes",
    "copy of more than was announced": "too many bytes: .*has 512 bytes more than announced",
    "copy before the barrier is fenced": "no fence_mbarrier_init since",
    "copy to global memory": "tma_load: the destination is not in shared memory|no multiple of 128",
    "copy by what is no map": "this is no tensor map",
    "arrival while copies are under way": "arrival at .*no thread has seen the phase before complete",
    "end while copies are under way": r"block \(0, 0, 0\): it ends while copies are under way to an mbarrier",
    "store from global memory": "tma_store: the source is not in shared memory|no multiple of 128",
    "store that is not waited for": "thread 0: exits before stores that it began have been waited for",
    "product without a fence": "no wgmma_fence since",
    "product that is not waited for": "exits before products that it began have been waited for",
    "products that differ": "other threads of the warpgroup issue another product",
    "products of one warp alone": "the warps of warpgroup 0 have issued different numbers of products|"
    "an operand reaches byte",
    "product beyond shared memory": r"an operand reaches byte \d+ of shared memory",
    "product of tiles without swizzle": "not one of 128-byte swizzle",
    "more registers than there are": "setmaxnreg: got 264",
}


def test_every_misuse_has_its_words():
    assert sorted(MISUSES) == sorted(selftest.hopper_misuses())


@pytest.mark.parametrize("what", MISUSES)
def test_misuse_is_reported_and_the_next_launch_works(what, seed):
    with pytest.raises(RuntimeError, match=MISUSES[what]):
        selftest.hopper_misuse(what)
    assert selftest.block_sum([1.0] * 64) == 64.0


@pytest.mark.parametrize("number", [70, 100])
def test_compute_capability(number):
    with pytest.raises(ValueError, match=f"got {number}, allowed: 80 or 90"):
        _C_emulated.emulator_set_compute_capability(number)
