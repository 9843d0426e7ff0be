"""The package carries its types: the marker, and a stub of the extension that is up to date."""

from __future__ import annotations

import ast
import inspect
import sys
import types
import typing
from collections.abc import Callable
from importlib.resources import files

import pytest

import tilewright as tw
from tilewright import _C
from tilewright.compat.flex_attention import flex_attention

STUB = files("tilewright").joinpath("_C.pyi")


def parameters(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in function.args.args]


def documented(function: object) -> list[str]:
    """The parameters in the signature that pybind11 begins a docstring with."""
    (signature,) = ast.parse(f"def {(function.__doc__ or '').splitlines()[0]}: ...").body
    assert isinstance(signature, ast.FunctionDef)
    return parameters(signature)


def test_the_package_is_marked_as_typed() -> None:
    assert files("tilewright").joinpath("py.typed").is_file()


def test_the_stub_is_up_to_date() -> None:
    """If not: `make stubs`."""
    body = ast.parse(STUB.read_text()).body
    stub = {node.name: parameters(node) for node in body if isinstance(node, ast.FunctionDef)}
    found = {
        name: documented(value)
        for name, value in vars(_C).items()
        if isinstance(value, types.BuiltinFunctionType)
    }
    assert stub == found
    (plan,) = (node for node in body if isinstance(node, ast.ClassDef))
    for method in plan.body:
        assert isinstance(method, ast.FunctionDef)
        assert parameters(method) == documented(getattr(_C.OptimizerPlan, method.name))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads is new in Python 3.11")
@pytest.mark.parametrize(
    "function",
    [
        tw.attention.block_sparse_attention,
        tw.attention.permuted_block_sparse_attention,
        tw.prune.global_masks,
        tw.scan.causal_conv1d,
        tw.scan.mamba_split_conv1d_scan_combined,
        tw.scan.selective_scan,
        tw.scan.ssd_chunk_scan,
        flex_attention,
    ],
)
def test_overloads_have_all_parameters(function: Callable[..., object]) -> None:
    overloads = typing.get_overloads(function)
    expected = list(inspect.signature(function).parameters)
    assert overloads
    assert all(list(inspect.signature(stub).parameters) == expected for stub in overloads)


def test_dir_shows_what_is_public() -> None:
    assert dir(tw) == sorted(tw.__all__)
    assert all(hasattr(tw, name) for name in dir(tw))


def test_a_misspelt_name_is_known_to_pythons_own_suggestions() -> None:
    with pytest.raises(AttributeError, match="module 'tilewright' has no attribute 'atention'") as raised:
        tw.atention  # noqa: B018
    assert (raised.value.name, raised.value.obj) == ("atention", tw)
