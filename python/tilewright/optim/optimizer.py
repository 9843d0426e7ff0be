"""The base of all optimizers: parameter groups and state as torch.optim has them, one kernel launch a step.

What happens in a step, for N parameters in G groups:

    gather    params, grads, states: four passes over lists, no torch op and nothing allocated
    bind      the extension checks every tensor and writes down its pointers; nothing has changed until here
    step      one launch updates all parameters and states (one more comes first if max_grad_norm is set)
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from itertools import chain
from operator import is_
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from .. import _backend
from .._checks import check_number
from . import state_io
from .manager import GlobalOptimManager
from .options import SETTINGS, check_options, read_lr
from .state_io import Moment

_Loss = TypeVar("_Loss")

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_BITS_KEYS = ("optim_bits", "min_8bit_size")

# Settings of torch.optim that choose an implementation: dropped when a checkpoint brings them.
_IMPLEMENTATION_KEYS = frozenset(("amsgrad", "foreach", "fused", "capturable", "differentiable"))

# In a checkpoint's groups: blocks of 8-bit states run along memory, also where strides are not row-major.
_BLOCK_ORDER = "block_order"


class _Batch(NamedTuple):
    """Parallel lists, one entry a parameter: what one call of bind takes."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Any]]
    groups: list[int]
    ids: list[int]

    def take(self, rows: Iterable[int]) -> _Batch:
        rows = list(rows)
        params, grads, states, groups, ids = ([column[row] for row in rows] for column in self)
        return _Batch(params, grads, states, groups, ids)  # type: ignore[arg-type]


class _Roster(NamedTuple):
    """What is known of all parameters between steps, until groups or overrides change."""

    params: list[Tensor]
    groups: list[int]  # index into param_groups, or past its end into overrides
    ids: list[int]
    bits: list[int]
    overrides: list[tuple[int, dict[str, Any]]]  # (index into param_groups, what differs)
    has_foreign: bool  # some parameter is of a type with memory of its own kind, such as DTensor
    group_sizes: list[int]
    manager_version: int

    def describes(self, param_groups: list[dict[str, Any]], manager_version: int) -> bool:
        if self.manager_version != manager_version:
            return False
        if self.group_sizes != [len(group["params"]) for group in param_groups]:
            return False
        return all(map(is_, chain.from_iterable([group["params"] for group in param_groups]), self.params))


class BlockwiseOptimizer(Optimizer):
    """Base class; see AdamW8bit, Adam8bit, Lion8bit and SGD8bit.

    A subclass names its kernel and moments and says, in `_kernel_options`, what a group means to the kernel.
    """

    _kind: str
    _moments: tuple[Moment, ...]
    _overridable: tuple[str, ...] = ("optim_bits", "lr", "betas", "eps", "weight_decay", "min_8bit_size")

    _roster: _Roster | None
    _plans: dict[Any, Any]  # by device and extension
    _workspaces: dict[torch.device, Tensor]
    _captured: list[Tensor]  # workspaces of captured steps, which graphs go on using

    # GradScaler then leaves unscaling and skipping to step(), by the attributes grad_scale and found_inf.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        optim_bits: int,
        min_8bit_size: int,
        max_grad_norm: float | None,
        amsgrad: bool = False,
        args: Any = None,
        is_paged: bool = False,
    ) -> None:
        self._refuse_arguments(amsgrad, args, is_paged, max_grad_norm)
        check_options({**defaults, "optim_bits": optim_bits, "min_8bit_size": min_8bit_size})
        self._optim_bits = optim_bits
        self._min_8bit_size = min_8bit_size
        self._max_grad_norm = None if max_grad_norm is None else float(max_grad_norm)
        self._forget()
        super().__init__(params, defaults)
        if defaults["seed"] is not None and not self._is_stochastic():
            raise ValueError('seed has no effect without param_precision="stochastic"')

    def _refuse_arguments(
        self, amsgrad: bool, args: Any, is_paged: bool, max_grad_norm: float | None
    ) -> None:
        name = type(self).__name__
        if amsgrad:
            raise ValueError(f"{name} does not support amsgrad=True")
        if args is not None:
            raise ValueError(f"{name}: args is not supported, give its entries as keyword arguments")
        if is_paged:
            raise NotImplementedError(
                f"{name} keeps its state on the parameters' device: is_paged must be False"
            )
        if max_grad_norm is not None:
            check_number("max_grad_norm", max_grad_norm, "(0, inf)")

    # -- parameter groups -------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, which may set what the constructor sets per group, and optim_bits, min_8bit_size."""
        if isinstance(param_group, dict) and "params" in param_group:
            self._check_group({**self.defaults, **param_group})
            params = param_group["params"]
            if not isinstance(params, (Tensor, set)):
                param_group["params"] = params = list(params)
                tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in params]
                if len({id(p) for p in tensors}) != len(tensors):
                    raise ValueError("a parameter appears more than once in a parameter group")
            self._choose_seed(param_group)
        super().add_param_group(param_group)
        self._roster = None

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Leaves alone what is the user's own, and other optimizers' settings that a checkpoint may bring."""
        check_options(
            {key: value for key, value in group.items() if key in self.defaults or key not in SETTINGS}
        )

    def _choose_seed(self, group: dict[str, Any]) -> None:
        """One seed for all groups, drawn from torch's generator when the first that needs one has none."""
        precision = group.get("param_precision", self.defaults["param_precision"])
        seed = group.get("seed", self.defaults["seed"])
        taken = self._seed()
        if seed is None and precision == "stochastic":
            seed = _draw_seed() if taken is None else taken
        if taken is not None and seed is not None and seed != taken:
            raise ValueError(f"all parameter groups share one seed, got {seed} after {taken}")
        group["seed"] = seed

    def _seed(self) -> int | None:
        return next((group["seed"] for group in self.param_groups if group["seed"] is not None), None)

    def _is_stochastic(self) -> bool:
        return any(group["param_precision"] == "stochastic" for group in self.param_groups)

    def _kernel_options(self, group: Mapping[str, Any], lr: float | Tensor) -> dict[str, Any]:
        """The kernel's settings for a group. Called every step: schedulers write to groups."""
        raise NotImplementedError

    # -- a step -----------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], _Loss]) -> _Loss: ...

    @_disable_dynamo
    def step(self, closure: Callable[[], _Loss] | None = None) -> _Loss | None:
        """Updates all parameters that have a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What `closure` returned, or None.

        Raises:
            ValueError, TypeError, NotImplementedError: a parameter, gradient, state or setting that cannot be
                used: sparse, complex or integer tensors, DTensors, gradients of another dtype, shape or
                device, a learning rate that is not finite. No parameter and no state has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        roster = self._current_roster()
        batch = self._gather(roster)
        if batch is not None:
            self._launch(batch, roster)
        return loss

    def _gather(self, roster: _Roster) -> _Batch | None:
        """The rows that have a gradient; None if there are none."""
        params = roster.params
        grads: list[Any] = [p.grad for p in params]
        states: list[Any] = [*map(self.state.get, params)]
        batch = _Batch(params, grads, states, roster.groups, roster.ids)
        if not _PLAIN.issuperset(map(type, grads)):
            batch = batch.take(row for row, grad in enumerate(grads) if grad is not None)
            if not batch.params:
                return None
            for grad, number in zip(batch.grads, batch.ids, strict=True):
                if type(grad) not in _PLAIN:
                    raise NotImplementedError(
                        f"{self._label(number)}: gradients of type {type(grad).__name__} are not supported"
                    )
        if roster.has_foreign:
            for row in range(len(batch.params)):
                self._refuse(batch, row)
        if any(map(Tensor.is_neg, batch.grads)):
            batch = batch._replace(grads=[grad.resolve_neg() for grad in batch.grads])
        return batch

    def _launch(self, batch: _Batch, roster: _Roster) -> None:
        batch, fresh = self._with_states(batch, roster)
        devices = set([p.device for p in batch.params])  # noqa: C403  (a list first is a third faster)
        if len(devices) == 1:
            parts = [batch]
        else:
            parts = [batch.take(r for r, p in enumerate(batch.params) if p.device == d) for d in devices]
            if self._max_grad_norm is not None:
                raise NotImplementedError(
                    f"max_grad_norm is the norm over all parameters, which lie on {len(devices)} devices: "
                    "use torch.nn.utils.clip_grad_norm_"
                )
        launches = []
        for device, part in zip(devices, parts, strict=True):
            plan, options = self._plan_on(device), self._options_on(device, roster)
            size, bound = self._bind(plan, part, fresh)
            captured = _is_capturing(device)
            workspace = self._workspace_on(device, size, captured)
            launches.append((plan, bound, options, workspace, captured, self._scaling_on(device)))
        for p, state in fresh.items():
            self.state[p] = state
        increment_version(batch.params)
        threads, seed = _backend.num_threads(), self._seed() or 0
        for plan, _, options, workspace, captured, scaling in launches:
            plan.step(options, workspace, captured, *scaling, self._max_grad_norm, seed, threads)

    def _with_states(self, batch: _Batch, roster: _Roster) -> tuple[_Batch, dict[Tensor, dict[str, Any]]]:
        """The batch with a state in every row, and the new ones, which count once bind has passed."""
        if all(batch.states):
            return batch, {}
        fresh: dict[Tensor, dict[str, Any]] = {}
        states = list(batch.states)
        for row, p in enumerate(batch.params):
            if not states[row]:
                self._refuse(batch, row)
                self._refuse_in_graph(p, batch.ids[row])
                states[row] = fresh[p] = state_io.new_state(p, self._moments, roster.bits[batch.ids[row]])
        return batch._replace(states=states), fresh

    def _bind(self, plan: Any, batch: _Batch, fresh: dict[Tensor, dict[str, Any]]) -> tuple[int, _Batch]:
        """Bytes of workspace the step needs, and what was bound: the plan holds bare pointers into it.

        What the extension refuses is repaired, or refused in better words.
        """
        try:
            return plan.bind(*batch), batch
        except (ValueError, TypeError, RuntimeError) as error:
            refusal = error
        repaired = self._repair(batch, fresh)
        if repaired is None:
            raise refusal
        return plan.bind(*repaired), repaired

    def _repair(self, batch: _Batch, fresh: dict[Tensor, dict[str, Any]]) -> _Batch | None:
        """The batch with gradients and states in their parameter's layout and device; None if they were."""
        grads, states = list(batch.grads), list(batch.states)
        changed = False
        with torch.no_grad():
            for row, p in enumerate(batch.params):
                self._refuse(batch, row)
                if not state_io.same_layout(grads[row], p):
                    grads[row] = torch.empty_like(p, requires_grad=False).copy_(grads[row])
                    changed = True
                if state_io.is_misplaced(states[row], p, self._moments):
                    self._refuse_in_graph(p, batch.ids[row])
                    bits = state_io.bits_of(states[row])
                    states[row] = fresh[p] = state_io.refit(states[row], p, self._moments, bits)
                    changed = True
        return batch._replace(grads=grads, states=states) if changed else None

    def _refuse(self, batch: _Batch, row: int) -> None:
        """Raises if a parameter and its gradient cannot be stepped, whatever the extension would say."""
        p, grad, label = batch.params[row], batch.grads[row], self._label(batch.ids[row])
        if grad.layout != torch.strided:
            raise NotImplementedError(
                f"{label}: sparse gradients are not supported, make the embedding sparse=False"
            )
        if p.layout != torch.strided or _is_foreign(p):
            raise NotImplementedError(
                f"{label}: parameters of type {type(p).__name__} ({p.layout}) are not supported"
            )
        if p.dtype not in _FLOATS:
            raise TypeError(
                f"{label}: dtype {p.dtype} is not supported, expected float32, float16 or bfloat16"
            )
        if grad.dtype != p.dtype:
            raise TypeError(f"{label}: grad has dtype {grad.dtype}, expected the parameter's {p.dtype}")
        if grad.shape != p.shape:
            raise ValueError(
                f"{label}: grad has shape {tuple(grad.shape)}, expected the parameter's {tuple(p.shape)}"
            )
        if grad.device != p.device:
            raise ValueError(f"{label}: grad is on {grad.device}, expected the parameter's {p.device}")
        if p.device.type not in ("cpu", "cuda"):
            raise NotImplementedError(f"{label}: device {p.device} is not supported, expected cpu or cuda")
        if not state_io.is_dense(p):
            raise ValueError(f"{label}: the parameter has gaps or overlaps in memory (strides {p.stride()})")

    def _refuse_in_graph(self, p: Tensor, number: int) -> None:
        if _is_capturing(p.device):
            raise RuntimeError(
                f"{self._label(number)}: its state would be made anew by every replay of this graph: "
                "take one step before the capture, or load a state_dict"
            )

    # -- what a step is given ---------------------------------------------------------------------------

    def _current_roster(self) -> _Roster:
        roster, manager = self._roster, GlobalOptimManager.get_instance()
        if roster is None or not roster.describes(self.param_groups, manager.version):
            self._roster = roster = self._new_roster(manager)
        return roster

    def _new_roster(self, manager: GlobalOptimManager) -> _Roster:
        params = [p for group in self.param_groups for p in group["params"]]
        found = manager.overrides()
        groups, bits = [], []
        overrides: dict[Any, int] = {}
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                override = found.get(id(p), {})
                self._check_override(override)
                bits.append(self._bits({**group, **override}, p))
                settings = tuple(item for item in override.items() if item[0] not in _BITS_KEYS)
                groups.append(index)
                if settings:
                    position = len(self.param_groups) + len(overrides)
                    groups[-1] = overrides.setdefault((index, settings), position)
        for p, wanted in zip(params, bits, strict=True):
            state = self.state.get(p)
            if state and state_io.bits_of(state) != wanted:
                self.state[p] = state_io.refit(state, p, self._moments, wanted)
        sizes = [len(group["params"]) for group in self.param_groups]
        foreign = any(map(_is_foreign, params))
        ids = list(range(len(params)))
        translated = [(index, self._translate_override(dict(settings))) for index, settings in overrides]
        return _Roster(params, groups, ids, bits, translated, foreign, sizes, manager.version)

    def _bits(self, options: Mapping[str, Any], p: Tensor) -> int:
        if p.numel() < options.get("min_8bit_size", self._min_8bit_size):
            return 32
        bits: int = options.get("optim_bits", self._optim_bits)
        return bits

    def _check_override(self, override: Mapping[str, Any]) -> None:
        for key in override:
            if key not in self._overridable:
                raise ValueError(f"{type(self).__name__} has no {key!r} to override")

    def _translate_override(self, override: Mapping[str, Any]) -> dict[str, Any]:
        return dict(override)

    def _options_on(self, device: torch.device, roster: _Roster) -> list[dict[str, Any]]:
        groups = self.param_groups
        if roster.overrides:
            groups = groups + [{**groups[index], **override} for index, override in roster.overrides]
        return [self._kernel_options(group, read_lr(group["lr"], device)) for group in groups]

    def _scaling_on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return (
            None if scale is None else scale.to(device, non_blocking=True),
            None if found_inf is None else found_inf.to(device, non_blocking=True),
        )

    def _plan_on(self, device: torch.device) -> Any:
        key = (device, _backend.C)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = _backend.optimizer_plan(self._kind)
        return plan

    def _workspace_on(self, device: torch.device, size: int, captured: bool) -> Tensor | None:
        """The step's memory on the device: one that all steps share, but a captured one keeps its own.

        A graph goes on using its memory, so no other step may write there.
        """
        if size == 0:
            return None
        workspace = None if captured else self._workspaces.get(device)
        if workspace is None or workspace.numel() < size:
            workspace = torch.empty(size, dtype=torch.uint8, device=device)
            if captured:
                self._captured.append(workspace)
            else:
                self._workspaces[device] = workspace
        return workspace

    def _label(self, number: int) -> str:
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        return f"param {number}" + (f" ({names[number]})" if number < len(names) else "")

    # -- state ------------------------------------------------------------------------------------------

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state as bitsandbytes lays it out, which can load it; see docs for what goes across."""
        hooks = self._optimizer_state_dict_post_hooks
        self._optimizer_state_dict_post_hooks = OrderedDict()
        try:
            result = super().state_dict()
        finally:
            self._optimizer_state_dict_post_hooks = hooks
        result["state"] = state_io.export_states(result["state"])
        result["param_groups"] = [
            {**group, **self._foreign_options(group), _BLOCK_ORDER: "storage"}
            for group in result["param_groups"]
        ]
        for hook in hooks.values():
            changed = hook(self, result)
            if changed is not None:
                result = changed
        return result

    @_disable_dynamo
    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a checkpoint of this class, of bitsandbytes or of torch.optim.

        Settings of groups come from the checkpoint where it has them, as torch.optim does it.
        States are copied, moved to their parameter's device and, where the checkpoint's bits, block size or
        layout are not this optimizer's, converted. A map of its own that an 8-bit state brings is kept.

        Raises:
            ValueError: groups, shapes or lengths that do not fit. Nothing has changed then.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            if changed is not None:
                state_dict = changed
        saved_groups = state_dict["param_groups"]
        groups = self._merge_groups(saved_groups)
        states = self._import_states(state_dict["state"], saved_groups, groups)
        self.__setstate__({"state": states, "param_groups": groups})
        for finished in self._optimizer_load_state_dict_post_hooks.values():
            finished(self)

    def _merge_groups(self, saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(
                f"the checkpoint has {len(saved_groups)} parameter groups, "
                f"the optimizer {len(self.param_groups)}"
            )
        merged = []
        for index, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            if len(saved["params"]) != len(group["params"]):
                raise ValueError(
                    f"parameter group {index} has {len(saved['params'])} parameters in the checkpoint, "
                    f"{len(group['params'])} in the optimizer"
                )
            merged.append({**group, **deepcopy(self._own_options(saved)), "params": group["params"]})
            self._check_group(merged[-1])
        seeds = {group["seed"] for group in merged} - {None}
        if len(seeds) > 1:
            raise ValueError(f"all parameter groups share one seed, the checkpoint has {sorted(seeds)}")
        return merged

    def _import_states(
        self,
        saved_states: Mapping[Any, Any],
        saved_groups: list[dict[str, Any]],
        groups: list[dict[str, Any]],
    ) -> dict[Tensor, dict[str, Any]]:
        overrides = GlobalOptimManager.get_instance().overrides()
        states: dict[Tensor, dict[str, Any]] = defaultdict(dict)
        left, number = dict(saved_states), -1
        for saved_group, group in zip(saved_groups, groups, strict=True):
            own_layout = saved_group.get(_BLOCK_ORDER) == "storage"
            for key, p in zip(saved_group["params"], group["params"], strict=True):
                number += 1
                bits = self._bits({**group, **overrides.get(id(p), {})}, p)
                saved = left.pop(key, {})
                state = state_io.import_state(saved, p, self._moments, bits, own_layout, self._label(number))
                if state:
                    states[p] = state
        if left:
            raise ValueError(f"the checkpoint has states of no parameter: {', '.join(map(str, left))}")
        return states

    def _own_options(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint's group says, in this package's terms."""
        if saved.get("amsgrad"):
            raise ValueError("the checkpoint was written with amsgrad=True, which is not supported")
        dropped = {"params", _BLOCK_ORDER, *_IMPLEMENTATION_KEYS, *self._foreign_options(self.defaults)}
        return {key: value for key, value in saved.items() if key not in dropped}

    def _foreign_options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """What bitsandbytes expects in a group that means nothing here."""
        return {}

    # -- copies -----------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        own = ("_optim_bits", "_min_8bit_size", "_max_grad_norm")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        state_io.share_maps(self.state.values(), self._moments)

    def _forget(self) -> None:
        """Drops what is only a cache: it is made anew by the next step."""
        self._roster = None
        self._plans = {}
        self._workspaces = {}
        self._captured = getattr(self, "_captured", [])


def _is_capturing(device: torch.device) -> bool:
    """Whether what is launched on the device now goes into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _is_foreign(p: Tensor) -> bool:
    return type(p).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _draw_seed() -> int:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ValueError(
            'param_precision="stochastic" needs a seed in a distributed run: give the same to every rank, '
            "or their copies of the parameters drift apart"
        )
    return int(torch.randint(2**63 - 1, ()))
