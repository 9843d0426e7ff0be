"""`tilewright.prune.shrink`: channels, heads and neurons that really leave a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .._checks import (
    check_choice,
    check_count,
    check_matches,
    check_number,
    check_type,
    suggests_keywords,
)
from .._models import call, check_inputs, evaluation
from . import model_config
from .channels import find_channels
from .examples import any_matches, check_patterns, difference, outputs_of
from .scoring import CRITERIA, norms_on, scores
from .shrink_report import ShrinkReport, Shrunk, Unshrunk
from .structure import find_structure
from .surgery import Group, Journal, apply, is_conv1d, masked, not_plain, tied_with

Patterns = str | Sequence[str] | None
Removals = dict[Group, Tensor]


@suggests_keywords
def shrink(
    model: nn.Module,
    example_inputs: Any,
    ratio: float | Mapping[str, float],
    criterion: str = "magnitude",
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    round_to: int | None = None,
    min_width: int = 1,
    heads: bool = True,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
    verify: bool = True,
) -> ShrinkReport:
    """Takes the least important channels, heads and neurons out of a model, in place.

    What is left is an ordinary, smaller model that needs no special kernel. It computes what the model
    computes with zeros in the weights, biases and norms of what left; that is verified on `example_inputs`.

    Attention layers (separate or fused q, k, v projections) lose heads: a key/value head leaves with all its
    query heads, so that the number of query heads for each stays; where all share a single one, query heads
    leave. MLPs lose neurons, gate and up and down projection alike. The channels of every other network are
    those of its dependency graph (torch-pruning, ``pip install tilewright[prune]``): through residuals,
    concatenations, batch norms and depthwise convolutions. The width of a residual stream that runs through
    layer norms stays, as do the model's outputs. The config of a model of transformers is rewritten, so that
    ``save_pretrained`` and ``from_pretrained`` work.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        ratio: the share of units that leaves, in [0, 1): of n units, ``floor(ratio * n)``. A dict gives each
            group that of the first pattern its name matches; groups without one stay.
        criterion: which units leave, those with the lowest score; of equal ones the later.
            "magnitude": L2 norm of all weights that leave with the unit; "l1": their absolute sum;
            "taylor": absolute sum of weight times ``.grad``, after a backward pass of yours;
            "wanda": absolute weights that read the unit times the norm of what they read; "random".
        include: patterns for names of groups or of their layers, such as ``"*.mlp"``: only these shrink.
        exclude: patterns likewise: these stay.
        round_to: what is kept is rounded up to a multiple of this many neurons or channels. Heads are whole.
        min_width: fewest units a group keeps.
        heads: False leaves all attention layers alone.
        calibration: inputs for "wanda", several of them; None: `example_inputs`.
        seed: for "random".
        verify: run the masked and the smaller model on `example_inputs` and compare the outputs. A group
            whose removal is not the same as zeros is left whole, with the reason in the report.

    Returns:
        What left and what stayed; its ``undo()`` puts everything back.

    Parameters that lose slices are new objects: make optimizers after shrinking.

    Raises:
        TypeError, ValueError: an argument that cannot be used; scores that are not finite, by layer.
        ImportError: torch-pruning is needed and not installed.
        RuntimeError: the model cannot be traced, or outputs differ. After any error the model is as it was.
    """
    _check(model, example_inputs, ratio, criterion, round_to, min_width)
    report = ShrinkReport(criterion=criterion)
    groups = _groups(model, example_inputs, heads, ratio, include, exclude, report)
    removal = _choose(
        model, groups, example_inputs, ratio, criterion, round_to, min_width, calibration, seed, report
    )
    if verify:
        removal = _sound(model, example_inputs, removal, report)
        report.verified = True
    _remove(model, example_inputs, groups, removal, report)
    return report


def _check(
    model: Any, example_inputs: Any, ratio: Any, criterion: Any, round_to: int | None, min_width: int
) -> None:
    check_type("model", model, nn.Module, "torch.nn.Module")
    check_inputs("example_inputs", example_inputs)
    ratios = ratio if isinstance(ratio, Mapping) else {"ratio": ratio}
    for name, value in ratios.items():
        shown = "ratio" if name == "ratio" else f"ratio[{name!r}]"
        check_number(shown, value, "[0, 1)")
    check_choice("criterion", criterion, CRITERIA)
    check_count("round_to", 1 if round_to is None else round_to)
    check_count("min_width", min_width)


def _groups(
    model: nn.Module,
    example_inputs: Any,
    heads: bool,
    ratio: float | Mapping[str, float],
    include: Patterns,
    exclude: Patterns,
    report: ShrinkReport,
) -> list[Group]:
    """All groups that may shrink; refuses patterns that mean none of them, and no layer."""
    structure = find_structure(model)
    groups = list(structure.groups)
    refused = dict(structure.refused)
    # transformers' attention and MLPs have nothing else between their norms, and do not trace.
    known = bool(groups or refused)
    if not (known and any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__)):
        try:
            channels, others = find_channels(model, example_inputs, structure.taken)
            groups += channels
            refused.update(others)
        except (ImportError, RuntimeError) as error:
            if not groups:
                raise
            refused["(all other layers)"] = str(error)
    if not groups and not refused:
        raise ValueError("model has no linear layer or convolution that could shrink")
    modules = (name for name, _ in model.named_modules())
    names = list(dict.fromkeys((*(group.name for group in groups), *refused, *modules)))
    included = check_patterns("include", include, names, "group or layer")
    excluded = check_patterns("exclude", exclude, names, "group or layer")
    if isinstance(ratio, Mapping):
        check_matches("ratio", ratio, names, "group or layer")
    chosen = []
    tied = tied_with(model, groups)
    for group in groups:
        why = "heads is False" if group.kind == "heads" and not heads else _obstacle(group)
        if not _matches(group, included, True) or _matches(group, excluded, False):
            why = "not included" if not _matches(group, included, True) else "excluded"
        why = why or tied.get(group)
        if why is None:
            chosen.append(group)
        else:
            report.skipped.append(Unshrunk(group.name, why))
    report.skipped += [Unshrunk(name, why) for name, why in refused.items()]
    return chosen


def _matches(group: Group, patterns: list[str] | None, default: bool) -> bool:
    if patterns is None:
        return default
    return any_matches((group.name, *group.layers()), patterns)


def _obstacle(group: Group) -> str | None:
    for cut in group.cuts:
        if cut.parameter is None and "weight" not in cut.module._parameters:
            return not_plain(cut.path)
    return None


def _choose(
    model: nn.Module,
    groups: list[Group],
    example_inputs: Any,
    ratio: float | Mapping[str, float],
    criterion: str,
    round_to: int | None,
    min_width: int,
    calibration: Iterable[Any] | None,
    seed: int,
    report: ShrinkReport,
) -> Removals:
    """Which units leave each group."""
    norms: dict[nn.Module, Tensor] = {}
    if criterion == "wanda":
        norms = norms_on(model, groups, [example_inputs] if calibration is None else list(calibration))
    generator = torch.Generator().manual_seed(seed)
    removal: Removals = {}
    for group in groups:
        share = ratio if not isinstance(ratio, Mapping) else _ratio_of(group, ratio)
        if share is None:
            report.skipped.append(Unshrunk(group.name, "no ratio is given for it"))
            continue
        importance = scores(group, criterion, norms, generator)
        count, why = _count(group, float(share), round_to, min_width)
        if count == 0:
            report.skipped.append(Unshrunk(group.name, why))
            continue
        order = torch.argsort(importance.flip(0), stable=True)
        removal[group] = (group.units - 1 - order[:count]).sort().values
    return removal


def _ratio_of(group: Group, ratios: Mapping[str, float]) -> float | None:
    return next((ratio for pattern, ratio in ratios.items() if _matches(group, [pattern], False)), None)


def _count(group: Group, ratio: float, round_to: int | None, min_width: int) -> tuple[int, str]:
    """How many units leave; if none, why."""
    wanted = math.floor(ratio * group.units + 1e-9)
    noun = {"heads": "key/value heads", "width": "neurons", "channels": "channels"}[group.kind]
    if group.kind == "heads" and group.details["single"]:
        noun = "query heads"
    if wanted == 0:
        return 0, f"{ratio:g} of its {group.units} {noun} is less than one"
    kept = group.units - wanted
    if round_to is not None and group.kind != "heads":
        step = math.lcm(round_to, group.width) // group.width
        kept = min(-(-kept // step) * step, group.units)
    kept = min(max(kept, min_width), group.units)
    if kept == group.units:
        return 0, f"round_to and min_width keep all of its {group.units} {noun}"
    return group.units - kept, ""


def _sound(model: nn.Module, example_inputs: Any, removal: Removals, report: ShrinkReport) -> Removals:
    """The groups whose removal equals zeros in their place; each is tried alone if all together fail."""
    if not removal or _differs(model, example_inputs, removal) is None:
        return removal
    sound: Removals = {}
    for group, units in removal.items():
        why = _differs(model, example_inputs, {group: units})
        if why is None:
            sound[group] = units
        else:
            report.skipped.append(Unshrunk(group.name, f"removing is not the same as zeros here: {why}"))
    if sound:
        why = _differs(model, example_inputs, sound)
        if why is not None:
            raise RuntimeError(f"verify: {why}, and no group alone is the cause; the model is as it was")
    return sound


def _differs(model: nn.Module, example_inputs: Any, removal: Removals) -> str | None:
    """How the smaller model differs from the masked one; the model is as it was afterwards."""
    with masked(removal):
        expected = outputs_of(model, example_inputs)
    journal = Journal()
    try:
        apply(removal, journal)
        _rewrite(model, list(removal), journal)
        return difference(expected, outputs_of(model, example_inputs))
    except Exception as error:
        return f"it cannot run ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    finally:
        journal.undo()


def _rewrite(model: nn.Module, groups: list[Group], journal: Journal) -> str | None:
    return model_config.rewrite(model, [g for g in groups if g.kind != "channels"], journal)


def _remove(
    model: nn.Module, example_inputs: Any, groups: list[Group], removal: Removals, report: ShrinkReport
) -> None:
    """Does it, and counts."""
    report.parameters_before, sizes_before = _parameters(model), _sizes(removal)
    with _positions(removal) as positions:
        report.flops_before = _flops(model, example_inputs)
    journal = Journal()
    try:
        apply(removal, journal)
        report.reload = _rewrite(model, [g for g in groups if g.kind != "channels"], journal)
        report.parameters, sizes = _parameters(model), _sizes(removal)
        report.flops = _flops(model, example_inputs) if removal else report.flops_before
    except BaseException:
        journal.undo()
        raise
    for group, units in removal.items():
        before, after = sizes_before[group], sizes[group]
        report.shrunk.append(
            Shrunk(
                name=group.name,
                kind=group.kind,
                total=group.units,
                kept=group.units - len(units),
                layers=group.layers(),
                parameters_before=sum(before.values()),
                parameters=sum(after.values()),
                flops_before=_products(before, positions),
                flops=_products(after, positions),
                removed=units.tolist(),
                note=_note(group, len(units)),
            )
        )
    report._undo = journal.undo


def _note(group: Group, gone: int) -> str:
    if group.kind != "heads":
        return ""
    share, details = group.details["share"], group.details
    if details["single"]:
        return f"query heads; the one key/value head they share stays (heads of {details['size']})"
    if share > 1:
        left = f"{details['queries'] - gone * share}/{details['queries']}"
        return f"query heads {left}, {share} for each key/value head"
    return ""


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


Sizes = dict[tuple[nn.Module, str], int]


def _sizes(removal: Removals) -> dict[Group, Sizes]:
    """The elements of each parameter a group cuts."""
    return {
        group: {
            (cut.module, name): value.numel()
            for cut in group.cuts
            for name, _, value in cut.tensors()
            if isinstance(value, nn.Parameter)
        }
        for group in removal
    }


def _products(sizes: Sizes, positions: dict[nn.Module, int]) -> int:
    """Every weight is multiplied and added once at each position of the layer's output."""
    return sum(
        2 * positions.get(module, 0) * size for (module, name), size in sizes.items() if name == "weight"
    )


@contextmanager
def _positions(removal: Removals) -> Any:
    """Counts, while the model runs, at how many positions each linear layer and convolution computes."""
    found: dict[nn.Module, int] = {}

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        transposed = getattr(module, "transposed", False)
        plain = isinstance(module, nn.Linear) or is_conv1d(module)
        value = inputs[0] if transposed else output
        channels = value.shape[-1] if plain else value.shape[1]
        found[module] = found.get(module, 0) + value.numel() // max(channels, 1)

    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.modules.conv._ConvNd)
    modules = {cut.module for group in removal for cut in group.cuts}
    hooks = [m.register_forward_hook(hook) for m in modules if isinstance(m, kinds) or is_conv1d(m)]
    try:
        yield found
    finally:
        for handle in hooks:
            handle.remove()


def _flops(model: nn.Module, example_inputs: Any) -> int:
    with evaluation(model), torch.no_grad(), _FlopCounter() as counter:
        call(model, example_inputs)
    return int(counter.total)


class _FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Multiplications and additions by torch's formulas, without the modules that torch's own tracks."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=output))
        return output


def load_shrunk(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Gives a fresh model of the original size the shapes of a shrunk model's state dict, and loads it.

    Args:
        model: the model as it was built before anything left it; changed in place and returned.
        state_dict: of the shrunk model: ``torch.load(...)``, or ``safetensors.torch.load_file(...)``.

    Raises:
        TypeError: `model` is no module, or an entry of `state_dict` is no tensor.
        ValueError: names are missing or unknown, or a tensor does not fit the layer in any smaller size.
            The model is as it was.
    """
    from .resizing import resize

    check_type("model", model, nn.Module, "torch.nn.Module")
    for name, value in state_dict.items():
        if not isinstance(value, Tensor) and not name.endswith("_extra_state"):
            raise TypeError(f"state_dict[{name!r}] must be a tensor, got {type(value).__name__}")
    journal = Journal()
    try:
        groups = resize(model, state_dict, journal)
        _rewrite(model, groups, journal)
        model.load_state_dict(dict(state_dict))
    except BaseException as error:
        journal.undo()
        if isinstance(error, RuntimeError):
            raise ValueError(f"state_dict does not fit the model: {error}") from error
        raise
    return model
