"""The emulator, held to its promises: each device function means what it says, and each misuse shows."""

import math
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tilewright import _C_emulated

selftest = _C_emulated.selftest

SEEDS = range(8)
RACE = r"a race on byte \d+ of shared memory: thread \d+.* and no barrier is between them"
finds_races = pytest.mark.skipif(selftest.ADDRESS_SANITIZER, reason="the compiler has room for one sanitizer")
WARP = 32
FULL = 0xFFFFFFFF


@pytest.fixture(autouse=True)
def default_options():
    yield
    _C_emulated.emulator_set_seed(0)
    _C_emulated.emulator_set_threads(0)


@pytest.fixture(params=SEEDS)
def seed(request):
    _C_emulated.emulator_set_seed(request.param)
    return request.param


def words(count, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)


def floats(count, seed=0):
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


# ---- Threads, blocks, order ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "block"), [((1, 1, 1), (1, 1, 1)), ((3, 2, 2), (5, 3, 4)), ((2, 1, 1), (1024, 1, 1))]
)
def test_indices(grid, block):
    rows = np.array(selftest.indices(grid, block)).reshape(math.prod(grid), math.prod(block), 8)
    for b, (bz, by, bx) in enumerate(np.ndindex(*grid[::-1])):
        threads = [(x, y, z) for z, y, x in np.ndindex(*block[::-1])]
        np.testing.assert_array_equal(rows[b, :, :3], [[bx, by, bz]] * len(threads))
        np.testing.assert_array_equal(rows[b, :, 3:6], threads)
    rank = np.arange(math.prod(block))
    np.testing.assert_array_equal(rows[..., 6], np.broadcast_to(rank % WARP, rows.shape[:2]))
    np.testing.assert_array_equal(rows[..., 7], np.broadcast_to(rank // WARP, rows.shape[:2]))


def test_empty_grid_runs_nothing():
    assert selftest.indices((0, 1, 1), (32, 1, 1)) == []


def running_order(seed, threads_of_os, blocks=6, threads=96):
    _C_emulated.emulator_set_seed(seed)
    _C_emulated.emulator_set_threads(threads_of_os)
    order = np.array(selftest.running_order(blocks, threads))
    return order[: blocks * threads].reshape(blocks, threads), order[blocks * threads :]


def test_order_of_threads_is_a_permutation_that_the_seed_alone_decides():
    order, _ = running_order(1, 1)
    for row in order:
        assert sorted(row) == list(range(len(row)))
    assert len({tuple(row) for row in order}) == len(order)
    for threads_of_os in (1, 2, 3, 16):
        np.testing.assert_array_equal(running_order(1, threads_of_os)[0], order)
    assert (running_order(2, 1)[0] != order).any()


def test_order_of_blocks_is_a_permutation_that_the_seed_decides():
    orders = {tuple(running_order(seed, 1)[1]) for seed in range(20)}
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len(orders) > 5


def test_order_of_threads_has_no_favourites():
    first = [int(running_order(seed, 1, blocks=1, threads=4)[0].argmin()) for seed in range(400)]
    assert min(np.bincount(first, minlength=4)) > 60


def test_launches_from_several_threads_at_once():
    values = floats(256).tolist()
    with ThreadPoolExecutor(4) as pool:
        sums = list(pool.map(lambda _: selftest.block_sum(values), range(64)))
    assert set(sums) == {selftest.block_sum(values)}


# ---- Warp collectives ----------------------------------------------------------------------------


def shuffle_source(op, lane, argument):
    argument %= WARP
    source = {
        "shfl": argument,
        "shfl_xor": lane ^ argument,
        "shfl_up": lane - argument,
        "shfl_down": lane + argument,
    }[op]
    return source if 0 <= source < WARP else lane


SHUFFLES = ["shfl", "shfl_xor", "shfl_up", "shfl_down"]


@pytest.mark.parametrize("op", SHUFFLES)
@pytest.mark.parametrize("argument", [0, 1, 5, 16, 31, 32, 35])
def test_shuffles(op, argument):
    values = words(3 * WARP)
    expected = [values[t - t % WARP + shuffle_source(op, t % WARP, argument)] for t in range(len(values))]
    assert selftest.warp_words(op, values, argument) == expected


@pytest.mark.parametrize("op", SHUFFLES)
def test_shuffles_of_eight_bytes(op):
    values = np.random.default_rng(0).standard_normal(WARP)
    expected = [values[shuffle_source(op, lane, 3)] for lane in range(WARP)]
    assert selftest.warp_doubles(op, values, 3) == expected


REDUCTIONS = {
    "ballot": lambda v, lanes: sum(1 << lane for x, lane in zip(v, lanes, strict=True) if x),
    "any": lambda v, lanes: int(any(v)),
    "all": lambda v, lanes: int(all(v)),
    "reduce_max": lambda v, lanes: max(v),
    "reduce_min": lambda v, lanes: min(v),
    "reduce_add": lambda v, lanes: sum(v) % 2**32,
    "reduce_or": lambda v, lanes: int(np.bitwise_or.reduce(v)),
}


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("mask", [FULL, 0x1, 0x80000000, 0x0F0F00FF])
def test_votes_and_reductions(op, mask, seed):
    lanes = [lane for lane in range(WARP) if mask >> lane & 1]
    mixed = words(WARP, seed) * (words(WARP, seed + 1) & 1)
    for values in (mixed, mixed * 0, mixed | 1):
        expected = REDUCTIONS[op]([int(values[lane]) for lane in lanes], lanes)
        result = selftest.warp_words(op, values, mask=mask)
        assert result == [expected if lane in lanes else selftest.UNTOUCHED for lane in range(WARP)]


def test_match_any():
    values = words(WARP) % 5
    expected = [sum(1 << lane for lane in range(WARP) if values[lane] == value) for value in values]
    assert selftest.warp_words("match_any", values) == expected
    # Eight bytes that agree in the lower four only.
    doubles = np.where(values == 0, 1.0, 2.0)
    expected = [sum(1 << lane for lane in range(WARP) if doubles[lane] == value) for value in doubles]
    assert selftest.warp_doubles("match_any", doubles) == expected


@pytest.mark.parametrize("threads", [32, 96, 1000])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("exits", [False, True])
def test_block_votes_of_the_threads_that_have_not_exited(threads, density, exits, seed):
    rank = np.arange(threads)
    gone = (rank % 3 == 1) & exits
    predicates = (np.random.default_rng(0).random(threads) < density).astype(np.uint32)
    rows = np.array(selftest.block_votes(np.where(gone, 2, predicates))).reshape(threads, 3)
    left = predicates[~gone]
    np.testing.assert_array_equal(rows[~gone], [[left.any(), left.all(), left.sum()]] * len(left))
    assert not rows[gone].any()


# ---- Barriers: what is there works, what is missing shows ----------------------------------------


@pytest.mark.parametrize("threads", [2, 32, 128, 1024])
def test_block_sum(threads, seed):
    values = np.arange(threads, dtype=np.float32)
    assert selftest.block_sum(values) == values.sum()


@finds_races
def test_missing_block_barrier_is_reported():
    for seed in SEEDS:
        _C_emulated.emulator_set_seed(seed)
        with pytest.raises(RuntimeError, match=RACE):
            selftest.block_sum(floats(128), with_barriers=False)


@finds_races
def test_missing_warp_barrier_is_reported():
    values = floats(64)
    neighbours = values.reshape(-1, 2)[:, ::-1].ravel()
    for seed in SEEDS:
        _C_emulated.emulator_set_seed(seed)
        np.testing.assert_array_equal(selftest.pass_in_warp(values), neighbours)
        with pytest.raises(RuntimeError, match=RACE):
            selftest.pass_in_warp(values, with_barriers=False)


def test_named_barriers(seed):
    values = floats(5 * 64).reshape(5, 64)
    np.testing.assert_array_equal(selftest.pass_by_named_barriers(values.ravel()), values[:, ::-1].ravel())


@pytest.mark.parametrize("threads_of_os", [1, 2, 5])
def test_last_block_sums_the_grid(threads_of_os, seed):
    _C_emulated.emulator_set_threads(threads_of_os)
    values = np.arange(1000, dtype=np.float32)
    assert selftest.grid_sum(values, 7) == values.sum()


# ---- Memory --------------------------------------------------------------------------------------


def test_every_block_finds_shared_memory_poisoned():
    _C_emulated.emulator_set_threads(1)
    found = np.array(selftest.uninitialised(100), dtype=np.float32)
    assert np.isnan(found).all()


@pytest.mark.parametrize("offset", [0, 1, 63])
def test_write_within_shared_memory(offset):
    selftest.write_shared(64, offset)


@pytest.mark.parametrize(
    ("size", "offset"), [(64, 64), (64, 100), (61, 61), (64, 4095), (64, -1), (64, -100)]
)
def test_write_beyond_shared_memory_is_reported(size, offset):
    if selftest.ADDRESS_SANITIZER:  # which ends the process
        code = f"from tilewright import _C_emulated as c; c.selftest.write_shared({size}, {offset})"
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ended.returncode != 0
        assert "use-after-poison" in ended.stderr
        return
    with pytest.raises(RuntimeError, match=rf"out of bounds: byte {offset} of .*, which has {size} bytes"):
        selftest.write_shared(size, offset)
    selftest.write_shared(64, 0)


@pytest.mark.parametrize("vector_bytes", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("streaming", [False, True])
def test_vector_copies(vector_bytes, streaming):
    values = list(np.random.default_rng(0).bytes(64 * vector_bytes))
    assert selftest.copy_vectors(values, vector_bytes, streaming) == values
    assert selftest.copy_vectors(values, vector_bytes, streaming, shift=vector_bytes % 32) == values
    if vector_bytes > 1:
        with pytest.raises(RuntimeError, match=rf"misaligned access: .* no multiple of {vector_bytes}$"):
            selftest.copy_vectors(values, vector_bytes, streaming, shift=vector_bytes // 2)


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("pending", [0, 1, 2, 3, -1])
def test_async_copies_land_at_their_wait_and_not_before(size, pending, seed):
    values = floats(4 * 64)
    tiles = np.array(selftest.async_tiles(values, size, pending, 256), dtype=np.float32).reshape(4, 64)
    landed = 0 if pending < 0 else 3 - pending
    np.testing.assert_array_equal(tiles[:landed], values.reshape(4, 64)[:landed])
    assert np.isnan(tiles[landed:]).all()


def test_async_copies_that_are_not_valid_store_zeros():
    values = floats(4 * 64)
    tiles = np.array(selftest.async_tiles(values, 16, 0, 100), dtype=np.float32)
    np.testing.assert_array_equal(tiles[:192], np.where(np.arange(192) < 100, values[:192], 0))


@pytest.mark.parametrize("threads_of_os", [1, 4])
def test_atomics(threads_of_os, seed):
    _C_emulated.emulator_set_threads(threads_of_os)
    blocks, threads = 5, 70
    count = blocks * threads
    result = selftest.atomics(blocks, threads)
    total = count * (count - 1) // 2
    assert result.sums == [total, total / 2, -total, total, total << 32, total]
    assert result.extremes == [count - 6, 6 - count]
    assert result.unsigned_extremes == [0x80000000 + count - 1, 0xFFFFFFFF - (count - 1)]
    assert sorted(result.exchanged) == list(range(count + 1))
    assert sorted(result.exchanged_long) == [i << 32 for i in range(count + 1)]
    assert result.counted == [count, count]


# ---- Arithmetic ----------------------------------------------------------------------------------

SPECIAL = np.float32([0, -0.0, 1, -1.5, 2.0**-149, 2.0**-126, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan])


def operands():
    spread = floats(500, 1) * np.exp2(np.random.default_rng(2).uniform(-30, 30, 500)).astype(np.float32)
    a = np.concatenate([np.repeat(SPECIAL, len(SPECIAL)), spread])
    b = np.concatenate([np.tile(SPECIAL, len(SPECIAL)), np.roll(spread, 1)])
    return a, b, np.roll(a, 7)


FLOAT_MATH = {
    "add_rn": lambda a, b, c: a + b,
    "mul_rn": lambda a, b, c: a * b,
    "div_rn": lambda a, b, c: a / b,
    "sqrt_rn": lambda a, b, c: np.sqrt(a),
    "sqrt_approx": lambda a, b, c: np.sqrt(a),
    "rcp_approx": lambda a, b, c: np.float32(1) / a,
    "rsqrt_approx": lambda a, b, c: (1 / np.sqrt(a.astype(np.float64))).astype(np.float32),
    "exp2_approx": lambda a, b, c: np.exp2(a.astype(np.float64)).astype(np.float32),
    "min": lambda a, b, c: np.fmin(a, b),
    "max": lambda a, b, c: np.fmax(a, b),
    "min_nan": lambda a, b, c: np.minimum(a, b),
    "max_nan": lambda a, b, c: np.maximum(a, b),
    "float_bits": lambda a, b, c: -a,
}


@pytest.mark.parametrize("name", FLOAT_MATH)
def test_float_math(name):
    a, b, c = operands()
    with np.errstate(all="ignore"):
        expected = FLOAT_MATH[name](a, b, c)
    np.testing.assert_array_equal(np.array(selftest.float_math(name, a, b, c), np.float32), expected)


ACCURATE_MATH = {
    "exp": np.exp,
    "log1p": np.log1p,
    "log2": np.log2,
    "tanh": np.tanh,
    "sinpi": lambda a: np.sin(np.pi * np.fmod(a, 2)),
    "cospi": lambda a: np.cos(np.pi * np.fmod(a, 2)),
}


@pytest.mark.parametrize("name", ACCURATE_MATH)
def test_accurate_math(name):
    a, b, c = operands()
    with np.errstate(all="ignore"):
        expected = ACCURATE_MATH[name](a.astype(np.float64)).astype(np.float32)
    result = np.array(selftest.float_math(name, a, b, c), np.float32)
    np.testing.assert_allclose(result, expected, rtol=2e-7, atol=1e-15)


def exp2_polynomial(values):
    zeros = np.zeros_like(values)
    return np.array(selftest.float_math("exp2_polynomial", values, zeros, zeros), np.float32)


def test_exp2_polynomial_is_as_accurate_as_the_special_function_unit():
    spread = np.linspace(-125.5, 127.99, 100_001).astype(np.float32)
    small = np.geomspace(2.0**-149, 1, 20_001).astype(np.float32)
    halves = np.arange(-250, 256, dtype=np.float32) / 2
    for values in (spread, small, -small, np.nextafter(halves, 200), np.nextafter(halves, -200)):
        values = values[(values > -125.5) & (values < 128)]
        expected = np.exp2(values.astype(np.float64))
        assert np.abs(exp2_polynomial(values) / expected - 1).max() < 2.0**-22


def test_exp2_polynomial_at_the_ends():
    whole = np.arange(-125, 128, dtype=np.float32)
    np.testing.assert_array_equal(exp2_polynomial(whole), np.exp2(whole.astype(np.float64)))
    values = np.float32([128, 129.5, 130, 255, 3.4e38, np.inf, -125.51, -126, -149, -3.4e38, -np.inf, np.nan])
    expected = np.float32([*6 * [np.inf], *5 * [0], np.nan])
    np.testing.assert_array_equal(exp2_polynomial(values), expected)
    assert not np.signbit(exp2_polynomial(values)[6:11]).any()


def test_fma_rounds_once():
    # 1 - (1 - 2^-24)(1 + 2^-23) needs more than fp32 between the product and the sum.
    a, b, c = 1 - 2.0**-24, 1 + 2.0**-23, -1.0
    assert selftest.float_math("fma_rn", [a], [b], [c]) == [float(np.float32(a * b + c))]
    assert np.float32(np.float32(a) * np.float32(b)) + np.float32(c) != np.float32(a * b + c)


def byte_permute(a, b, selector):
    octets = struct.pack("<II", a, b)
    result = 0
    for i in range(4):
        choice = selector >> 4 * i & 0xF
        byte = octets[choice & 7]
        if choice & 8:
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << 8 * i
    return result


def signed(word):
    return word - 2**32 if word >= 2**31 else word


WORD_MATH = {
    "byte_permute": byte_permute,
    "mul_hi": lambda a, b, s: a * b >> 32,
    "min": lambda a, b, s: min(a, b),
    "max": lambda a, b, s: max(a, b),
    "min_signed": lambda a, b, s: min(a, b, key=signed),
    "max_signed": lambda a, b, s: max(a, b, key=signed),
}


@pytest.mark.parametrize("name", WORD_MATH)
def test_word_math(name):
    a, b, selector = (words(400, seed).tolist() for seed in range(3))
    expected = [WORD_MATH[name](*each) for each in zip(a, b, selector, strict=True)]
    assert selftest.word_math(name, a, b, selector) == expected


def bf16_reference(values):
    """float32 -> bf16 bits: of the two neighbours the nearer, of two as near the even one."""
    exact = values.astype(np.float64)
    low = values.view(np.uint32) >> 16
    with np.errstate(all="ignore"):
        lower, upper = ((bits << 16).view(np.float32).astype(np.float64) for bits in (low, low + 1))
        # Beyond the largest number the next value would be 2^128, although its bits mean infinity.
        upper = np.where(np.isinf(upper), np.copysign(2.0**128, upper), upper)
        to_lower, to_upper = np.abs(exact - lower), np.abs(upper - exact)
    up = (to_upper < to_lower) | ((to_upper == to_lower) & (low % 2 == 1))
    return np.where(up & ~np.isinf(values), low + 1, low).astype(np.uint16)


def narrow_inputs():
    bits = np.concatenate([words(20000), np.arange(0, 0x7F80, dtype=np.uint32) << 16 | 0x8000])
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[:-1] + halves[1:]) / 2
    limits = np.float32([65519.996, 65520, 1e30, np.inf, -np.inf])
    values = np.concatenate([bits.view(np.float32), halves, ties, -ties, limits])
    values = values[~np.isnan(values)]
    return values[: len(values) // 2 * 2]


def test_narrowing_rounds_to_nearest_even():
    values = narrow_inputs()
    with np.errstate(over="ignore"):
        expected = {"fp16": values.astype(np.float16).view(np.uint16), "bf16": bf16_reference(values)}
    for name, bits in expected.items():
        single, paired = np.array(selftest.narrow(name, values)).reshape(2, -1)
        np.testing.assert_array_equal(single, bits)
        np.testing.assert_array_equal(paired, bits)


def test_widening_is_exact():
    bits = np.arange(2**16, dtype=np.uint16)
    expected = {
        "fp16": bits.view(np.float16).astype(np.float32),
        "bf16": (bits.astype(np.uint32) << 16).view(np.float32),
    }
    for name, values in expected.items():
        single, paired = np.array(selftest.widen(name, bits), np.float32).reshape(2, -1)
        np.testing.assert_array_equal(single, values)
        np.testing.assert_array_equal(paired, values)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_nan_stays_nan(name):
    nan_bits = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFC00000], np.uint32)
    narrowed = np.array(selftest.narrow(name, nan_bits.view(np.float32)), np.uint16)
    assert np.isnan(selftest.widen(name, narrowed)).all()


# ---- The host side -------------------------------------------------------------------------------


def test_largest_parameters():
    count = (32764 // 4) - 4
    assert selftest.largest_params() == [count * (count - 1) // 2] * 64


def test_copies_and_properties():
    values = list(range(101))
    assert selftest.copy_and_fill(values) == values[:50] + [0] * 51
    assert selftest.copy_and_fill([]) == []
    assert selftest.device_properties() == [2, 2]


# ---- Matrices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
def test_matrix_product(kind, a_transposed, b_transposed, seed):
    """Against numpy; small integers, whose sums are exact in any order."""
    rng = np.random.default_rng(seed)
    a, b, c = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))

    def bits(matrix, transposed):
        stored = np.ascontiguousarray(matrix.T if transposed else matrix)
        halves = stored.astype(np.float16).view(np.uint16) if kind == "fp16" else stored.view(np.uint32) >> 16
        return halves.ravel().tolist()

    found = selftest.matrix_product(
        kind, bits(a, a_transposed), bits(b, b_transposed), c.ravel().tolist(), a_transposed, b_transposed
    )
    np.testing.assert_array_equal(np.array(found).reshape(16, 8), a @ b + c)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("selector", [0, 1])
def test_sparse_matrix_product(kind, selector, seed):
    """Against numpy; all six patterns of two in four come up, and integers' sums are exact in any order."""
    rng = np.random.default_rng(seed)
    pairs = np.array([(i, j) for i in range(4) for j in range(i + 1, 4)])
    chosen = pairs[rng.integers(0, 6, (16, 8))]
    kept, b, c = (rng.integers(1, 9, shape).astype(np.float32) for shape in ((16, 8, 2), (32, 8), (16, 8)))
    dense = np.zeros((16, 8, 4), np.float32)
    np.put_along_axis(dense, chosen, kept, axis=2)
    nibbles = chosen[..., 0] | chosen[..., 1] << 2
    places = nibbles[:, 0::2] | nibbles[:, 1::2] << 4

    def bits(matrix):
        halves = matrix.astype(np.float16).view(np.uint16) if kind == "fp16" else matrix.view(np.uint32) >> 16
        return halves.ravel().tolist()

    arguments = kind, bits(kept), places.ravel().tolist(), bits(b), c.ravel().tolist(), selector
    found = selftest.sparse_matrix_product(*arguments)
    np.testing.assert_array_equal(np.array(found).reshape(16, 8), dense.reshape(16, 32) @ b + c)


def test_sparse_matrix_product_refuses_unordered_metadata():
    places = [0x44] * 64
    places[4 * 9 + 2] = 0x41
    with pytest.raises(RuntimeError, match=r"metadata of row 9, columns 16 on, are 1: positions must ascend"):
        selftest.sparse_matrix_product("fp16", [0] * 256, places, [0] * 256, [0.0] * 128, 0)


# ---- Misuse --------------------------------------------------------------------------------------

MISUSES = {
    "barrier under a condition that splits a warp": r"divergent barrier: threads of warp \d come to it from "
    r"selftest_misuse.cu:\d+ and from selftest_misuse.cu:\d+",
    "barrier that some threads never reach": r"deadlock.* threads 0-31 in sync_block .*"
    r"threads 32-63 in barrier_sync 1 \(selftest_misuse.cu:\d+\), to which 32 of 64 threads have come",
    "block votes of different kinds": "sync_block_(or|and), but others came by sync_block_(or|and)",
    "named barrier without its partner": "deadlock.*threads 0-63 in barrier_sync 3 .*64 of 96 threads",
    "named barrier that its partner leaves out": "deadlock.*threads 0-31 in barrier_sync 3 .*32 of 64 threads"
    ".*threads 32-63 exited",
    "named barrier with two counts": "barrier_sync for (64|32) threads, but others that came gave (64|32)",
    "named barrier reached twice": "comes to a named barrier again",
    "named barrier for part of a warp": "threads of a named barrier: got 40, allowed: multiples of 32",
    "barrier id out of range": "barrier id: got 16, allowed: 1..15",
    "shuffle with a lane that exited": r"thread 5, .* exits, but thread \d+ waits for it in shfl_xor|"
    "shfl_xor with mask 0xffffffff: the mask names lane 5, which exited before",
    "exit of a lane that a shuffle waits for": r"exits, but thread \d+ waits for it in shfl with mask 0xffff|"
    "shfl with mask 0xffffffff: the mask names lanes? .*, which exited before",
    "shuffle masks that differ": r"mismatch in warp \d.*shfl with mask 0xffff.*shfl with mask 0xffff|"
    "deadlock.*shfl with mask 0xffffffff.*shfl with mask 0xffff8000",
    "shuffle and ballot": r"mismatch in warp \d: the thread is in (ballot|shfl) with.* in (ballot|shfl) with",
    "mask without the caller": "sync_warp with mask 0x1: the mask lacks the calling lane",
    "mask with lanes that do not exist": "ballot with mask 0xffffffff: the mask names lanes 8-31, "
    "which the block does not have",
    "shuffle from a lane outside the mask": "thread . reads lane 9, which the mask does not name",
    "misaligned load": r"thread \d+, selftest_misuse.cu:\d+: misaligned access: .* no multiple of 16",
    "misaligned streaming store": "misaligned access: .* no multiple of 8",
    "misaligned atomic": "misaligned access: .* no multiple of 8",
    "misaligned cp_async": "misaligned access: .* no multiple of 16",
    "cp_async to global memory": "cp_async: the destination is not in shared memory",
    "matrix row that is not aligned": "misaligned access: .* no multiple of 16",
    "matrix row beyond shared memory": "load_matrices: the row is not in shared memory",
    "matrix product by half of a warp": r"exits, but thread \d+ waits for it in mma_m16n8k16|"
    "mma_m16n8k16 with mask 0xffffffff: the mask names lanes? .*, which exited before",
    "matrix product of two types": r"mma_m16n8k16 .*: lanes 0 and \d+ want different variants",
    "shared memory beyond the launch's": "shared memory struct has 128 bytes, the launch provides 64",
    "launch within a kernel": "called from within a kernel",
    "exception of a kernel": "index 7 of 5",
    "device function outside a kernel": "device function called outside a kernel",
    "block of 1025 threads": r"invalid configuration: .*block \(1025, 1, 1\)",
    "block of no threads": r"invalid configuration: .*block \(0, 1, 1\)",
    "shared memory of 228 KiB": "invalid configuration: .*shared memory 233472 bytes",
    "negative number of OS threads": "threads: got -1, allowed: 0",
}


def test_every_misuse_has_its_words():
    assert sorted(MISUSES) == sorted(selftest.misuses())


@pytest.mark.parametrize("what", MISUSES)
def test_misuse_is_reported_and_the_next_launch_works(what, seed):
    with pytest.raises((RuntimeError, ValueError, IndexError), match=MISUSES[what]):
        selftest.misuse(what)
    assert selftest.block_sum([1.0] * 64) == 64.0


def test_report_names_the_first_failing_block_whatever_the_os_threads(seed):
    reports = set()
    for threads_of_os in (1, 2, 7):
        _C_emulated.emulator_set_threads(threads_of_os)
        with pytest.raises(RuntimeError, match=r"block \d+") as error:
            selftest.fail_in_odd_blocks(40)
        reports.add(str(error.value))
    assert len(reports) == 1
