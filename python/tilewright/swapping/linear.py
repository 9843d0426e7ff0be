"""Linear layers whose weights have zeros that a kernel can skip, and others where torch's product is slow.

A layer without zeros gets our dense product where that is faster than torch's, which is known beforehand:
large float32 layers on certain processors (`scan.dense`). It trains with it too.

A layer with zeros keeps its weight, which stays the one that trains, is saved and is loaded. Beside it lies a
copy of what is not zero, in the form of a kernel, made from the weight when it is first needed and anew when
the weight has changed. That copy serves inference; wherever a gradient is wanted, and under `torch.compile`,
where nothing would notice a change of the weight, the layer does what it did.

Which form, and at which numbers of tokens, is decided as by `tilewright.prune.compress`: by measuring here.
What competes is the layer as the swap leaves it, so that the price of looking at the weight is in the times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._models import NOTE, ORIGINAL
from ..nn import BlockSparseLinear, CrossoverLinear, SemiStructuredLinear
from ..prune.compressing import READ_ELSEWHERE, Seen, Work, decide_all, frozen, progress_bar
from ..prune.forms import DENSE, Findings, Form, find_forms
from ..scan import dense
from .instances import exchange
from .report import Measured

TOKENS = (1, 512)  # a step of decoding, and a prompt
_MARGIN = 0.03  # how much faster than dense a form must be, as for `compress`
_SECONDS = 0.1  # for each form at each number of tokens
_SAMPLE = 4096  # weights that are looked at first
_FEW = 0.05  # a smaller share of zeros among them helps no form: what stores over 0.85 is not even tried
_LARGE = 1 << 16  # weights; a smaller layer's time is that of the call
_GROWN = 1.05  # times what was stored when the form was chosen: with more it may have lost its lead
DENSE_OP = "matmul"
_OPS: dict[type[nn.Module], str] = {
    BlockSparseLinear: "block_sparse_linear",
    SemiStructuredLinear: "semi_structured_linear",
}


@dataclass(frozen=True)
class Recipe:
    """How to make a form of a weight: its class, and the block or pattern that `from_linear` takes."""

    kind: Any
    argument: Any
    stored: float

    @classmethod
    def of(cls, form: Any) -> Recipe:
        """The recipe of a form that was made."""
        argument = form.block if isinstance(form, BlockSparseLinear) else form.pattern
        return cls(type(form), argument, _stored(form))

    def made(self, linear: nn.Linear) -> nn.Module | None:
        """The form of this weight; None if it has other zeros now."""
        try:
            form: nn.Module = self.kind.from_linear(linear, self.argument)
        except ValueError:
            return None
        return form.eval() if _stored(form) <= self.stored * _GROWN else None


@dataclass(eq=False)
class Sparse:
    """What a swapped layer runs at how many tokens, and its weight in these forms.

    Attributes:
        recipes: the forms; None: dense.
        steps, beyond: the form of that index runs up to so many tokens, and for more: `CrossoverLinear`'s.
        device, dtype: of the weight when they were measured; elsewhere the layer stays dense.
    """

    recipes: Sequence[Recipe | None]
    steps: Sequence[tuple[int, int]]
    beyond: int
    device: torch.device
    dtype: torch.dtype
    _forms: list[nn.Module | None] | None = field(default=None, repr=False)
    _seen: list[tuple[Tensor, Tensor, int]] = field(default_factory=list, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_forms": None, "_seen": []}

    def forget(self) -> None:
        """Makes the forms anew when they are needed next."""
        self._forms = None

    def form_for(self, layer: nn.Module, x: Tensor) -> nn.Module | None:
        """The form that runs on this input; None: dense."""
        if type(x) is not Tensor or x.dtype != self.dtype or torch.is_autocast_enabled(x.device.type):
            return None
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() or _transformed(x):
            return None
        if torch.is_grad_enabled() and (x.requires_grad or _trains(layer)):
            self._forms = None  # the weight may be about to change, in whatever way
            return None
        tokens = x.numel() // x.shape[-1] if x.numel() else 0
        index = next((form for limit, form in self.steps if tokens <= limit), self.beyond)
        if not tokens or self.recipes[index] is None:
            return None
        sources = _sources(layer)
        if sources is None or sources[0].device != self.device:
            return None
        forms = self._current(layer, sources, x)
        return None if forms is None else forms[index]

    def watch(self, layer: nn.Module) -> None:
        """Takes the weight as it is for known."""
        sources = _sources(layer)
        self._seen = [] if sources is None else [(t, t.detach(), t._version) for t in sources]

    def _current(
        self, layer: nn.Module, sources: Sequence[Tensor], x: Tensor
    ) -> list[nn.Module | None] | None:
        """The forms of the weight as it is now; none of one that is new, and may be another at each call."""
        if len(sources) != len(self._seen) or not all(map(_unchanged, sources, self._seen)):
            self._forms = None
            self.watch(layer)
            return None
        if self._forms is None:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return None
            with torch.inference_mode(False), torch.no_grad():
                linear = plain(layer)
                self._forms = [None if recipe is None else recipe.made(linear) for recipe in self.recipes]
        return self._forms


def _sources(layer: nn.Module) -> list[Tensor] | None:
    """What the layer's weight and bias come from; None where somebody computes them in another way."""
    parameters, bias = layer._parameters, layer._parameters.get("bias")
    weight = parameters.get("weight")
    found: list[Tensor | None] = [weight]
    if weight is None:  # torch.nn.utils.prune multiplies these before every forward pass
        found = [parameters.get("weight_orig"), layer._buffers.get("weight_mask")]
    if bias is None and layer.bias is not None:
        return None
    found += [] if bias is None else [bias]
    if any(tensor is None or type(tensor) not in (nn.Parameter, Tensor) for tensor in found):
        return None
    return None if type(found[0]) is Tensor else found  # type: ignore[return-value]


def _trains(layer: nn.Module) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in layer._parameters.values())


def _unchanged(tensor: Tensor, seen: tuple[Tensor, Tensor, int]) -> bool:
    # The alias keeps the memory, so that no other can come to lie at its address.
    same, alias, version = seen
    return tensor is same and tensor._version == version and tensor.data_ptr() == alias.data_ptr()


def _transformed(x: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


def _forward(self: Any, x: Tensor) -> Tensor:
    note = vars(self).get(NOTE)
    form = None if note is None else note.form_for(self, x)
    if form is not None:
        return form(x)  # type: ignore[no-any-return]
    original = getattr(type(self), ORIGINAL)
    if original is nn.Linear:
        return dense.linear(x, self.weight, self.bias)
    return original.forward(self, x)  # type: ignore[no-any-return]


def _train(self: Any, mode: bool = True) -> Any:
    note = vars(self).get(NOTE)
    if note is not None and mode != self.training:
        note.forget()  # writes that torch does not count, as through `.data`, mostly happen around this
    return getattr(type(self), ORIGINAL).train(self, mode)


METHODS: dict[str, Callable[..., Any]] = {"forward": _forward, "train": _train}


def is_linear(cls: type) -> bool:
    """Whether this class is `torch.nn.Linear`, or `Conv1D` of transformers."""
    return cls is nn.Linear or (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D")


def gains_dense(layer: nn.Module) -> bool:
    """Whether our dense product is for this layer: large, float32, where torch's product is slow."""
    weight: Any = layer.weight
    return (
        type(layer) is nn.Linear
        and type(weight) is nn.Parameter
        and weight.dtype == torch.float32
        and weight.is_cpu
        and weight.numel() >= _LARGE
        and dense.is_better()
    )


def plain(layer: Any) -> nn.Linear:
    """The layer as a torch.nn.Linear over the same memory, without its hooks, mask and gradients."""
    weight = layer.weight
    if not isinstance(layer, nn.Linear):
        weight = weight.t()  # Conv1D stores (inputs, outputs)
    return frozen(weight, layer.bias).eval()


def has_zeros(layer: nn.Module) -> bool:
    """Whether it is worth looking at all of its weights: some of them are, and enough of those are zero."""
    weight: Any = layer.weight
    if weight is None or weight.is_meta or not weight.is_floating_point() or not weight.numel():
        return False
    if type(weight) not in (nn.Parameter, Tensor) or weight.layout is not torch.strided:
        return False
    flat = weight.detach().as_strided((weight.numel(),), (1,)) if _dense(weight) else weight.flatten()
    places = torch.randint(flat.numel(), (min(flat.numel(), _SAMPLE),), generator=_generator())
    return bool((flat[places.to(flat.device)] == 0).float().mean() >= _FEW)


def _dense(weight: Tensor) -> bool:
    return weight.is_contiguous() or weight.t().is_contiguous()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def obstacle(layer: Any, parent: nn.Module | None) -> str | None:
    """What keeps a linear layer with zeros dense, whatever its zeros."""
    if isinstance(parent, READ_ELSEWHERE):
        return f"torch.nn.{type(parent).__name__} reads its weight itself"
    sources = _sources(layer)
    if sources is None:
        return "its weight or bias is computed by a parametrization"
    if any(tensor.is_inference() for tensor in sources):
        return "its weight was made in inference mode, where torch does not count changes"
    return None


def decide(found: Sequence[tuple[str, nn.Module]], seen: dict[nn.Module, Seen]) -> list[Work]:
    """Which form each of these layers is to run in, at the numbers of tokens it meets and at `TOKENS`."""
    works = [_work(path, layer, seen.get(layer, Seen())) for path, layer in found]
    with torch.inference_mode(False), torch.no_grad(), progress_bar(None, works) as advance:
        decide_all(works, _MARGIN, True, _SECONDS, advance)
    return works


def _work(path: str, layer: nn.Module, met: Seen) -> Work:
    linear = plain(layer)
    tokens = sorted({*TOKENS, *(count for count in met.calls if count)})
    work = Work(linear, [path], [], Findings(0.0, ""), tokens, Seen(Counter(met.calls), linear.weight.dtype))
    try:
        findings = find_forms(linear, path)
    except ValueError as error:
        work.obstacle = str(error).removeprefix(f"{path}: ")
        return work
    forms = [replace(form, build=_competitor_of(linear, form)) for form in findings.forms]
    if gains_dense(linear):
        exchange(linear, METHODS)  # what its forms have to beat is then our product
    work.findings = replace(findings, forms=forms)
    if not forms:
        work.obstacle = "its zeros are too scattered for blocks of 8x8 or n:m"  # without numbers: rows fold
    return work


def _competitor_of(linear: nn.Linear, form: Form) -> Callable[[], nn.Module]:
    """Makes a layer like `linear`, swapped to that form."""

    def build() -> nn.Module:
        layer = frozen(linear.weight, linear.bias).eval()
        note = Sparse([Recipe.of(form.build())], (), 0, linear.weight.device, linear.weight.dtype)
        note.watch(layer)
        exchange(layer, METHODS, note)
        return layer

    return build


def note_of(work: Work) -> Sparse:
    """What a layer that is to be swapped keeps."""
    made, weight = work.made, work.linear.weight
    forms, steps, beyond = [made], (), 0
    if isinstance(made, CrossoverLinear):
        forms, steps, beyond = list(made.forms), made.steps, made.beyond  # type: ignore[assignment]
    notes = [vars(form).get(NOTE) for form in forms]
    recipes = [None if note is None else note.recipes[0] for note in notes]
    return Sparse(recipes, steps, beyond, weight.device, weight.dtype)


def op_of(note: Sparse) -> str:
    """The ops that run the layer."""
    return ", ".join(dict.fromkeys(_OPS[recipe.kind] for recipe in note.recipes if recipe is not None))


def forms_of(note: Sparse) -> str:
    """In words which form runs at how many tokens."""
    shown = [f"{_form_name(note.recipes[form])} up to {limit}" for limit, form in note.steps]
    last = _form_name(note.recipes[note.beyond])
    return f"{', '.join(shown)} tokens, then {last}" if shown else last


def measured(work: Work) -> list[Measured]:
    """The times that decided."""
    return [
        Measured(count, form, work.times[DENSE][count], work.times[form][count])
        for count, form in work.chosen.items()
    ]


def _form_name(recipe: Recipe | None) -> str:
    if recipe is None:
        return DENSE
    if isinstance(recipe.argument, tuple):
        return "blocks of {}x{}".format(*recipe.argument)
    return str(recipe.argument)


def _stored(form: Any) -> float:
    return float(form.values.numel() / max(form.in_features * form.out_features, 1))
