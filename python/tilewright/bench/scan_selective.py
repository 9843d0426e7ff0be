"""The selective scan's cases: forward, forward with backward, long sequences, the cost of a call.

With N states and G groups, for each of batch * dim * length elements and with `itemsize` bytes of u's dtype,
read plus written:

    forward     u, delta, z and out                                  4 * itemsize
                B and C, for each group instead of each channel      2 * N * G / dim * itemsize
    backward    the above with dout for out, and kept states         + 4 N / 64 (written before: once more)
                gradients of u, delta, z; of B and C                 3 * itemsize + 2 * N * G / dim * itemsize

and, an exponential counted as one operation like the others: 7 N + 12 forward (decay, its power of two,
state, output), 19 N + 35 backward (the states again, their gradients, what these give to each input).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import OURS, Call, Case, Contender, Plan, full, peer, short

_KEPT = 64  # steps between the states kept for the backward pass

Scan = Callable[..., Tensor]


def token_flops(states: int, train: bool) -> float:
    """Of one token of one channel."""
    return 7.0 * states + 12 + (19.0 * states + 35 if train else 0)


@dataclass(frozen=True)
class _Size:
    batch: int
    dim: int
    length: int
    states: int
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        return self.batch * self.dim * self.length

    def forward_bytes(self) -> float:
        return self.elements * self.dtype.itemsize * (4 + 2 * self.states / self.dim)

    def training_bytes(self) -> float:
        gradients = self.elements * self.dtype.itemsize * (3 + 2 * self.states / self.dim)
        kept = self.elements * 2 * 4 * self.states / _KEPT
        return 2 * self.forward_bytes() + gradients + kept

    def flops(self, train: bool) -> float:
        return self.elements * token_flops(self.states, train)

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """u, delta, A, B, C, D, z, delta_bias."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        steps = (self.batch, self.dim, self.length)
        maps = (self.batch, self.states, self.length)
        A = -torch.arange(1.0, self.states + 1, device=device).repeat(self.dim, 1)
        bias = normal(self.dim, dtype=torch.float32) - 4
        D = torch.ones(self.dim, device=device)
        return normal(*steps), normal(*steps), A, normal(*maps), normal(*maps), D, normal(*steps), bias

    def named(self) -> dict[str, object]:
        return {
            **{"batch": self.batch, "dim": self.dim, "length": self.length, "states": self.states},
            "dtype": full(self.dtype),
        }


def cases(plan: Plan) -> list[Case]:
    """All cases of the op; a Mamba-1's at its block's size, without the long sequence and the bare call."""
    device = plan.device
    batch, dim, length, states = (8, 4096, 4096, 16) if plan.on_gpu else (1, 1536, 2048, 16)
    if plan.model:
        if plan.model.family != "mamba" or plan.model.scan is None:
            return []
        dim, states = plan.model.scan.inner, plan.model.scan.states
    usual, small = (_Size(batch, dim, length, states, plan.wide), _Size(1, dim, 128, states, plan.wide))
    if plan.quick:
        usual = _Size(1, 256, 512, states, plan.wide)
        return [_forward(device, usual, peers=True), _training(device, usual, peers=True)]
    found = [case(device, size, peers=True) for case in (_forward, _training) for size in (usual, small)]
    if plan.model:
        return found
    # Long sequences of few channels, which a GPU has to cut to be filled.
    long = [(1536, 65536), *([(192, 2**20)] if plan.on_gpu else [])]
    for size in (_Size(1, dim, length, states, plan.wide) for dim, length in long):
        found += [_forward(device, size, peers=False), _training(device, size, peers=False)]
    return [*found, _call(device)]


def _forward(device: torch.device, size: _Size, peers: bool) -> Case:
    def setup(scan: Callable[[], Scan]) -> Callable[[], Call]:
        def prepare() -> Call:
            run, inputs = scan(), size.inputs(device)

            def call() -> object:
                with torch.no_grad():
                    return run(*inputs, delta_softplus=True)

            return call

        return prepare

    rows = [
        Contender(name, setup(scan), size.forward_bytes() if name == OURS else None)
        for name, scan in _contenders(size, peers)
    ]
    if peers:
        rows.append(Contender("mambapy, its pscan alone", lambda: _pscan_alone(size, device), yardstick=True))
    title = f"selective_scan, {_words(size)}"
    return Case(f"selective-scan-{_tag(size)}", title, rows, size.flops(train=False), sizes=size.named())


def _training(device: torch.device, size: _Size, peers: bool) -> Case:
    """Forward and backward, gradients of all inputs."""

    def setup(scan: Callable[[], Scan]) -> Callable[[], Call]:
        def prepare() -> Call:
            run, inputs = scan(), [value.requires_grad_() for value in size.inputs(device)]
            weight = torch.ones_like(inputs[0])
            return lambda: torch.autograd.grad(run(*inputs, delta_softplus=True), inputs, weight)

        return prepare

    rows = [
        Contender(name, setup(scan), size.training_bytes() if name == OURS else None)
        for name, scan in _contenders(size, peers)
    ]
    title = f"selective_scan + backward, {_words(size)}"
    return Case(
        f"selective-scan-training-{_tag(size)}", title, rows, size.flops(train=True), sizes=size.named()
    )


def _call(device: torch.device) -> Case:
    """One token of one channel: what remains is the way from Python into the kernel and back."""
    size = _Size(1, 1, 1, 1, torch.float32)

    def forward() -> Call:
        scan, inputs = _ours(), size.inputs(device)
        return lambda: scan(*inputs, delta_softplus=True)

    def training() -> Call:
        scan, leaves = _ours(), [value.requires_grad_() for value in size.inputs(device)]
        weight = torch.ones_like(leaves[0])
        return lambda: torch.autograd.grad(scan(*leaves, delta_softplus=True), leaves, weight)

    rows = [Contender(OURS, forward), Contender(f"{OURS} + backward", training)]
    return Case("selective-scan-call", "selective_scan, a call", rows, calls=200, sizes=size.named())


def _contenders(size: _Size, peers: bool) -> list[tuple[str, Callable[[], Scan]]]:
    found: list[tuple[str, Callable[[], Scan]]] = [(OURS, _ours)]
    if peers:
        found += [("mamba-ssm", _mamba_ssm), ("mambapy", mambapy_scan)]
    if peers and size.length <= 256:
        found.append(("torch, a loop", lambda: _torch_loop))
    return found


def _ours() -> Scan:
    from tilewright.scan import selective_scan

    return cast(Scan, selective_scan)


def _mamba_ssm() -> Scan:
    interface = peer("mamba_ssm.ops.selective_scan_interface")
    scan: Scan = interface.selective_scan_fn
    return scan


def _pscan_alone(size: _Size, device: torch.device) -> Call:
    """The recurrence without what leads to it: mambapy's share of its own time that no fusion takes away."""
    pscan = peer("mambapy.pscan").pscan
    shape = (size.batch, size.length, size.dim, size.states)
    generator = torch.Generator(device).manual_seed(0)
    decay, drive = (torch.rand(shape, generator=generator, device=device) for _ in range(2))
    return torch.no_grad()(lambda: pscan(decay, drive))


def mambapy_scan() -> Scan:
    """selective_scan around mambapy's parallel scan, as its own Mamba does it."""
    pscan = peer("mambapy.pscan").pscan

    def scan(*inputs: Tensor, delta_softplus: bool) -> Tensor:
        u, delta, A, B, C, D, z, bias = inputs
        dt = F.softplus(delta.float() + bias[:, None]).transpose(1, 2)[..., None]
        tokens = u.float().transpose(1, 2)
        decay = torch.exp(dt * A)
        states = pscan(decay, dt * B.float().transpose(1, 2)[:, :, None] * tokens[..., None])
        y = (states @ C.float().transpose(1, 2)[..., None]).squeeze(-1) + D * tokens
        out: Tensor = (y.transpose(1, 2) * F.silu(z.float())).to(u.dtype)
        return out

    return scan


def _torch_loop(*inputs: Tensor, delta_softplus: bool) -> Tensor:
    """Token by token, as programs do that find no kernel."""
    u, delta, A, B, C, D, z, bias = inputs
    dt = F.softplus(delta.float() + bias[:, None])
    tokens, maps_in, maps_out = u.float(), B.float(), C.float()
    state = A.new_zeros(u.shape[0], *A.shape)
    rows = []
    for t in range(u.shape[-1]):
        step = dt[:, :, t, None]
        state = torch.exp(step * A) * state + step * tokens[:, :, t, None] * maps_in[:, None, :, t]
        rows.append((state * maps_out[:, None, :, t]).sum(-1))
    y = torch.stack(rows, -1) + D[:, None] * tokens
    return (y * F.silu(z.float())).to(u.dtype)


def _words(size: _Size) -> str:
    return f"{size.batch} x {size.dim} x {size.length}, {size.states} states, {short(size.dtype)}"


def _tag(size: _Size) -> str:
    return f"{size.batch}x{size.dim}x{size.length}"
