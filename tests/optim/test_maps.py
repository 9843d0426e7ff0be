"""The built-in 8-bit map."""

import pytest
import torch

from reference import optim as reference
from tilewright.optim import create_dynamic_map


@pytest.mark.parametrize("signed", [True, False])
def test_map_is_the_definition(signed: bool) -> None:
    made = create_dynamic_map(signed)
    assert made.dtype == torch.float32
    assert made.shape == (256,)
    torch.testing.assert_close(made.double(), reference.dynamic_map(signed), rtol=4e-7, atol=0.0)


@pytest.mark.parametrize("signed", [True, False])
def test_map_is_bitsandbytes_to_the_bit(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(create_dynamic_map(signed), functional.create_dynamic_map(signed=signed))


def test_landmarks() -> None:
    signed, unsigned = create_dynamic_map(True), create_dynamic_map(False)
    assert signed[127] == 0
    assert signed[255] == 1
    assert signed[0] > -1
    assert unsigned[0] == 0
    assert unsigned[255] == 1
    assert bool((signed.diff() > 0).all())
    assert bool((unsigned.diff() > 0).all())


def test_each_call_gives_a_tensor_of_its_own() -> None:
    create_dynamic_map().zero_()
    assert create_dynamic_map()[255] == 1
