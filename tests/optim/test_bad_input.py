"""What cannot be stepped is refused in words, and nothing changes."""

import math

import pytest
import torch
from optim_cases import OPTIMIZERS, assert_same_bits, parameters, run, set_grads, snapshot

import tilewright as tw

CPU = torch.device("cpu")


class Wrapped(torch.Tensor):
    """A subclass whose memory is not what a kernel may assume."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return super().__torch_dispatch__(func, types, args, kwargs or {})


def sparse(p: torch.nn.Parameter) -> None:
    p.grad = torch.sparse_coo_tensor([[0, 2]], [1.0, 2.0], p.shape, check_invariants=True)


def wrapped(p: torch.nn.Parameter) -> None:
    p.grad = torch.Tensor._make_subclass(Wrapped, torch.ones(300))


def replaced(by: torch.Tensor):
    """Through .data, which does not check what assigning to .grad would."""

    def spoil(p: torch.nn.Parameter) -> None:
        p.grad.data = by

    return spoil


GRADS = {
    "sparse": (sparse, NotImplementedError, "param 1: sparse gradients are not supported"),
    "wrapped": (wrapped, NotImplementedError, "param 1: gradients of type Wrapped are not supported"),
    "double": (
        replaced(torch.ones(300).double()),
        TypeError,
        "param 1: grad has dtype torch.float64, expected .*32",
    ),
    "half": (replaced(torch.ones(300).half()), TypeError, "param 1: grad has dtype torch.float16"),
    "integer": (replaced(torch.ones(300).int()), TypeError, "param 1: grad has dtype torch.int32"),
    "shorter": (
        replaced(torch.ones(299)),
        ValueError,
        r"param 1: grad has shape \(299,\), expected .*\(300,\)",
    ),
    "viewed": (replaced(torch.ones(3, 100)), ValueError, r"param 1: grad has shape \(3, 100\)"),
}


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("case", GRADS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients(name: str, case: str, first: bool) -> None:
    spoil, error, message = GRADS[case]
    params = parameters([5000, 300], torch.float32, CPU)
    optimizer = OPTIMIZERS[name](params, max_grad_norm=1.0)
    if not first:
        run(optimizer, 1)
    set_grads(params, 1)
    spoil(params[1])
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)
    run(optimizer, 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_devices(name: str) -> None:
    params = [*parameters([5000], torch.float32, CPU), torch.nn.Parameter(torch.ones(300, device="meta"))]
    optimizer = OPTIMIZERS[name](params)
    set_grads(params[:1], 0)
    params[1].grad = torch.ones_like(params[1])
    before = params[0].detach().clone()
    with pytest.raises(
        NotImplementedError, match="param 1: device meta is not supported, expected cpu or cuda"
    ):
        optimizer.step()
    assert torch.equal(params[0], before)
    assert len(optimizer.state) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameter_dtypes(name: str, dtype: torch.dtype) -> None:
    params = [torch.nn.Parameter(torch.ones(300)), torch.nn.Parameter(torch.ones(300, dtype=dtype))]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = OPTIMIZERS[name](params)
    with pytest.raises(
        TypeError, match=f"param 1: dtype {dtype} is not supported, expected float32, float16"
    ):
        optimizer.step()
    assert all(bool((p == 1).all()) for p in params)
    assert len(optimizer.state) == 0


def test_integer_parameters_without_gradients_are_fine() -> None:
    """Quantized models hold some; optimizers are handed model.parameters() all the same."""
    frozen = torch.nn.Parameter(torch.zeros(10, dtype=torch.uint8), requires_grad=False)
    optimizer = tw.optim.AdamW8bit([frozen, *parameters([300], torch.float32, CPU)])
    set_grads(optimizer.param_groups[0]["params"][1:], 0)
    optimizer.step()
    assert len(optimizer.state) == 1


@pytest.mark.parametrize(
    "make_parameter",
    [
        lambda: torch.ones(300, 2)[:, 0],
        lambda: torch.ones(1, 300).expand(4, 300),
        lambda: torch.ones(40, 40).as_strided((20, 20), (1, 2)),
    ],
    ids=["gaps", "expanded", "overlapping"],
)
def test_parameters_with_gaps_or_overlaps(make_parameter) -> None:
    p = torch.nn.Parameter(make_parameter())
    p.grad = torch.ones(p.shape)
    optimizer = tw.optim.AdamW8bit([p])
    with pytest.raises(ValueError, match="param 0: the parameter has gaps or overlaps in memory"):
        optimizer.step()
    assert bool((p == 1).all())
    assert len(optimizer.state) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rates(name: str, as_tensor: bool, bad: float) -> None:
    params = parameters([300, 5000], torch.float32, CPU)
    lr = torch.tensor(bad) if as_tensor else bad
    with pytest.raises(ValueError, match=r"lr must be a number in \[0, inf\)"):
        OPTIMIZERS[name](params, lr=lr)
    optimizer = OPTIMIZERS[name](params)
    run(optimizer, 1)
    before = snapshot(optimizer)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match=r"lr must be a number in \[0, inf\)"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)


def test_states_that_were_tampered_with() -> None:
    params = parameters([5000], torch.float32, CPU)
    for key, value, message in (
        ("absmax1", torch.zeros(7), "absmax1"),
        ("state1", torch.zeros(10, dtype=torch.uint8), "state1"),
        ("qmap2", torch.zeros(16), "qmap2"),
        ("step", torch.zeros(()), "step"),
    ):
        optimizer = tw.optim.AdamW8bit(params)
        run(optimizer, 1)
        optimizer.state[params[0]][key] = value
        before = snapshot(optimizer)
        with pytest.raises((ValueError, TypeError), match=f"param 0: .*{message}"):
            optimizer.step()
        assert_same_bits(snapshot(optimizer), before)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("AdamW8bit", {"amsgrad": True}, ValueError, "AdamW8bit does not support amsgrad=True"),
        ("Adam8bit", {"amsgrad": True}, ValueError, "Adam8bit does not support amsgrad=True"),
        ("AdamW8bit", {"optim_bits": 8}, ValueError, "AdamW8bit is always 8-bit"),
        ("Adam8bit", {"optim_bits": 4}, ValueError, "Adam takes optim_bits=8"),
        ("AdamW8bit", {"args": object()}, ValueError, "args is not supported"),
        ("Lion8bit", {"args": object()}, ValueError, "args is not supported"),
        ("SGD8bit", {"args": object()}, ValueError, "args is not supported"),
        ("AdamW8bit", {"is_paged": True}, NotImplementedError, "is_paged must be False"),
        ("Lion8bit", {"is_paged": True}, NotImplementedError, "is_paged must be False"),
        ("AdamW8bit", {"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] must be a number in \[0, 1\), got 1.0"),
        ("AdamW8bit", {"betas": (0.9, -0.1)}, ValueError, r"betas\[1\] must be a number in"),
        ("AdamW8bit", {"betas": (0.9,)}, ValueError, "betas must be two numbers"),
        ("AdamW8bit", {"betas": (0.9, 0.99, 0.999)}, ValueError, "betas must be two numbers"),
        ("Lion8bit", {"betas": (0.9, math.nan)}, ValueError, r"betas\[1\] must be a number in"),
        ("AdamW8bit", {"eps": -1e-8}, ValueError, r"eps must be a number in \[0, inf\)"),
        ("AdamW8bit", {"eps": math.inf}, ValueError, r"eps must be a number in \[0, inf\)"),
        ("Adam8bit", {"weight_decay": -0.1}, ValueError, r"weight_decay must be a number in \[0, inf\)"),
        ("AdamW8bit", {"lr": "fast"}, TypeError, "lr must be a number"),
        ("AdamW8bit", {"lr": torch.ones(2)}, ValueError, "a tensor lr must hold one real number"),
        ("AdamW8bit", {"min_8bit_size": -1}, ValueError, "min_8bit_size must be an int of at least 0"),
        ("AdamW8bit", {"maximize": 1}, TypeError, "maximize must be True or False"),
        ("SGD8bit", {"momentum": 0}, NotImplementedError, "momentum=0 keeps no state"),
        ("SGD8bit", {"momentum": 1.5}, ValueError, "momentum must be a number in"),
        ("SGD8bit", {"dampening": -1.0}, ValueError, "dampening must be a number in"),
        ("SGD8bit", {"nesterov": True, "dampening": 0.1}, ValueError, "nesterov needs dampening=0"),
    ],
)
def test_constructors(name: str, arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        OPTIMIZERS[name]([torch.nn.Parameter(torch.ones(3))], **arguments)


@pytest.mark.parametrize("chosen", [tw.optim.AdamW, tw.optim.Adam, tw.optim.Lion])
def test_the_forms_with_optim_bits(chosen: type) -> None:
    """As transformers constructs them."""
    for bits, dtype in ((32, torch.float32), (8, torch.uint8)):
        params = parameters([5000], torch.float32, CPU)
        optimizer = chosen(params, lr=1e-3, betas=(0.9, 0.98), optim_bits=bits, is_paged=False)
        run(optimizer, 1)
        assert optimizer.state[params[0]]["state1"].dtype == dtype
    for arguments, error in (({"optim_bits": 16}, ValueError), ({"is_paged": True}, NotImplementedError)):
        with pytest.raises(error):
            chosen(params, **arguments)


def test_a_string_of_betas_as_bitsandbytes_takes_it() -> None:
    optimizer = tw.optim.AdamW8bit([torch.nn.Parameter(torch.ones(3))], betas="(0.9, 0.95)")
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"lr": math.nan}, "lr must be a number"),
        ({"betas": (2.0, 0.9)}, "betas"),
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0 is not supported"),
        ({"amsgrad": True}, "amsgrad=True is not supported"),
        ({"max_unorm": 1.0}, "it would have no effect"),
        ({"optim_bits": 4}, "optim_bits must be 8 or 32"),
    ],
)
def test_groups(group: dict, message: str) -> None:
    optimizer = tw.optim.AdamW8bit([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], **group})
    assert len(optimizer.param_groups) == 1


def test_the_same_parameter_twice() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="more than once in a parameter group"):
        tw.optim.AdamW8bit([p, p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        tw.optim.AdamW8bit([{"params": [p]}, {"params": [p]}])


def test_what_is_no_list_of_parameters() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        tw.optim.AdamW8bit([])
    with pytest.raises(TypeError):
        tw.optim.AdamW8bit(torch.ones(3))
    with pytest.raises(TypeError):
        tw.optim.AdamW8bit([1.0])
    with pytest.raises(TypeError):
        tw.optim.AdamW8bit([{"params": {torch.nn.Parameter(torch.ones(3))}}])
