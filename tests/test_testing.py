"""tilewright.testing."""

import pytest

from tilewright import _C, _backend
from tilewright.testing import emulated


def test_emulated_switches_and_restores() -> None:
    assert _backend.C is _C
    with emulated() as outer:
        assert _backend.C is outer
        assert _backend.is_emulated()
        assert outer.build_info()["emulated"]
        with emulated(seed=3) as inner:
            assert inner is outer
        assert _backend.C is outer
    assert _backend.C is _C
    assert not _backend.is_emulated()


def test_emulated_restores_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), emulated():
        raise ZeroDivisionError
    assert _backend.C is _C
