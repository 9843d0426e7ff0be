"""The variants of CUDA kernels that are worth trying on a GPU, by family, the most promising first.

A variant is values for constants that kernels declare by TW_TUNED (csrc/core/tune.h). `make gpu
STAGES=build,variants` builds them (build_variants.py) and times them (measure_variants.py); the nightly tests
compile each for the emulator and by nvcc, and run tests of its op on it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    name: str
    constants: dict[str, int]
    predicted: float  # time, relative to the default's, in the first of the cases
    why: str
    cases: tuple[str, ...]  # of `tilewright bench`, those that judge it
    tests: tuple[str, ...]  # arguments of pytest: what of the emulated tests represents the op
    spilled: int = 0  # bytes, as ptxas reports them for sm_90a: of no kernel more


# ---- The scans -----------------------------------------------------------------------------------

# 8 x 4096 x 4096 with 16 states in bfloat16: 2.1e9 states and steps.
SCAN = "selective-scan-8x4096x4096"
SCAN_TRAINING = "selective-scan-training-8x4096x4096"
SCAN_TESTS = (
    "tests/scan/test_selective_scan.py",
    "-k",
    "(emulated and (usual or (states and (15 or 16)))) or (parts_of_every and usual)",
)
LINEAR_TESTS = ("tests/scan/test_linear_scan.py", "-k", "emulated")

SCANS = [
    Variant(
        "scan_split_four_blocks",
        {"SELECTIVE_SCAN_SPLIT_BLOCKS": 4},
        0.75,
        "Cut sequences are 2 blocks a multiprocessor, 8 warps, where forward's registers and shared "
        "memory allow 4: twice the warps to wait with. Backward holds 2 blocks at once, so it should "
        "not change.",
        (
            *("selective-scan-1x192x1048576", "selective-scan-1x1536x65536"),
            *("selective-scan-training-1x192x1048576", "selective-scan-training-1x1536x65536"),
        ),
        SCAN_TESTS,
    ),
    Variant(
        "scan_backward_two_channels",
        {"SELECTIVE_SCAN_BACKWARD_CHANNELS": 2, "SELECTIVE_SCAN_BACKWARD_BLOCKS": 3},
        0.88,
        "Half the states a thread: 168 registers instead of 255 and 54 KB of shared memory instead of "
        "102, so 12 warps instead of 8 hide latencies. It costs a third more shuffles a state and twice "
        "the rows of dB and dC, a byte of 15.",
        (SCAN_TRAINING, "selective-scan-training-1x192x1048576"),
        SCAN_TESTS,
    ),
    Variant(
        "scan_forward_one_lane",
        {
            **{"SELECTIVE_SCAN_FORWARD_CHANNELS": 1, "SELECTIVE_SCAN_FORWARD_STATES": 16},
            "SELECTIVE_SCAN_FORWARD_BLOCKS": 5,
        },
        0.9,
        "91 registers instead of 122, so five blocks, 20 warps instead of 16, as shared memory allows; "
        "97 instructions for 98.5 a step of 16 states, no shuffle, but 10 loads from shared memory for "
        "6.",
        (SCAN, "selective-scan-1x192x1048576"),
        SCAN_TESTS,
    ),
    Variant(
        "ssd_heads_three_blocks",
        {"SSD_CHUNK_SCAN_HEADS_BLOCKS": 3},
        0.93,
        "168 registers instead of 230: 12 warps instead of 8 of a kernel whose loads and products take "
        "turns, for 688 bytes a thread of spills (912 with a gate or fp16).",
        ("ssd-chunk-scan-train-bfloat16",),
        ("tests/scan/test_ssd.py", "-k", "emulated"),
        spilled=912,
    ),
    Variant(
        "scan_forward_five_blocks",
        {"SELECTIVE_SCAN_FORWARD_BLOCKS": 5},
        0.94,
        "94 registers instead of 122 without a spill, the same instructions in a step: 20 warps instead "
        "of 16.",
        (SCAN,),
        SCAN_TESTS,
    ),
    Variant(
        "linear_across_deep",
        {"LINEAR_SCAN_ACROSS_GROUPS": 8, "LINEAR_SCAN_ACROSS_GROUPS_BACKWARD": 6},
        0.94,
        "(8, 1536, 4096) along dim 1 is 124 threads a multiprocessor: 32 steps ahead are 63 KB on their "
        "way instead of 40. Latency alone asks for 26, but so few warps issue their loads unevenly.",
        ("linear-scan-3d-dim1-fp32", "linear-scan-gradient-dim1-fp32", "linear-scan-3d-dim1-bf16"),
        LINEAR_TESTS,
    ),
    Variant(
        "linear_across_narrow",
        {"LINEAR_SCAN_ACROSS_BYTES": 4},
        0.95,
        "4 bytes of neighbours a thread: twice the warps, the same 40 KB on their way, 96 registers "
        "instead of 128 (float32); twice the loads, which are far below their rate.",
        ("linear-scan-3d-dim1-fp32", "linear-scan-gradient-dim1-fp32", "linear-scan-3d-dim1-bf16"),
        LINEAR_TESTS,
    ),
    Variant(
        "linear_along_ahead_backward",
        {"LINEAR_SCAN_ALONG_AHEAD_BACKWARD": 2},
        0.95,
        "Two tiles of a, g and h on their way instead of one: 48 KB instead of 24 at 16 warps, where 26 "
        "hide the latency. 28 bytes are spilled in 16 bits, 208 of complex numbers.",
        ("linear-scan-gradient-dim2-fp32", "linear-scan-gradient-dim2-bf16"),
        LINEAR_TESTS,
        spilled=208,
    ),
    Variant(
        "scan_forward_items_of_16",
        {"SELECTIVE_SCAN_FORWARD_ITEM": 16},
        0.96,
        "A thread prepares and finishes a channel's 16 steps at once: addresses, biases and tests once "
        "instead of twice a stage, some 150 of its 3000 instructions; 128 registers, still four blocks.",
        (SCAN,),
        SCAN_TESTS,
    ),
    Variant(
        "scan_backward_64_threads",
        {"SELECTIVE_SCAN_BACKWARD_THREADS": 64, "SELECTIVE_SCAN_BACKWARD_BLOCKS": 4},
        0.97,
        "Four blocks of 64 channels instead of two of 128: as many warps, but a barrier holds up two of "
        "them instead of four, and 192 channels leave no half tile. Twice the rows of dB and dC, a byte "
        "of 15.",
        (SCAN_TRAINING, "selective-scan-training-1x192x1048576"),
        SCAN_TESTS,
    ),
    Variant(
        "scan_forward_polynomial_eighth",
        {"SELECTIVE_SCAN_FORWARD_POLYNOMIALS": 1},
        1.04,
        "Special functions are 9.5 cycles a state (8 of a warp for each of 19 a step of 16 states), "
        "instructions some 11. A polynomial takes 11 instructions more and 8 of those cycles less: for "
        "an eighth of the states 8.5 and 12.4. A gain would say that instructions are not the bound.",
        (SCAN,),
        SCAN_TESTS,
    ),
    Variant(
        "scan_backward_polynomial_quarter",
        {"SELECTIVE_SCAN_BACKWARD_POLYNOMIALS": 1},
        1.05,
        "28.5 cycles of special functions a state, of three exponentials: 22.5 with a quarter of them "
        "by polynomials, for 8 instructions more of some 35. With 8 warps neither may be the bound.",
        (SCAN_TRAINING,),
        SCAN_TESTS,
        spilled=24,
    ),
    Variant(
        "scan_forward_polynomial_quarter",
        {"SELECTIVE_SCAN_FORWARD_POLYNOMIALS": 2},
        1.1,
        "As for an eighth: 7.5 cycles of special functions, 13.8 of instructions.",
        (SCAN,),
        SCAN_TESTS,
    ),
    Variant(
        "ssd_states_from_kernel_to_kernel",
        {"SSD_CHUNK_SCAN_RUNS": 1000000},
        1.3,
        "States are written and read twice instead of once. A gain would say that a block which takes a tile "
        "of the state through a sequence waits for each chunk's loads.",
        ("ssd-chunk-scan-forward-bfloat16",),
        ("tests/scan/test_ssd.py", "-k", "emulated"),
    ),
]

# ---- Attention -----------------------------------------------------------------------------------

# All cases have 32 heads of 32768 tokens at head dim 128, in bfloat16.
HOPPER_ATTENTION_TESTS = ("tests/attention/test_block_sparse_sm90.py", "-k", "not cuda")
ATTENTION_TESTS = (
    *("tests/attention/test_block_sparse_cuda.py", "tests/attention/test_block_sparse.py"),
    *("-k", "emulated"),
)

ATTENTION = [
    Variant(
        "block_lists_in_flight",
        {"BLOCK_LISTS_LOADS": 16, "BLOCK_LISTS_ACROSS_WARPS": 16},
        0.6,
        "2048 codes of a list are 4 turns that wait for memory instead of 16. Across memory 64 thread blocks "
        "have 2 warps a scheduler, whose some 2000 instructions a turn follow one another; with 4 half of "
        "the turns are left.",
        ("mask-from-dense",),
        ("tests/attention/test_block_lists.py", "-k", "emulated"),
    ),
    Variant(
        "attention_query_grads_whole_tiles",
        {"BLOCK_SPARSE_QUERY_GRADS_PART": 32},
        0.9,
        "The scores of all 32 keys of a tile at once: a warp reads its rows once instead of twice, 80 "
        "ldmatrix instead of 112. 1280 clocks of shared memory for 128 x 32 pairs instead of 1790, where "
        "tensor cores take 1240, beside 2560 for keys. 255 registers instead of 242, without a spill: two "
        "thread blocks as before.",
        ("full-bf16-backward", "density-25-block-128-backward", "density-25-block-64-backward"),
        ATTENTION_TESTS,
    ),
    Variant(
        "attention_key_grads_64_rows",
        {"BLOCK_SPARSE_KEY_GRADS_ROWS": 64},
        0.94,
        "Two thread blocks of 4 warps instead of one of 8, in the same registers: while one is at its "
        "barrier the other multiplies. Twice the bytes from L2, 7 a clock where 25 are there.",
        ("full-bf16-backward", "density-25-block-128-backward"),
        ATTENTION_TESTS,
    ),
    Variant(
        "attention_query_grads_one_slab",
        {"BLOCK_SPARSE_QUERY_GRADS_SLABS": 1, "BLOCK_SPARSE_QUERY_GRADS_PART": 32},
        0.95,
        "16 rows a warp in 165 registers. Blocks of 64 queries, of which shared memory holds 3, are 12 warps "
        "instead of 6; they read 128 KB of fragments for 64 x 32 pairs instead of 112. Blocks of 128 are 8 "
        "warps either way.",
        ("density-25-block-64-backward", "full-bf16-backward"),
        ATTENTION_TESTS,
    ),
    Variant(
        "attention_three_slots",
        {"BLOCK_SPARSE_SM90_TILE_SLOTS": 3, "BLOCK_SPARSE_SM90_ITEM_SLOTS": 1},
        0.95,
        "With two slots a tile of keys or values has some 1500 clocks to come, but 1000 are latency, and 32 "
        "KB at 24 bytes a clock another 1365. A third of each takes the place of the next queries, in 225 "
        "KB: those then wait for the last products, which short lists feel.",
        ("density-25-block-64", "full-bf16", "density-25-block-128", "window-bf16"),
        HOPPER_ATTENTION_TESTS,
    ),
    Variant(
        "attention_no_turns",
        {"BLOCK_SPARSE_SM90_TURNS": 0},
        1.05,
        "Without the turns at products both warpgroups may come to their softmax at once, 1024 clocks of "
        "special functions beside idle tensor cores. A gain would say that they part by themselves, and the "
        "two barriers a tile are for nothing.",
        ("full-bf16", "density-25-block-128"),
        HOPPER_ATTENTION_TESTS,
    ),
]


# ---- The optimizers ------------------------------------------------------------------------------

# Resident blocks change nothing on the emulator, so few of the tests will do.
STEP_TESTS = (
    "tests/optim/test_updates.py",
    *("-k", "emulated and (8bit_states or shapes_without)"),
)
CODEC_TESTS = ("tests/optim/test_blockwise.py", "-k", "emulated and (nearest or round_trips)")

OPTIMIZERS = [
    Variant(
        "dequantize_six_blocks",
        {"DEQUANTIZE_BLOCKS": 6},
        0.75,
        "A warp has 256 bytes of codes on their way. In 72 registers there are 24 warps, 6 KB of the 8.5 "
        "that a third of the memory's speed takes; in 40, without a spill, 48 warps.",
        ("dequantize-bf16",),
        CODEC_TESTS,
    ),
    Variant(
        "quantize_six_blocks",
        {"QUANTIZE_BLOCKS": 6},
        0.87,
        "24 KB of values on their way instead of 16, where two thirds of the memory's speed take 17: 40 "
        "registers instead of 60 without a spill. Encoding takes about as long as memory, and 48 warps "
        "overlap the two better than 32.",
        ("quantize-bf16",),
        CODEC_TESTS,
    ),
    Variant(
        "optimizer_one_state_four_blocks",
        {"OPTIMIZER_ONE_STATE_BLOCKS": 4},
        0.94,
        "64 registers instead of 80 for at most 7 instructions a tile more, of some 400: 32 warps instead of "
        "24, 41 KB on their way instead of 31.",
        ("lion8bit-bf16", "sgd8bit-bf16"),
        STEP_TESTS,
        spilled=8,
    ),
    Variant(
        "optimizer_two_states_four_blocks",
        {"OPTIMIZER_TWO_STATES_BLOCKS": 4},
        0.98,
        "32 warps instead of 24, but at most 34 instructions a tile more, of some 400, half of them loads of "
        "what was spilled. Instructions take 0.7 of the memory's time now: a gain says that latency is what "
        "is left.",
        ("adamw8bit-bf16", "adamw8bit-bf16-clip"),
        STEP_TESTS,
        spilled=544,
    ),
]


# ---- Sparse layers -------------------------------------------------------------------------------

SEMI_TESTS = ("tests/prune/test_semi_structured.py", "-k", "emulated")
ACTIVATION_TESTS = ("tests/prune/test_activation_sparse.py", "-k", "emulated")
HOPPER_LINEAR_TESTS = ("tests/prune/test_block_sparse_linear_cuda.py", "-k", "hopper or idles")

PRUNING = [
    Variant(
        "semi_structured_small_tiles",
        {"SEMI_STRUCTURED_SMALL_TILES": 128},
        0.55,
        "64 tokens are 64 thread blocks of 13 KB a stage instead of 32 of 25 KB, where there are 132 "
        "multiprocessors and each has to bring its stages in. Beyond 128 tokens nothing changes.",
        ("prune-2to4-64-bfloat16",),
        SEMI_TESTS,
    ),
    Variant(
        "block_sparse_linear_one_slab",
        {"BLOCK_SPARSE_LINEAR_SM90_SLABS": 1},
        0.7,
        "Tiles of 128 tokens: 512 tokens and blocks of 128 are 128 results instead of 64, too few for 132 "
        "multiprocessors, which sends them to mma.sync: 98 MB from L2 there, 65 MB here. 4096 tokens have "
        "65 FLOP a byte instead of 85 and should take longer.",
        ("bsr-b128-75-512-bf16", "bsr-b64-75-512-bf16", "bsr-b128-75-4096-bf16"),
        HOPPER_LINEAR_TESTS,
    ),
    Variant(
        "semi_structured_four_chunks",
        {"SEMI_STRUCTURED_FEW_CHUNKS": 4},
        0.75,
        "A row of 11008 is 22 turns of a warp, each of which waits for memory: 31 warps have 20 KB on their "
        "way, of the 25 to 30 that its speed takes. With four chunks loaded before they are used it is 80 "
        "KB, in 40 registers instead of 31.",
        ("prune-2to4-1-bfloat16", "prune-2to4-1-float32"),
        SEMI_TESTS,
    ),
    Variant(
        "activation_sparse_four_blocks",
        {"ACTIVATION_SPARSE_BLOCKS": 4},
        0.9,
        "Twice the shares of the listed rows: 32 warps instead of 16, 2 turns each instead of 4, of two "
        "loads that wait for one another. The sums of 34 shares instead of 17 are half a megabyte.",
        ("activation-sparse-4096x4096-50-1-bf16", "activation-sparse-4096x11008-75-1-bf16"),
        ACTIVATION_TESTS,
    ),
    Variant(
        "activation_sparse_eight_rows",
        {"ACTIVATION_SPARSE_ROWS": 8},
        0.92,
        "The same turns by eight rows of a warp at once: 103 registers instead of 64, and no more shares. "
        "With 8 tokens 266 bytes are spilled.",
        ("activation-sparse-4096x4096-50-1-bf16", "activation-sparse-4096x11008-75-1-bf16"),
        ACTIVATION_TESTS,
        spilled=266,
    ),
    Variant(
        "block_sparse_linear_weight_128_columns",
        {"BLOCK_SPARSE_LINEAR_SM90_COLUMNS": 128},
        0.92,
        "dW of a block at a time: 256 items of 32 KB a stage instead of some 144 of up to 48 KB for 132 "
        "multiprocessors, so the longest has 9 + 9 thousand clocks instead of 14 + 9. With 4096 tokens the "
        "same, less what begins and ends an item. Of the time dW is two fifths.",
        ("bsr-grad-b128-75-512-bf16", "bsr-grad-b128-75-4096-bf16"),
        HOPPER_LINEAR_TESTS,
    ),
]

VARIANTS = {"attention": ATTENTION, "optim": OPTIMIZERS, "prune": PRUNING, "scan": SCANS}
