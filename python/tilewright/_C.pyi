"""
Compiled kernels of tilewright. Use the Python functions; they check and explain.
"""

from __future__ import annotations
import collections.abc
import typing

__all__: list[str] = [
    "OptimizerPlan",
    "SELECTIVE_SCAN_CHUNK",
    "SELECTIVE_SCAN_MAX_STATES",
    "SSD_CHUNK",
    "activation_sparse_linear",
    "activation_sparse_step",
    "activation_sparse_workspace",
    "block_codes",
    "block_lists",
    "block_sparse_bwd",
    "block_sparse_fwd",
    "block_sparse_fwd_sm90",
    "block_sparse_linear_dw",
    "block_sparse_linear_dx",
    "block_sparse_linear_fwd",
    "block_sparse_linear_workspace",
    "block_sparse_workspace",
    "build_info",
    "causal_conv1d_bwd",
    "causal_conv1d_fwd",
    "causal_conv1d_update",
    "causal_conv1d_workspace",
    "cpu_level",
    "cpu_levels",
    "cuda_runtime",
    "dequantize_blockwise",
    "dynamic_map",
    "gated_rms_norm_bwd",
    "gated_rms_norm_fwd",
    "gated_rms_norm_workspace",
    "keep_inputs",
    "linear_scan",
    "linear_scan_workspace",
    "mamba2_inner_bwd",
    "mamba2_inner_fwd",
    "mamba_step",
    "matmul",
    "position_tables",
    "prune_expand",
    "prune_group_scores",
    "prune_group_scores_workspace",
    "prune_obs_panel",
    "prune_random_scores",
    "prune_select",
    "prune_select_groups",
    "prune_select_rows",
    "prune_select_workspace",
    "quantize_blockwise",
    "register_builtin_map",
    "select_blocks",
    "selective_scan_bwd",
    "selective_scan_fwd",
    "selective_state_update",
    "semi_structured_compress",
    "semi_structured_decompress",
    "semi_structured_dw",
    "semi_structured_dx",
    "semi_structured_fwd",
    "semi_structured_workspace",
    "set_cpu_level",
    "ssd_chunk_scan_bwd",
    "ssd_chunk_scan_fwd",
    "ssd_chunk_scan_workspace",
]

class OptimizerPlan:
    def __init__(self, kind: str) -> None: ...
    def bind(self, params: list, grads: list, states: list, groups: list, ids: list) -> int: ...
    def step(
        self,
        groups: list,
        workspace: typing.Any,
        captured: bool,
        grad_scale: typing.Any,
        found_inf: typing.Any,
        max_grad_norm: typing.SupportsFloat | typing.SupportsIndex | None,
        seed: typing.SupportsInt | typing.SupportsIndex,
        threads: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...

def activation_sparse_linear(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes y of the inputs that are kept.
    """

def activation_sparse_step(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.SupportsInt | typing.SupportsIndex,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.Any,
    arg7: typing.Any,
    arg8: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes y of the inputs that each token keeps.
    """

def activation_sparse_workspace(
    arg0: typing.Any,
    arg1: typing.SupportsInt | typing.SupportsIndex,
    arg2: typing.SupportsInt | typing.SupportsIndex,
) -> int:
    """
    Bytes of workspace for so many outputs; keep_inputs has none.
    """

def block_codes(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.SupportsInt | typing.SupportsIndex,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes the map of codes of lists, and what is wrong with them.
    """

def block_lists(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.Any,
    arg7: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes the lists of a map of codes, both ways.
    """

def block_sparse_bwd(
    arg0: dict,
    arg1: typing.SupportsInt | typing.SupportsIndex,
    arg2: typing.SupportsInt | typing.SupportsIndex,
    arg3: typing.SupportsFloat | typing.SupportsIndex,
    arg4: typing.SupportsFloat | typing.SupportsIndex,
    arg5: bool,
    arg6: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def block_sparse_fwd(
    arg0: dict,
    arg1: typing.SupportsInt | typing.SupportsIndex,
    arg2: typing.SupportsInt | typing.SupportsIndex,
    arg3: typing.SupportsFloat | typing.SupportsIndex,
    arg4: typing.SupportsFloat | typing.SupportsIndex,
    arg5: bool,
    arg6: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def block_sparse_fwd_sm90(
    arg0: dict,
    arg1: typing.SupportsInt | typing.SupportsIndex,
    arg2: typing.SupportsInt | typing.SupportsIndex,
    arg3: typing.SupportsFloat | typing.SupportsIndex,
    arg4: typing.SupportsFloat | typing.SupportsIndex,
    arg5: bool,
) -> None: ...
def block_sparse_linear_dw(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.SupportsInt | typing.SupportsIndex,
    arg5: typing.SupportsInt | typing.SupportsIndex,
    arg6: typing.Any,
    arg7: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes dW = dz^T x at the blocks that are there.
    """

def block_sparse_linear_dx(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.SupportsInt | typing.SupportsIndex,
    arg5: typing.SupportsInt | typing.SupportsIndex,
    arg6: typing.Any,
    arg7: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes dx = dz W.
    """

def block_sparse_linear_fwd(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.SupportsInt | typing.SupportsIndex,
    arg7: typing.SupportsInt | typing.SupportsIndex,
    arg8: typing.SupportsInt | typing.SupportsIndex,
    arg9: typing.Any,
    arg10: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes y = activation(x W^T + bias), and z before it.
    """

def block_sparse_linear_workspace(
    arg0: typing.Any,
    arg1: typing.SupportsInt | typing.SupportsIndex,
    arg2: typing.SupportsInt | typing.SupportsIndex,
    arg3: typing.SupportsInt | typing.SupportsIndex,
    arg4: typing.SupportsInt | typing.SupportsIndex,
    arg5: typing.SupportsInt | typing.SupportsIndex,
) -> int:
    """
    Bytes of scratch a call needs.
    """

def block_sparse_workspace(
    arg0: dict,
    arg1: typing.SupportsInt | typing.SupportsIndex,
    arg2: typing.SupportsInt | typing.SupportsIndex,
    arg3: bool,
    arg4: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def build_info() -> dict: ...
def causal_conv1d_bwd(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.Any,
    arg7: bool,
    arg8: typing.Any,
    arg9: typing.Any,
    arg10: typing.Any,
    arg11: typing.Any,
    arg12: typing.Any,
    arg13: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes the gradients that are not None.
    """

def causal_conv1d_fwd(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: bool,
    arg6: typing.Any,
    arg7: typing.Any,
    arg8: typing.Any,
    arg9: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes out and, unless None, final_states.
    """

def causal_conv1d_update(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: bool,
    arg5: typing.Any,
    arg6: typing.Any,
    arg7: typing.Any,
    arg8: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes out and moves conv_state on.
    """

def causal_conv1d_workspace(
    arg0: typing.Any, arg1: typing.SupportsInt | typing.SupportsIndex, arg2: bool, arg3: bool
) -> int:
    """
    Bytes of scratch.
    """

def cpu_level() -> str:
    """
    The CPU level in use.
    """

def cpu_levels() -> list[str]:
    """
    CPU levels that this machine can run, lowest first.
    """

def cuda_runtime() -> dict:
    """
    Driver and runtime versions; never raises.
    """

def dequantize_blockwise(
    A: typing.Any,
    absmax: typing.Any,
    code: typing.Any,
    signed: bool,
    out: typing.Any,
    blocksize: typing.SupportsInt | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def dynamic_map(signed: bool) -> list[float]:
    """
    The built-in map's 256 entries, ascending.
    """

def gated_rms_norm_bwd(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.SupportsInt | typing.SupportsIndex,
    arg6: bool,
    arg7: typing.Any,
    arg8: typing.Any,
    arg9: typing.Any,
    arg10: typing.Any,
    arg11: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes dx, dweight and, with z, dz.
    """

def gated_rms_norm_fwd(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.SupportsFloat | typing.SupportsIndex,
    arg4: typing.SupportsInt | typing.SupportsIndex,
    arg5: bool,
    arg6: typing.Any,
    arg7: typing.Any,
    arg8: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes out and rstd.
    """

def gated_rms_norm_workspace(arg0: typing.Any, arg1: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    Bytes of scratch of a backward pass.
    """

def keep_inputs(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.SupportsInt | typing.SupportsIndex,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes which inputs each token keeps.
    """

def linear_scan(
    tensors: collections.abc.Sequence,
    cu_seqlens: typing.Any,
    dim: typing.SupportsInt | typing.SupportsIndex,
    backward: bool,
    descending: bool,
    workspace: typing.Any,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    One sweep over (a, b or grad, h or db, h, da, h0, dh0); the last four may be None.
    """

def linear_scan_workspace(
    tensors: collections.abc.Sequence,
    cu_seqlens: typing.Any,
    dim: typing.SupportsInt | typing.SupportsIndex,
    backward: bool,
    descending: bool,
) -> int: ...
def mamba2_inner_bwd(
    arg0: dict,
    arg1: collections.abc.Callable,
    arg2: typing.SupportsInt | typing.SupportsIndex,
    arg3: typing.SupportsInt | typing.SupportsIndex,
    arg4: bool,
    arg5: typing.SupportsFloat | typing.SupportsIndex,
    arg6: typing.SupportsFloat | typing.SupportsIndex,
    arg7: typing.SupportsInt | typing.SupportsIndex,
    arg8: bool,
) -> None:
    """
    Writes the gradients that are not None.
    """

def mamba2_inner_fwd(
    arg0: dict,
    arg1: collections.abc.Callable,
    arg2: typing.SupportsInt | typing.SupportsIndex,
    arg3: typing.SupportsFloat | typing.SupportsIndex,
    arg4: typing.SupportsInt | typing.SupportsIndex,
    arg5: bool,
    arg6: typing.SupportsFloat | typing.SupportsIndex,
    arg7: typing.SupportsFloat | typing.SupportsIndex,
    arg8: typing.SupportsInt | typing.SupportsIndex,
    arg9: bool,
) -> None:
    """
    Writes the results among the tensors; allocate(bytes) gives scratch.
    """

def mamba_step(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.Any,
    arg7: typing.Any,
    arg8: typing.Any,
    arg9: typing.Any,
    arg10: typing.Any,
    arg11: typing.Any,
    arg12: typing.Any,
    arg13: typing.Any,
    arg14: typing.Any,
    arg15: typing.Any,
    arg16: typing.Any,
    arg17: typing.SupportsFloat | typing.SupportsIndex | None,
    arg18: typing.Any,
    arg19: typing.Any,
    arg20: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes out and moves both states on.
    """

def matmul(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes a @ b + bias (or None) of float32 matrices on the CPU, of any strides.
    """

def position_tables(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.SupportsInt | typing.SupportsIndex,
    arg4: typing.SupportsInt | typing.SupportsIndex,
    arg5: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes the bit tables of blocks whose keys are in any order.
    """

def prune_expand(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.SupportsInt | typing.SupportsIndex,
    arg3: typing.SupportsInt | typing.SupportsIndex,
    arg4: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Gives each element what is said of its group.
    """

def prune_group_scores(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.SupportsInt | typing.SupportsIndex,
    arg6: typing.SupportsInt | typing.SupportsIndex,
    arg7: typing.SupportsInt | typing.SupportsIndex,
    arg8: typing.SupportsFloat | typing.SupportsIndex,
    arg9: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes the score of each group of weights.
    """

def prune_group_scores_workspace(
    arg0: typing.Any,
    arg1: typing.SupportsInt | typing.SupportsIndex,
    arg2: typing.SupportsInt | typing.SupportsIndex,
) -> int:
    """
    Bytes that prune_group_scores needs.
    """

def prune_obs_panel(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.SupportsInt | typing.SupportsIndex,
    arg5: typing.SupportsInt | typing.SupportsIndex,
    arg6: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Removes weights of a panel; the others of a row make up for them.
    """

def prune_random_scores(
    arg0: typing.Any,
    arg1: typing.SupportsInt | typing.SupportsIndex,
    arg2: typing.SupportsInt | typing.SupportsIndex,
    arg3: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes random numbers, by seed and position.
    """

def prune_select(
    arg0: list,
    arg1: list,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.SupportsInt | typing.SupportsIndex,
    arg5: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Keeps the best of all tensors.
    """

def prune_select_groups(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.SupportsInt | typing.SupportsIndex,
    arg5: typing.SupportsInt | typing.SupportsIndex,
    arg6: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Keeps n of each m neighbours.
    """

def prune_select_rows(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.SupportsInt | typing.SupportsIndex,
    arg6: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Keeps the best of each row.
    """

def prune_select_workspace(arg0: list, arg1: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    Bytes that prune_select needs.
    """

def quantize_blockwise(
    A: typing.Any,
    code: typing.Any,
    signed: bool,
    out: typing.Any,
    absmax: typing.Any,
    blocksize: typing.SupportsInt | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def register_builtin_map(qmap: typing.Any, signed: bool) -> None:
    """
    Declares that this device tensor holds the built-in map.
    """

def select_blocks(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.SupportsInt | typing.SupportsIndex,
    arg4: typing.SupportsFloat | typing.SupportsIndex,
    arg5: typing.Any,
    arg6: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes the codes of each row's best candidates.
    """

def selective_scan_bwd(
    dout: typing.Any,
    dlast_state: typing.Any,
    u: typing.Any,
    delta: typing.Any,
    A: typing.Any,
    B: typing.Any,
    C: typing.Any,
    D: typing.Any,
    z: typing.Any,
    delta_bias: typing.Any,
    initial_state: typing.Any,
    cu_seqlens: typing.Any,
    order: typing.Any,
    chunk_states: typing.Any,
    softplus: bool,
    reverse: bool,
    gradients: list,
    workspace: typing.Any,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> int:
    """
    As selective_scan_fwd; gradients of None are not computed.
    """

def selective_scan_fwd(
    u: typing.Any,
    delta: typing.Any,
    A: typing.Any,
    B: typing.Any,
    C: typing.Any,
    D: typing.Any,
    z: typing.Any,
    delta_bias: typing.Any,
    initial_state: typing.Any,
    cu_seqlens: typing.Any,
    order: typing.Any,
    softplus: bool,
    reverse: bool,
    out: typing.Any,
    last_state: typing.Any,
    chunk_states: typing.Any,
    workspace: typing.Any,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> int:
    """
    Runs and returns 0, or returns the bytes of workspace that are missing and does nothing.
    """

def selective_state_update(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.Any,
    arg7: typing.Any,
    arg8: typing.Any,
    arg9: bool,
    arg10: typing.Any,
    arg11: typing.Any,
    arg12: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes out and moves state on.
    """

def semi_structured_compress(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.SupportsInt | typing.SupportsIndex,
    arg5: typing.SupportsInt | typing.SupportsIndex,
    arg6: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes a dense weight's kept elements and their positions.
    """

def semi_structured_decompress(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.SupportsInt | typing.SupportsIndex,
    arg4: typing.SupportsInt | typing.SupportsIndex,
    arg5: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes the dense weight.
    """

def semi_structured_dw(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.SupportsInt | typing.SupportsIndex,
    arg6: typing.SupportsInt | typing.SupportsIndex,
    arg7: typing.SupportsInt | typing.SupportsIndex,
    arg8: typing.Any,
    arg9: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes the gradient of the kept elements.
    """

def semi_structured_dx(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.SupportsInt | typing.SupportsIndex,
    arg5: typing.SupportsInt | typing.SupportsIndex,
    arg6: typing.SupportsInt | typing.SupportsIndex,
    arg7: typing.Any,
    arg8: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes the gradient of the input.
    """

def semi_structured_fwd(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.SupportsInt | typing.SupportsIndex,
    arg7: typing.SupportsInt | typing.SupportsIndex,
    arg8: typing.SupportsInt | typing.SupportsIndex,
    arg9: typing.SupportsInt | typing.SupportsIndex,
    arg10: typing.Any,
    arg11: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Writes the layer's result.
    """

def semi_structured_workspace(
    arg0: typing.SupportsInt | typing.SupportsIndex,
    arg1: typing.SupportsInt | typing.SupportsIndex,
    arg2: typing.SupportsInt | typing.SupportsIndex,
    arg3: typing.SupportsInt | typing.SupportsIndex,
    arg4: typing.SupportsInt | typing.SupportsIndex,
    arg5: bool,
    arg6: typing.SupportsInt | typing.SupportsIndex,
    arg7: typing.SupportsInt | typing.SupportsIndex,
) -> int:
    """
    Bytes of memory that a call on the CPU needs beside.
    """

def set_cpu_level(level: str) -> None:
    """
    Chooses the CPU level, for tests.
    """

def ssd_chunk_scan_bwd(
    arg0: dict,
    arg1: bool,
    arg2: typing.SupportsFloat | typing.SupportsIndex,
    arg3: typing.SupportsFloat | typing.SupportsIndex,
    arg4: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def ssd_chunk_scan_fwd(
    arg0: dict,
    arg1: bool,
    arg2: typing.SupportsFloat | typing.SupportsIndex,
    arg3: typing.SupportsFloat | typing.SupportsIndex,
    arg4: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def ssd_chunk_scan_workspace(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: bool,
    arg4: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...

SELECTIVE_SCAN_CHUNK: int = 64
SELECTIVE_SCAN_MAX_STATES: int = 256
SSD_CHUNK: int = 64
