"""The parts of transformers that can shrink, found by how modules are built and named.

Attention: q, k and v projections and the one after them, as layers of their own or fused, with fewer key than
query heads if so made. MLPs: one or two projections up and one down. The width of the residual stream, which
runs through layer norms, stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .surgery import Cut, Group, is_conv1d, is_linear

_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("query_proj", "key_proj", "value_proj"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)
_FUSED = ("qkv", "qkv_proj", "c_attn", "to_qkv")
_INTERLEAVED = "query_key_value"  # q, k and v of one head, then those of the next
_AFTER_ATTENTION = (
    "o_proj",
    "out_proj",
    "dense",
    "out_lin",
    "to_out.0",
    "to_out",
    "wo",
    "o",
    "proj",
    "c_proj",
)
_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
_QUERY_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_QUERY_WIDTHS = ("all_head_size", "inner_dim", "split_size", "attn_dim", "q_size")

_GATED = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("wi_0", "wi_1", "wo"),
)
_GATED_FUSED = (("gate_up_proj", "down_proj"),)
_PLAIN = (
    ("fc1", "fc2"),
    ("linear1", "linear2"),
    ("lin1", "lin2"),
    ("c_fc", "c_proj"),
    ("up_proj", "down_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("wi", "wo"),
    ("intermediate.dense", "output.dense"),
)
_MLP_WIDTHS = ("intermediate_size", "hidden_features", "ffn_dim", "inner_dim", "hidden_dim")


Side = tuple[nn.Module, str]


@dataclass(frozen=True)
class Structure:
    """What was found, what of it cannot shrink and why, and the sides of layers that belong to it."""

    groups: list[Group]
    refused: dict[str, str]
    taken: set[Side]


def find_structure(model: nn.Module) -> Structure:
    """Searches a model for attention layers and MLPs."""
    found = Structure([], {}, set())
    modules = dict(model.named_modules())
    for path, module in modules.items():
        parent = modules.get(path.rpartition(".")[0]) if path else None
        for part in (_attention(path, module, parent), _mlp(path, module)):
            if isinstance(part, Group):
                found.groups.append(part)
                found.taken.update((cut.module, cut.side) for cut in part.cuts)
            elif part is not None:
                name, why, taken = part
                found.refused[name] = why
                found.taken.update(taken)
    paths = {module: path for path, module in modules.items()}
    for group in found.groups:
        group.cuts = [
            Cut(paths[cut.module], cut.module, cut.side, cut.position, cut.unit) for cut in group.cuts
        ]
    return found


Refusal = tuple[str, str, list[Side]]


def _child(module: nn.Module | None, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


def _first_linear(module: nn.Module | None, names: tuple[str, ...]) -> nn.Module | None:
    return next((child for name in names if is_linear(child := _child(module, name))), None)


def _outputs(linear: nn.Module) -> int:
    return int(linear.nf if is_conv1d(linear) else linear.out_features)  # type: ignore[arg-type]


def _inputs(linear: nn.Module) -> int:
    return int(linear.nx if is_conv1d(linear) else linear.in_features)  # type: ignore[arg-type]


def _integer(module: nn.Module, names: tuple[str, ...]) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _attention(path: str, module: nn.Module, parent: nn.Module | None) -> Group | Refusal | None:
    if isinstance(module, nn.MultiheadAttention):
        why = "torch.nn.MultiheadAttention takes the size of a head from the width of its input"
        return (
            path,
            f"{why}: its heads cannot leave",
            [(layer, side) for layer in module.modules() for side in ("in", "out")],
        )
    for names in _SEPARATE:
        projections = [_child(module, name) for name in names]
        if all(projection is not None for projection in projections):
            after = _first_linear(module, _AFTER_ATTENTION) or _first_linear(parent, ("output.dense",))
            return _heads(path, module, [p for p in projections if p is not None], after)
    for name in (*_FUSED, _INTERLEAVED):
        fused = _child(module, name)
        if isinstance(fused, nn.Linear) or (is_linear(fused) and fused is not None):
            after = _first_linear(module, _AFTER_ATTENTION)
            return _heads(path, module, [fused], after, name == _INTERLEAVED)
    return None


def _heads(
    path: str,
    module: nn.Module,
    projections: list[nn.Module],
    after: nn.Module | None,
    interleaved: bool = False,
) -> Group | Refusal | None:
    layers = [*projections, *([] if after is None else [after])]
    taken = [(layer, "in" if layer is after else "out") for layer in layers]
    other = next((layer for layer in projections if not is_linear(layer)), None)
    if other is not None:
        return path, f"its projections are {type(other).__name__}, not torch.nn.Linear", taken
    if after is None:
        return path, "no linear layer was found after the attention", taken
    inner = _inputs(after)
    size = _integer(module, _HEAD_SIZES)
    heads = _integer(module, _QUERY_HEADS)
    if size is None and heads:
        size = inner // heads
    if not size or inner % size:
        return path, "the size of its heads is not known: it has no head_dim and no num_heads", taken
    queries = inner // size
    if len(projections) == 3:
        keys = _outputs(projections[1]) // size
        shapes = [queries * size, keys * size, keys * size]
        fits = [_outputs(projection) for projection in projections] == shapes
    else:
        keys = (_outputs(projections[0]) // size - queries) // 2
        fits = keys > 0 and _outputs(projections[0]) == (queries + 2 * keys) * size
    if not fits or keys == 0 or queries % keys:
        found = ", ".join(f"{_outputs(projection)}" for projection in projections)
        return (
            path,
            f"heads of {size} do not make up its projections ({found} outputs, {inner} inputs)",
            taken,
        )
    extra = _extra_parameter(module, layers, size, {queries, keys, queries * size, keys * size})
    if extra is not None:
        return path, f"{extra} spans its heads", taken
    if interleaved and queries != keys:
        return path, f"its {queries} query heads are packed with {keys} key/value heads", taken
    return _head_group(path, module, projections, after, queries, keys, size, interleaved)


def _head_group(
    path: str,
    module: nn.Module,
    projections: list[nn.Module],
    after: nn.Module,
    queries: int,
    keys: int,
    size: int,
    interleaved: bool,
) -> Group:
    """A unit is a key/value head with its query heads; a query head where all share one key/value head."""
    single = keys == 1 and queries > 1
    units = queries if single else keys
    share = queries // units
    query = _spread(units, share * size)
    key = _spread(units, size)
    cuts = [_cut(after, "in", query)]
    if len(projections) == 3:
        cuts.insert(0, _cut(projections[0], "out", query))
        if not single:
            cuts[1:1] = [_cut(projections[1], "out", key), _cut(projections[2], "out", key)]
    elif interleaved:
        cuts.insert(0, _cut(projections[0], "out", _spread(units, 3 * size)))
    else:
        parts = (
            [query]
            if single
            else [query, _shifted(key, queries * size), _shifted(key, (queries + keys) * size)]
        )
        joined = tuple(torch.cat([part[i] for part in parts]) for i in range(2))
        cuts.insert(0, _cut(projections[0], "out", (joined[0], joined[1])))
    counts = _counters(module, _QUERY_HEADS, queries, share)
    counts += _counters(module, _QUERY_WIDTHS, queries * size, share * size)
    if single:
        counts += _counters(module, ("num_key_value_groups",), queries, 1)
    else:
        counts += _counters(module, _KEY_HEADS, keys, 1)
    details = {"queries": queries, "keys": keys, "size": size, "share": share, "single": single}
    return Group(path, "heads", units, cuts, share * size, counts, details)


def _extra_parameter(module: nn.Module, layers: list[nn.Module], size: int, spans: set[int]) -> str | None:
    """A parameter besides the projections whose shape shows that it has a part for every head."""
    known = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for name, parameter in module.named_parameters():
        if id(parameter) in known or (parameter.dim() == 1 and parameter.shape[0] == size):
            continue
        if any(length in spans for length in parameter.shape):
            return name
    return None


def _mlp(path: str, module: nn.Module) -> Group | Refusal | None:
    if "gate_up_proj" in module._parameters and "down_proj" in module._parameters:
        return path, "its experts are held in one tensor, which is not cut", []
    for gate, up, down in _GATED:
        layers = [_child(module, name) for name in (gate, up, down)]
        if all(layer is not None for layer in layers):
            return _width(path, module, [layer for layer in layers if layer is not None], 1)
    for fused, down in _GATED_FUSED:
        layers = [_child(module, name) for name in (fused, down)]
        if all(layer is not None for layer in layers):
            return _width(path, module, [layer for layer in layers if layer is not None], 2)
    for up, down in _PLAIN:
        layers = [_child(module, name) for name in (up, down)]
        if all(layer is not None for layer in layers):
            return _width(_named(path, up), module, [layer for layer in layers if layer is not None], 1)
    return None


def _width(path: str, module: nn.Module, layers: list[nn.Module], halves: int) -> Group | Refusal | None:
    *ups, down = layers
    other = next((layer for layer in layers if not is_linear(layer)), None)
    if other is not None:
        if any(isinstance(layer, nn.Linear) or is_linear(layer) for layer in layers):
            return path, f"one of its projections is {type(other).__name__}, not torch.nn.Linear", []
        return None
    width = _inputs(down)
    if any(_outputs(up) != halves * width for up in ups):
        return None
    for name, parameter in module.named_parameters():
        if any(parameter is own for layer in layers for own in layer.parameters()):
            continue
        direct = name.count(".") <= 1
        if direct and parameter.dim() == 1 and parameter.shape[0] == width and width != _outputs(down):
            return path, f"{name} spans its width", []
    one = _spread(width, 1)
    made = one if halves == 1 else (torch.cat([one[0], one[0] + width]), torch.cat([one[1], one[1]]))
    cuts = [*(_cut(up, "out", made) for up in ups), _cut(down, "in", one)]
    counts = _counters(module, _MLP_WIDTHS, width, 1)
    return Group(path, "width", width, cuts, 1, counts, {"width": width})


def _named(path: str, child: str) -> str:
    """The module that holds the projection: for a path such as "intermediate.dense" the one in between."""
    return ".".join(part for part in (path, child.rpartition(".")[0]) if part)


def _counters(
    module: nn.Module, names: tuple[str, ...], value: int, amount: int
) -> list[tuple[Any, str, int]]:
    """The attributes of the module's own that hold a count which falls."""
    own = vars(module)
    return [(module, name, amount) for name in names if type(own.get(name)) is int and own[name] == value]


def _spread(units: int, size: int) -> tuple[Tensor, Tensor]:
    """Positions of units that lie one after the other, `size` positions each."""
    return torch.arange(units * size), torch.arange(units).repeat_interleave(size)


def _shifted(spread: tuple[Tensor, Tensor], offset: int) -> tuple[Tensor, Tensor]:
    return spread[0] + offset, spread[1]


def _cut(module: nn.Module, side: str, spread: tuple[Tensor, Tensor]) -> Cut:
    return Cut("", module, side, *spread)
