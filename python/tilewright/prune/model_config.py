"""Writing the new sizes into a model's config, so that its library builds a model of the same shapes from it.

A config has one number for all layers. It is rewritten if the layers agree, and if a model built from it has
the shapes that this one has; where a config cannot say how the model looks now, it stays as it is.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .structure import find_structure
from .surgery import Group, Journal

_QUERIES = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KEYS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size")
# What a config with numbers of its own for the two halves of a model calls them.
_OF_HALVES = {
    "heads": {True: ("decoder_attention_heads",), False: ("encoder_attention_heads",)},
    "width": {True: ("decoder_ffn_dim",), False: ("encoder_ffn_dim",)},
}


def rewrite(model: nn.Module, before: list[Group], journal: Journal) -> str | None:
    """Adapts the configs of a model whose groups were `before`; says why not, if the config cannot."""
    config = getattr(model, "config", None)
    if not _is_config(config):
        return None
    changes = _changes(model, before)
    if isinstance(changes, str):
        return changes
    if not changes:
        return _unlike(model)
    attempts = [changes]
    if len({kind for kind, *_ in changes}) > 1:
        attempts += [[c for c in changes if c[0] == kind] for kind in ("width", "heads")]
    why = None
    for attempt in attempts:
        done = Journal()
        for _, owner, name, value in attempt:
            done.attribute(owner, name, value)
        why_not = _unlike(model)
        whole = attempt is changes
        if why_not is None or (not whole and _fits(model, attempt[0][0])):
            journal.call(done.undo)
            return None if whole else why
        why = why or why_not
        done.undo()
    return why


def _is_config(config: Any) -> bool:
    return hasattr(config, "to_dict") and hasattr(config, "model_type")


Change = tuple[str, Any, str, Any]
Details = dict[str, Any]


def _changes(model: nn.Module, before: list[Group]) -> list[Change] | str:
    """Kind, config, attribute and new value; the model's own config follows those of its parts."""
    now = {group.name: group for group in find_structure(model).groups}
    scopes: dict[tuple[int, bool, str], tuple[Any, list[tuple[Details, Details]]]] = {}
    for group in before:
        config = _nearest_config(model, group.name)
        if config is not None and group.name in now:
            key = (id(config), "decoder" in group.name, group.kind)
            scopes.setdefault(key, (config, []))[1].append((group.details, now[group.name].details))
    changes: list[Change] = []
    for (_, decoder, kind), (config, pairs) in scopes.items():
        found = _changes_of(config, kind, pairs, _OF_HALVES[kind][decoder])
        if isinstance(found, str):
            return found
        changes += found
        held = [(k, model.config, name, value) for k, _, name, value in found if hasattr(model.config, name)]
        changes += [change for change in held if config is not model.config]
    return list({(id(change[1]), change[2]): change for change in changes}.values())


def _changes_of(
    config: Any, kind: str, pairs: list[tuple[Details, Details]], own_names: tuple[str, ...]
) -> list[Change] | str:
    changed = [(old, new) for old, new in pairs if old != new]
    if not changed:
        return []
    if any(new != changed[0][1] for _, new in pairs):
        noun = "numbers of heads" if kind == "heads" else "widths of MLPs"
        return f"its layers have different {noun} now, and its config has one number for all"
    old, new = changed[0]
    if kind == "width":
        names = [name for name in (*own_names, *_WIDTHS) if getattr(config, name, None) == old["width"]]
        if not names and getattr(config, "n_inner", 0) is None:
            names = ["n_inner"]
        return [(kind, config, name, new["width"]) for name in names[:1]]
    found: list[Change] = []
    for names_of, value in (((*own_names, *_QUERIES), "queries"), (_KEYS, "keys")):
        names = [name for name in names_of if getattr(config, name, None) == old[value]]
        found += [(kind, config, name, new[value]) for name in names[:1]]
    if found and getattr(config, "head_dim", None) != new["size"]:
        found.append((kind, config, "head_dim", new["size"]))
    return found


def _nearest_config(model: nn.Module, path: str) -> Any:
    """The config of the module at the path or, if it has none, of the closest one around it."""
    names = path.split(".")
    for end in range(len(names), -1, -1):
        module: Any = model
        for name in names[:end]:
            module = getattr(module, name, None)
        config = getattr(module, "config", None)
        if _is_config(config):
            return config
    return None


def _built(model: nn.Module) -> dict[str, torch.Size] | str:
    """The shapes of a model built from the config, or why there is none."""
    try:
        own: Any = model.config
        config = type(own).from_dict(copy.deepcopy(own.to_dict()))
        with torch.device("meta"):
            twin = type(model)(config)
    except Exception as error:
        return f"no model can be built from such a config ({type(error).__name__}: {error})"
    return {name: value.shape for name, value in twin.state_dict().items()}


def _unlike(model: nn.Module) -> str | None:
    shapes = _built(model)
    if isinstance(shapes, str):
        return shapes
    for name, value in model.state_dict().items():
        if shapes.get(name) != value.shape:
            found = tuple(shapes[name]) if name in shapes else "no such tensor"
            return f"by its config {name} would be {found}, and it is {tuple(value.shape)} now"
    return None


def _fits(model: nn.Module, kind: str) -> bool:
    """Whether the config is right about the layers of one kind, whatever it says of others."""
    shapes = _built(model)
    if isinstance(shapes, str):
        return False
    own = model.state_dict()
    return all(
        shapes.get(f"{cut.path}.{name}") == own[f"{cut.path}.{name}"].shape
        for group in find_structure(model).groups
        if group.kind == kind
        for cut in group.cuts
        for name, _, _ in cut.tensors()
    )
