"""`tilewright.prune.compress`: each pruned linear layer in the form that is fastest here."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_number, check_type, suggests_keywords
from .._models import call, check_inputs, evaluation, is_plain_linear, original_class
from ..bench import timing
from .compress_report import Compressed, CompressReport
from .examples import (
    any_matches,
    check_patterns,
    difference,
    largest_difference,
    outputs_of,
    tolerance_of,
)
from .forms import DENSE, Findings, Form, find_forms
from .layers import is_prunable
from .surgery import Journal

_SAMPLE = 1e-3  # seconds a sample lasts at least: shorter calls are timed several at once
_ROUNDS = 3  # of racing at most, while the samples of some form are far apart
READ_ELSEWHERE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@suggests_keywords
def compress(
    model: nn.Module,
    example_inputs: Any,
    *,
    tokens: int | Sequence[int] | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    margin: float = 0.03,
    crossover: bool = True,
    seconds: float = 0.2,
    progress: bool | None = None,
) -> CompressReport:
    """Puts each linear layer with zeros into the exact form that is fastest here, in place, or leaves it.

    Every `torch.nn.Linear` that has a mask (:func:`tilewright.prune.set_mask`, or `torch.nn.utils.prune`) or
    zeros in its weight is timed as it is and in the sparse forms that can hold it exactly, block-sparse and
    n:m, alternating in one process. A sparse form has to win twice, by `margin`, at every number of tokens it
    is taken for, by medians and then by lower quartiles: at those numbers no layer gets slower. Where
    different forms win, a `tilewright.nn.CrossoverLinear` holds two of them and chooses by the number of
    tokens; it is frozen, and not made of layers in training mode. The rest of the model stays as it is.

    Args:
        model: any module. Device, dtype, training mode and ``requires_grad`` of its layers are kept.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. They show which
            numbers of tokens the layers see, and the outputs before and after are compared on them.
        tokens: the numbers of tokens (rows of a layer's input) to be fast at; None: those that the layers
            see on `example_inputs`.
        include: patterns for names of layers, such as ``"*.mlp.*"``: only these are compressed.
        exclude: patterns likewise: these stay dense.
        margin: how much faster than dense a sparse form must be, as a share.
        crossover: False takes one form for all numbers of tokens, or none.
        seconds: time to spend on each form at each number of tokens. Layers of the same sizes, dtype and
            shares of zeros are timed once.
        progress: whether to show a bar; None: on a terminal.

    Returns:
        Each layer's kernel and why, bytes, measured times, and those of the whole model; its ``undo()`` puts
        the dense layers back.

    Parameters of compressed layers are new objects: make optimizers after compressing. A layer that is in the
    model at several places is compressed once, as are layers that share weight and bias.

    Raises:
        TypeError, ValueError: an argument that cannot be used; weights that are not finite or violate their
            mask, by layer.
        RuntimeError: the outputs differ by more than rounding. After any error the model is as it was.
    """
    counts = _counts(tokens)
    _check(model, example_inputs, margin, seconds)
    known = [name for name, module in model.named_modules(remove_duplicate=False) if _is_linear(module)]
    patterns = (
        check_patterns("include", include, known, "linear layer"),
        check_patterns("exclude", exclude, known, "linear layer"),
    )
    before, seen = observe(model, example_inputs)
    report = CompressReport(margin=margin)
    works = _works(model, seen, counts, patterns, report)
    journal = Journal()
    try:
        with torch.no_grad(), progress_bar(progress, works) as advance:
            decide_all(works, margin, crossover, seconds, advance)
        for work in works:
            _install(model, work, journal)
        after = outputs_of(model, example_inputs)
        why = difference(before, after, tolerance_of(model))
        if why is not None:
            raise RuntimeError(f"after compress, {why}; the model is as it was")
        report.error = largest_difference(before, after)
        report.layers += [_described(work) for work in works]
        if report.compressed:
            report.model_ms_dense, report.model_ms = _time_model(model, example_inputs, works, seconds)
    except BaseException:
        journal.undo()
        raise
    report._undo = journal.undo
    return report


@dataclass
class Seen:
    """What a layer met on the example inputs."""

    calls: Counter[int] = field(default_factory=Counter)
    dtype: torch.dtype | None = None


@dataclass
class Work:
    """One layer, what is known of it, and what becomes of it."""

    linear: nn.Linear
    paths: list[str]
    places: list[tuple[nn.Module, str]]
    findings: Findings
    tokens: list[int]
    seen: Seen
    obstacle: str = ""
    times: dict[str, dict[int, float]] = field(default_factory=dict)
    chosen: dict[int, str] = field(default_factory=dict)
    measured_as: str = ""
    made: nn.Module | None = None

    @property
    def name(self) -> str:
        """The first of its paths."""
        return self.paths[0]


def _counts(tokens: Any) -> list[int] | None:
    if tokens is None:
        return None
    found = [tokens] if isinstance(tokens, int) else tokens
    allowed = "tokens must be a positive int, several of them or None"
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise TypeError(f"{allowed}, got {tokens!r}")
    for count in found:
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{allowed}, got {count!r}")
        if count < 1:
            raise ValueError(f"{allowed}, got {count}")
    if not found:
        raise ValueError(f"{allowed}, got none")
    return sorted(set(found))


def _check(model: Any, example_inputs: Any, margin: Any, seconds: Any) -> None:
    check_type("model", model, nn.Module, "torch.nn.Module")
    if isinstance(model, nn.Linear):
        raise TypeError(
            "model must contain the layers to compress; put a single Linear into a torch.nn.Sequential"
        )
    check_inputs("example_inputs", example_inputs)
    for name, value in (("margin", margin), ("seconds", seconds)):
        check_number(name, value, "[0, inf)")


def _is_linear(module: nn.Module) -> bool:
    """Whether patterns may speak of it: a linear layer, compressed before or not."""
    return is_prunable(module) or type(module).__module__.startswith("tilewright.nn.")


def observe(model: nn.Module, example_inputs: Any) -> tuple[dict[str, Tensor], dict[nn.Module, Seen]]:
    """The outputs, and what each linear layer meets on the way to them."""
    seen: dict[nn.Module, Seen] = {}

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        found = seen.setdefault(module, Seen())
        found.calls[output.numel() // output.shape[-1] if output.numel() else 0] += 1
        found.dtype = inputs[0].dtype if inputs and isinstance(inputs[0], Tensor) else found.dtype

    hooks = [m.register_forward_hook(hook) for m in model.modules() if is_plain_linear(m)]
    try:
        return outputs_of(model, example_inputs), seen
    finally:
        for handle in hooks:
            handle.remove()


def _works(
    model: nn.Module,
    seen: dict[nn.Module, Seen],
    counts: list[int] | None,
    patterns: tuple[list[str] | None, list[str] | None],
    report: CompressReport,
) -> list[Work]:
    """The layers with zeros; those without go to the report."""
    places: dict[nn.Linear, list[tuple[str, nn.Module, str]]] = {}
    for path, parent in model.named_modules(remove_duplicate=False):
        for name, child in parent._modules.items():
            if isinstance(child, nn.Linear):
                places.setdefault(child, []).append((f"{path}.{name}" if path else name, parent, name))
    tied = _tied(model)
    works: list[Work] = []
    same: dict[tuple[int, int], Work] = {}
    for linear, found in places.items():
        paths = sorted({path for path, _, _ in found}, key=[path for path, _, _ in found].index)
        spots = list({(id(parent), name): (parent, name) for _, parent, name in found}.values())
        findings = find_forms(linear, paths[0])
        if not findings.why_not and not findings.forms and findings.density == 1.0:
            report.left += paths
            continue
        key = (id(linear.weight), id(linear.bias))
        met = seen.get(linear, Seen())
        if key in same and is_plain_linear(linear):
            same[key].paths += paths
            same[key].places += spots
            same[key].seen.calls.update(met.calls)
            continue
        work = Work(linear, paths, spots, findings, [], met)
        work.obstacle = _obstacle(work, patterns)
        same[key] = work
        works.append(work)
    for work in works:
        own = tied.get(id(work.linear.weight), set()) - set(work.paths)
        if own and not work.obstacle:
            work.obstacle = f"its weight is also that of {sorted(own)[0]}"
        if not (work.obstacle or work.seen.calls) and any(_is_swapped(parent) for parent, _ in work.places):
            work.obstacle = "its layer is swapped and reads the weight itself: tilewright.unswap(model) first"
        work.tokens = sorted(count for count in (counts or work.seen.calls) if count > 0)
        if not work.tokens and not work.obstacle:
            work.obstacle = "example_inputs never reach it, and tokens is not given"
    return works


def _tied(model: nn.Module) -> dict[int, set[str]]:
    """For each parameter the paths of all modules that hold it."""
    owners: dict[int, set[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(path)
    return owners


def _is_swapped(module: nn.Module) -> bool:
    return original_class(module) is not type(module)


def _obstacle(work: Work, patterns: tuple[list[str] | None, list[str] | None]) -> str:
    include, exclude = patterns
    linear = work.linear
    if include is not None and not any_matches(work.paths, include):
        return "not included"
    if exclude is not None and any_matches(work.paths, exclude):
        return "excluded"
    if not is_plain_linear(linear):
        if original_class(linear) is nn.Linear:
            return "it is swapped: tilewright.unswap(model) first"
        return f"it is a {type(linear).__name__}, not a plain torch.nn.Linear"
    for parent, _ in work.places:
        if isinstance(parent, READ_ELSEWHERE):
            return f"torch.nn.{type(parent).__name__} reads its weight itself"
    if "forward" in vars(linear):
        return "its forward was replaced on the instance"
    hooks = [*linear._forward_hooks.values(), *linear._forward_pre_hooks.values()]
    hooks += [*linear._backward_hooks.values(), *linear._backward_pre_hooks.values()]
    if any(
        not getattr(hook, "__module__", "").startswith(("tilewright.", "torch.nn.utils.prune"))
        for hook in hooks
    ):
        return "it has hooks"
    if not work.findings.forms:
        return "; ".join(work.findings.why_not) or "no sparse form can hold its zeros"
    return ""


Advance = Callable[[str], None]


def decide_all(works: list[Work], margin: float, crossover: bool, seconds: float, advance: Advance) -> None:
    """Times and chooses; layers alike share the times of the first."""
    known: dict[Any, Work] = {}
    for work in works:
        if work.obstacle:
            continue
        advance(work.name)
        key = _likeness(work)
        if key in known:
            work.times, work.chosen = known[key].times, known[key].chosen
            work.measured_as = known[key].name
        else:
            _decide(work, margin, crossover and not work.linear.training, seconds)
            known[key] = work
        work.made = _made(work)


def _likeness(work: Work) -> Any:
    linear = work.linear
    forms = tuple((form.name, round(form.stored, 2)) for form in work.findings.forms)
    return (
        linear.weight.shape, linear.bias is None, linear.weight.dtype, linear.weight.device, work.seen.dtype,
        linear.training, tuple(work.tokens), forms,
    )  # fmt: skip


def _decide(work: Work, margin: float, crossover: bool, seconds: float) -> None:
    """Fills in the times, and which form runs at which number of tokens."""
    linear = work.linear
    modules: dict[str, nn.Module] = {DENSE: linear}
    for form in work.findings.forms:
        made = _tried(form, work)
        if made is not None:
            modules[form.name] = made
    work.times = {name: {} for name in modules}
    for count in work.tokens:
        for name, ms in _race(modules, _input(work, count), seconds).items():
            work.times[name][count] = ms
    won: set[tuple[str, int]] = set()
    lost: set[tuple[str, int]] = set()
    while True:
        work.chosen = _choose(work.times, work.tokens, margin, crossover, lost)
        found = {(name, count) for count, name in work.chosen.items() if name != DENSE}
        if found <= won:
            return
        for name, count in sorted(found - won):
            # Alone against dense, by lower quartiles: the first win may have been another program's doing.
            again = _race({DENSE: linear, name: modules[name]}, _input(work, count), seconds, True)
            (won if again[name] * (1 + margin) <= again[DENSE] else lost).add((name, count))


def _tried(form: Form, work: Work) -> nn.Module | None:
    """The layer in this form, if its kernels take it as it is."""
    try:
        made = form.build().train(work.linear.training)
        made(_input(work, work.tokens[0]))
    except (NotImplementedError, TypeError, ValueError) as error:
        work.findings.why_not.append(f"{form.name}: {error}")
        return None
    return made


def _choose(
    times: Mapping[str, Mapping[int, float]],
    tokens: Sequence[int],
    margin: float,
    crossover: bool,
    lost: set[tuple[str, int]],
) -> dict[int, str]:
    """The form for each number of tokens: one for all, or two of them where that is faster by the margin."""
    sparse = [name for name in times if name != DENSE]

    def cost(name: str, count: int) -> float:
        share = times[name][count] / times[DENSE][count]
        lost_here = name != DENSE and ((name, count) in lost or share * (1 + margin) > 1)
        return math.inf if lost_here else share

    def total(names: tuple[str, ...]) -> float:
        return sum(min(cost(name, count) for name in names) for count in tokens)

    chosen: tuple[str, ...] = min([(DENSE,), *((name,) for name in sparse)], key=total)
    if crossover and sparse:
        pair = min(combinations([DENSE, *sparse], 2), key=total)
        chosen = pair if total(pair) * (1 + margin) < total(chosen) else chosen
    return {count: min(chosen, key=lambda name: cost(name, count)) for count in tokens}


def _input(work: Work, tokens: int) -> Tensor:
    weight = work.linear.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    shape = (tokens, work.linear.in_features)
    x = torch.randn(shape, generator=generator, device=weight.device, dtype=torch.float32)
    return x.to(work.seen.dtype or weight.dtype)


def _race(
    modules: Mapping[str, nn.Module], x: Tensor, seconds: float, undisturbed: bool = False
) -> dict[str, float]:
    """Milliseconds of each module on one input, of samples that alternate: medians, or lower quartiles."""
    calls: dict[str, Callable[[], object]] = {name: _call_of(module, x) for name, module in modules.items()}
    first = calls[DENSE]
    first()
    start = time.perf_counter()
    first()
    inner = max(1, min(200, int(_SAMPLE / max(time.perf_counter() - start, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        found = timing.measure(calls, x.device, inner=inner, budget=seconds, minimum=7, maximum=41)
        for name, times in found.items():
            samples[name] += times.samples
        if all(map(_steady, samples.values())):
            break
    place = 0 if undisturbed else 1
    return {name: statistics.quantiles(times, n=4)[place] * 1e3 for name, times in samples.items()}


def _steady(samples: list[float]) -> bool:
    """Whether the middle half of the samples lies close together; a busy machine gets more time."""
    low, _, high = statistics.quantiles(samples, n=4)
    return high <= 1.3 * low


def _call_of(module: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: module(x)


def _made(work: Work) -> nn.Module | None:
    """The module that takes the layer's place; None if it stays."""
    from ..nn import CrossoverLinear  # whose package needs the masks of this one

    build = {form.name: form.build for form in work.findings.forms}
    names = list(dict.fromkeys(work.chosen[count] for count in work.tokens))
    if names == [DENSE]:
        return None
    if len(names) == 1:
        return build[names[0]]().train(work.linear.training)
    build[DENSE] = lambda: frozen(work.linear.weight, work.linear.bias)
    forms = [build[name]() for name in names]
    steps = []
    for count, following in zip(work.tokens, work.tokens[1:], strict=False):
        if work.chosen[count] != work.chosen[following]:
            limit = max(count, math.isqrt(count * following))
            steps.append((limit, names.index(work.chosen[count])))
    made = CrossoverLinear(forms, steps, names.index(work.chosen[work.tokens[-1]]))
    return made.train(work.linear.training)


def frozen(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A dense layer over this memory, with parameters of its own that do not train."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made


def _install(model: nn.Module, work: Work, journal: Journal) -> None:
    from ..nn.dense_state import writes_dense

    if work.made is not None:
        writes_dense(work.made)
        for parent, name in work.places:
            journal.entry(name, parent._modules, work.made)


def _time_model(
    model: nn.Module, example_inputs: Any, works: list[Work], seconds: float
) -> tuple[float, float]:
    """The whole model with dense and with compressed layers, alternating."""

    def put(compressed: bool) -> None:
        for work in works:
            if work.made is not None:
                for parent, name in work.places:
                    parent._modules[name] = work.made if compressed else work.linear

    def run(compressed: bool) -> object:
        put(compressed)
        return call(model, example_inputs)

    calls: dict[str, Callable[[], object]] = {"dense": lambda: run(False), "now": lambda: run(True)}
    device = next(work.linear.weight.device for work in works)
    try:
        with evaluation(model), torch.no_grad():
            found = timing.measure(calls, device, budget=max(seconds, 1e-3), minimum=5, maximum=41)
    finally:
        put(True)
    dense, now = (statistics.median(found[name].samples) * 1e3 for name in ("dense", "now"))
    return dense, now


def _described(work: Work) -> Compressed:
    linear, bytes_dense = work.linear, _bytes(work.linear)
    made = work.made
    kernels: dict[str, list[int]] = {}
    for count in work.tokens if work.chosen else ():
        kernels.setdefault(work.chosen[count], []).append(count)
    kernel = DENSE
    if len(kernels) == 1:
        kernel = next(iter(kernels))
    elif kernels:
        kernel = "; ".join(f"{name} at {', '.join(map(str, at))}" for name, at in kernels.items())
    return Compressed(
        name=work.name,
        paths=work.paths,
        shape=(linear.out_features, linear.in_features),
        density=work.findings.density,
        pattern=work.findings.pattern,
        kernel=kernel,
        why=reason_of(work),
        tokens=work.tokens if work.chosen else [],
        times=work.times,
        chosen=work.chosen,
        calls=dict(work.seen.calls),
        bytes_dense=bytes_dense,
        bytes=bytes_dense if made is None else _bytes(made),
        measured_as=work.measured_as,
    )


def reason_of(work: Work) -> str:
    """In words why the layer runs as it does."""
    if work.obstacle:
        return work.obstacle
    sparse = [name for name in work.times if name != DENSE]
    names = set(work.chosen.values())
    if not sparse:
        return "; ".join(work.findings.why_not)
    if names == {DENSE}:
        speeds = {
            (name, c): work.times[DENSE][c] / work.times[name][c] for name in sparse for c in work.tokens
        }
        fastest, count = max(speeds, key=lambda key: speeds[key])
        ratio = f"{speeds[fastest, count]:.2f}x the speed of dense at {count} tokens"
        doubt = ", and did not win everywhere or every time" if speeds[fastest, count] > 1.1 else ""
        return f"{fastest}, the fastest sparse form, has {ratio}{doubt}"
    gains = [work.times[DENSE][c] / work.times[n][c] for c, n in work.chosen.items() if n != DENSE]
    shown = f"{min(gains):.2f}x" if min(gains) == max(gains) else f"{min(gains):.2f}x to {max(gains):.2f}x"
    if len(names) == 1:
        return f"{shown} the speed of dense"
    return f"{shown} the speed of dense where it is sparse; holds {len(names)} forms, frozen"


def _bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def progress_bar(progress: bool | None, works: list[Work]) -> Iterator[Advance]:
    """A bar on standard error with the layer that is being timed."""
    total = sum(not work.obstacle for work in works)
    if not total or not (sys.stderr.isatty() if progress is None else progress):
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(bar_width=30), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    text = TextColumn("{task.description}")
    with Progress(*columns, text, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        done = iter(range(total))
        yield lambda name: bar.update(task, completed=next(done), description=name)
