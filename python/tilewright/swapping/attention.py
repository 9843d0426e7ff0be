"""The attention layers of Hugging Face transformers.

transformers calls attention by a name in the model's config, and makes the mask by the same name. A swapped
model gets configs of its own that say "tilewright", so that a model made of the same config is untouched; its
layers hold their `BlockSparse`. So copies and pickles of the model stay swapped, and layers of the same model
that were left alone go on with the implementation they had.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import BlockSparse, block_sparse_attention
from ..attention.compose import from_elements, rows
from . import graph
from .releases import ATTENTION_SINCE, older

NAME = "tilewright"
OP = "block_sparse_attention"
_ATTRIBUTE = "_tilewright_attention"
_ABSENT = object()
_FEW = 16  # queries that a decode step has at most
_HARMLESS = frozenset({
    "cache_position", "deterministic", "is_causal", "labels", "logits_to_keep", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "past_key_values", "position_ids", "return_dict",
    "sliding_window", "token_type_ids", "use_cache",
})  # fmt: skip
_REASONS = {
    "s_aux": "block-sparse attention has no learned sinks",
    "position_bias": "scores take no bias; masks alone decide what is seen",
    "head_mask": "heads cannot be scaled",
    "output_attentions": "the weights are never formed; call tilewright.unswap(model) to see them",
    "cache": "continuous batching has its own kernels",
    "cu_seq_lens_q": "give position_ids that start again at 0 with each sequence, and no attention_mask",
}


@dataclass
class Choice:
    """What an attention layer of a swapped model does."""

    spec: BlockSparse | None  # None: as before
    former: str  # the implementation it had
    by_elements: bool = False  # the same result by SDPA and a mask of elements: what `verify` compares with

    def __post_init__(self) -> None:
        register()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        register()  # a pickle may come to a process that has swapped nothing


def register() -> None:
    """Makes the name known to transformers; models with another name in their config do not notice."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _model_mask)


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that call attention by the name in their config."""
    if "transformers" not in sys.modules:
        return
    for path, module in model.named_modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if "ALL_ATTENTION_FUNCTIONS" in getattr(code, "co_names", ()) and _config(module) is not None:
            yield path, module


def is_swapped(module: nn.Module) -> bool:
    """Whether this layer has a `BlockSparse`."""
    choice = choice_of(module)
    return choice is not None and choice.spec is not None


def obstacle(module: Any, owner: Any, spec: BlockSparse) -> str | None:
    """What about this layer, or the model it is of, block-sparse attention does not cover."""
    config = _config(module)
    old = older(ATTENTION_SINCE)
    if old is not None:
        return old
    if is_swapped(module):
        return "swapped already"
    if _may_cross(module):
        return "it may attend to another sequence than its own"
    if spec.takes == "attention" and not getattr(module, "is_causal", True):
        return "it is not causal, and permuted_block_sparse_attention is for causal layers"
    if getattr(module, "sinks", None) is not None:
        return "it has learned sinks"
    if owner is not None and not (owner._supports_sdpa or owner._supports_flex_attn):
        return f"{type(owner).__name__} supports no attention but its own"
    dim = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
    if isinstance(dim, int) and (dim % 8 or dim > 256):
        return f"its head dim is {dim}; the kernels have multiples of 8 up to 256"
    if str(config._attn_implementation).startswith("paged"):
        return f"its implementation is {config._attn_implementation!r}"
    return None


def _may_cross(module: Any) -> bool:
    if "Cross" in type(module).__name__ or hasattr(module, "is_cross_attention"):
        return bool(getattr(module, "is_cross_attention", True))
    parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    return bool({"key_value_states", "encoder_hidden_states"} & set(parameters))


def install(model: nn.Module, chosen: Sequence[nn.Module], spec: BlockSparse) -> Callable[[], None]:
    """Gives these layers the specification; returns what undoes exactly that."""
    register()
    changes, known = _Changes(), {id(module) for module in chosen}
    _own_configs(model, changes)
    configs = {id(_config(module)) for module in chosen}
    for _, module in layers(model):
        config, before = _config(module), vars(module).get(_ATTRIBUTE)
        if id(config) not in configs:
            continue
        former = before.former if before else config._attn_implementation
        if former in (None, NAME):  # a model made from the config of a swapped one
            former = "sdpa"
        if id(module) in known:
            changes.put(vars(module), _ATTRIBUTE, Choice(spec, former))
        elif before is None:
            changes.put(vars(module), _ATTRIBUTE, Choice(None, former))
    for module in chosen:
        changes.put(vars(_config(module)), "_attn_implementation_internal", NAME)
    return changes.undo


class _Changes:
    """Entries of dictionaries that were set, and what they were."""

    def __init__(self) -> None:
        self._before: list[tuple[dict[str, Any], str, Any]] = []

    def put(self, where: dict[str, Any], name: str, value: Any) -> None:
        self._before.append((where, name, where.get(name, _ABSENT)))
        where[name] = value

    def undo(self) -> None:
        for where, name, value in reversed(self._before):
            if value is _ABSENT:
                del where[name]
            else:
                where[name] = value


def remove(model: nn.Module) -> int:
    """Gives the layers the implementation that they had; returns how many were swapped."""
    count = 0
    for module in model.modules():
        choice = vars(module).get(_ATTRIBUTE)
        if choice is None:
            continue
        count += choice.spec is not None
        del vars(module)[_ATTRIBUTE]
        config = _config(module)
        if config is not None and config._attn_implementation == NAME:
            config._attn_implementation_internal = choice.former
    return count


def choice_of(module: nn.Module) -> Choice | None:
    """What this layer does, if its model is swapped."""
    return vars(module).get(_ATTRIBUTE)


def take_back(model: nn.Module, choices: Iterable[tuple[nn.Module | None, Choice | None]]) -> None:
    """Lets these layers go on as before, if these are still their choices; the last one clears the model."""
    for module, choice in choices:
        if module is not None and choice is not None and choice_of(module) is choice:
            vars(module)[_ATTRIBUTE] = Choice(None, choice.former)
    if not any(map(is_swapped, model.modules())):
        remove(model)


def compare_by_elements(modules: Iterable[nn.Module], on: bool) -> None:
    """Whether these layers compute the same by SDPA with a mask of elements, to verify the kernels by."""
    for module in modules:
        vars(module)[_ATTRIBUTE].by_elements = on


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """transformers' attention function: (batch, heads, length, dim) in, (batch, length, heads, dim) out."""
    if torch.compiler.is_compiling() and _in_graph(module, query, key, attention_mask, softcap, kwargs):
        _check(module, dropout, kwargs)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        causal = _is_causal(module, query.shape[2], kwargs)
        spec = getattr(module, _ATTRIBUTE).spec
        out = graph.attention(spec, query, key, value, attention_mask, causal, scale, softcap or 0.0)
        return out.transpose(1, 2).contiguous(), None
    return _attend(module, query, key, value, attention_mask, dropout, scaling, softcap, kwargs)


def _in_graph(
    module: Any, q: Tensor, k: Tensor, mask: Any, softcap: float | None, kwargs: dict[str, Any]
) -> bool:
    """Whether a compiled graph can hold this layer's attention."""
    choice, length = getattr(module, _ATTRIBUTE, None), k.shape[2]
    if choice is None or choice.spec is None or choice.by_elements or q.shape[2] != length:
        return False
    window = kwargs.get("sliding_window")
    if mask is None and window is not None and window < length:
        return False
    if choice.spec.takes == "attention":
        return mask is None and not softcap and _is_causal(module, length, kwargs)
    return mask is None or isinstance(mask, Tensor) or (mask.q_len, mask.kv_length) == (length, length)


@graph.outside
def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Any]:
    choice = choice_of(module)
    if choice is None or choice.spec is None:
        options = {"dropout": dropout, "scaling": scaling, **kwargs}
        options |= {} if softcap is None else {"softcap": softcap}
        former = "sdpa" if choice is None else choice.former
        return _as_before(former, module, query, key, value, attention_mask, options)
    _check(module, dropout, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _attention(choice, module, query, key, value, attention_mask, scale, softcap or 0.0, kwargs)
    return out.transpose(1, 2).contiguous(), None


def _model_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    mask_function: Any,
    attention_mask: Any = None,
    **arguments: Any,
) -> Any:
    from transformers.masking_utils import causal_mask_function

    whole = isinstance(q_offset, int) and q_offset == 0 and q_length == kv_length
    plain = attention_mask is None and mask_function is causal_mask_function
    arguments |= {"q_length": q_length, "kv_length": kv_length, "mask_function": mask_function}
    if not (torch.compiler.is_compiling() and whole):
        return _made_mask(**arguments, q_offset=q_offset, attention_mask=attention_mask)
    if plain:
        return None  # as for SDPA: causal if the layer is
    from .model_mask import ModelMask

    mask = ModelMask(**arguments, attention_mask=attention_mask)
    if mask.plain is None:
        mask.for_implementation("sdpa", torch.float32)  # kept by the mask: layers may have no side effects
    return mask


@graph.outside
def _made_mask(**arguments: Any) -> Any:
    from .model_mask import ModelMask

    return ModelMask(**arguments)


def _is_causal(module: Any, q_len: int, kwargs: dict[str, Any]) -> bool:
    """What SDPA takes a layer for that comes without a mask."""
    causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal) and q_len > 1


def _attention(
    choice: Choice, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, softcap: float,
    kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    spec = cast("BlockSparse", choice.spec)
    if isinstance(mask, Tensor):
        if spec.takes == "attention":
            _refuse_permuted("a mask of elements")
        from .model_mask import of_elements

        block_mask = of_elements(mask, spec, q, k)
        if choice.by_elements:
            return _by_elements(q, k, v, rows(block_mask, 0), scale, softcap)
        return block_sparse_attention(q, k, v, block_mask, scale=scale, softcap=softcap)
    if mask is None:
        mask = _without_mask(module, q, k, kwargs)
    if mask.q_len != q.shape[2] or mask.kv_length != k.shape[2]:
        raise ValueError(
            f"the model's mask is for {mask.q_len} queries and {mask.kv_length} keys, "
            f"but a layer has {q.shape[2]} and {k.shape[2]}"
        )
    k, v = k[:, :, : mask.kv_len], v[:, :, : mask.kv_len]  # a static cache has room at its end
    decoding = q.shape[2] <= _FEW and q.shape[2] < k.shape[2]
    if decoding and spec.decode == "dense":
        return _by_elements(q, k, v, mask.elements().to(q.device), scale, softcap)
    if spec.takes == "attention":
        return _permuted(choice, spec, q, k, v, mask, scale, softcap)
    if spec.takes == "tensors":
        return _estimated(choice, spec, q, k, v, mask, scale, softcap)
    if decoding or choice.by_elements:
        return _by_elements(q, k, v, mask.rows(spec).to(q.device), scale, softcap)
    block_mask = mask.blocks(spec).to(q.device)  # a layer of a model on several devices may be elsewhere
    return block_sparse_attention(q, k, v, block_mask, scale=scale, softcap=softcap)


def _estimated(
    choice: Choice,
    spec: BlockSparse,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    scale: float,
    softcap: float,
) -> Tensor:
    mask.total()
    estimate = spec.of_tensors(q, k, mask.causal)
    if choice.by_elements:
        return _by_elements(q, k, v, rows(estimate, 0) & mask.elements(), scale, softcap)
    block_mask = mask.estimated(estimate)
    return block_sparse_attention(q, k, v, block_mask, scale=scale, softcap=softcap, causal=mask.causal)


def _permuted(
    choice: Choice,
    spec: BlockSparse,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    scale: float,
    softcap: float,
) -> Tensor:
    """Row by row where there is padding: the order of the keys is then made of the tokens alone."""
    mask.total()
    obstacles = {
        "a layer that is not causal": not mask.causal and k.shape[2] > 1,
        "softcap": softcap != 0,
        "a sliding window": mask.window is not None and mask.window < k.shape[2],
        "packed sequences": mask.documents is not None,
        "a mask function of the model's own": bool(mask.others),
    }
    for name, found in obstacles.items():
        if found:
            _refuse_permuted(name)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not choice.by_elements:
            return spec.attention(q, k, v, scale)
        order, keys, seen = spec.permuted(q, k, scale)
        return _by_elements(q, keys, v.take_along_dim(order[..., None], 2), seen, scale, 0.0)

    ranges = mask.token_ranges()
    if ranges is None:
        return attend(q, k, v)
    first, outs = k.shape[2] - q.shape[2], []
    for row, (start, end) in enumerate(ranges):
        begin, stop = max(start - first, 0), max(end - first, 0)
        one = slice(row, row + 1)
        if begin == stop:
            outs.append(q.new_zeros(1, *q.shape[1:3], v.shape[3]))
            continue
        out = attend(q[one, :, begin:stop], k[one, :, start:end], v[one, :, start:end])
        outs.append(F.pad(out, (0, 0, begin, q.shape[2] - stop)))
    return torch.cat(outs)


def _refuse_permuted(name: str) -> NoReturn:
    raise NotImplementedError(
        f"{name} is not supported with permuted_block_sparse_attention: take a builder, or an estimator such "
        "as tilewright.attention.estimate.mean_pool_top_p"
    )


def _without_mask(module: Any, q: Tensor, k: Tensor, kwargs: dict[str, Any]) -> Any:
    """What no mask means to SDPA: causal if the layer is and there are several queries, else everything."""
    from .model_mask import plain_mask

    window, (q_len, kv_len) = kwargs.get("sliding_window"), (q.shape[2], k.shape[2])
    if window is not None and window < kv_len:
        raise NotImplementedError(
            f"sliding_window={window} came without a mask that says so, and {kv_len} keys: "
            "make the model's masks by its config, as transformers does"
        )
    return plain_mask(q, k, _is_causal(module, q_len, kwargs))


def _by_elements(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float) -> Tensor:
    """Attention of few queries, by SDPA. Where these see few of the keys, the others are not read."""
    if softcap:
        mask = from_elements(seen, 64)
        return block_sparse_attention(q, k, v, mask, scale=scale, softcap=softcap)
    if q.shape[2] <= _FEW and not q.is_cuda:  # on a GPU, to know which keys is to wait for it
        (some,) = seen.flatten(0, 2).any(0).nonzero(as_tuple=True)
        if 2 * len(some) < k.shape[2]:
            k, v, seen = k.index_select(2, some), v.index_select(2, some), seen[..., some]
    groups = q.shape[1] // k.shape[1]
    if seen.shape[1] not in (1, q.shape[1]):
        seen = seen.repeat_interleave(groups, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=groups > 1)
    return out.masked_fill(~seen.any(-1, keepdim=True), 0.0)


def _as_before(
    former: str, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
) -> tuple[Tensor, Any]:
    """A layer that was left alone, in a model whose masks are ours."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if hasattr(mask, "for_implementation"):
        mask = mask.for_implementation(former, q.dtype)
    eager = inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")
    found = ALL_ATTENTION_FUNCTIONS.get_interface(former, eager)
    return found(module, q, k, v, mask, **options)  # type: ignore[no-any-return]


def _check(module: Any, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise NotImplementedError(
            f"dropout must be 0 with block-sparse attention, {type(module).__name__} has {dropout}: "
            "set it to 0 in the model's config (attention_dropout, attention_probs_dropout_prob)"
        )
    for name, value in kwargs.items():
        if name in _HARMLESS or value is None or value is False:
            continue
        _refuse(name)
    if _wants_weights():
        _refuse("output_attentions")


def _refuse(name: str) -> None:
    reason = _REASONS.get(name, "tilewright does not know what it means")
    raise NotImplementedError(f"{name} is not supported with block-sparse attention: {reason}")


def _wants_weights() -> bool:
    """Whether output_attentions was given to a model that does not tell its layers."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    collected = None if collector is None else collector.get()
    return isinstance(collected, dict) and "attentions" in collected


def _own_configs(model: nn.Module, changes: _Changes) -> None:
    """Gives the model copies of its configs, whose parts stay shared as they were."""
    from transformers import PreTrainedConfig

    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, config in list(vars(module).items()):
            if isinstance(config, PreTrainedConfig):
                changes.put(vars(module), name, copy.deepcopy(config, memo))


def _config(module: Any) -> Any:
    config = vars(module).get("config")
    return config if hasattr(config, "_attn_implementation") else None
