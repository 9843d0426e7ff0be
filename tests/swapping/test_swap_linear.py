"""tw.swap of linear layers with zeros: what is chosen, what runs, what the weight decides."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import tilewright as tw
from dense_products import watched_products
from tilewright import _C
from tilewright._models import NOTE
from tilewright.nn import BlockSparseLinear, SemiStructuredLinear
from tilewright.prune import compressing
from tilewright.scan import dense
from tilewright.swapping import linear as linear_layers

Cost = Callable[[str, int], float]


class Clock:
    """Stands in for the race. Forms win; `cost` says otherwise."""

    def __init__(self) -> None:
        self.cost: Cost = lambda name, tokens: 1.0 if name == "dense" else 0.5
        self.tokens: set[int] = set()

    def __call__(
        self, modules: Mapping[str, nn.Module], x: Tensor, seconds: float, undisturbed: bool = False
    ) -> dict[str, float]:
        self.tokens.add(len(x))
        with torch.no_grad():
            outputs = [module(x) for module in modules.values()]
        for output in outputs[1:]:
            torch.testing.assert_close(output, outputs[0], rtol=1e-3, atol=1e-3)
        return {name: self.cost(name, len(x)) for name in modules}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(compressing, "_race", made)
    return made


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ran, by the class of the form."""
    found: list[str] = []
    for cls in (BlockSparseLinear, SemiStructuredLinear):
        forward = cls.forward

        def spied(self: nn.Module, x: Tensor, forward: Any = forward) -> Tensor:
            found.append(type(self).__name__)
            return forward(self, x)  # type: ignore[no-any-return]

        monkeypatch.setattr(cls, "forward", spied)
    return found


def pattern(rows: int, columns: int, block: int = 16, share: int = 4) -> Tensor:
    """A mask that keeps every fourth block."""
    places = torch.arange(rows)[:, None] // block + torch.arange(columns) // block
    return places % share == 0


def network(width: int = 64) -> nn.Sequential:
    """Two layers with zeros in blocks, one 2:4, one dense."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, width),
        nn.Linear(width, 8),
    )  # fmt: skip
    with torch.no_grad():
        for index in (0, 2):
            model[index].weight *= pattern(width, width)
        model[3].weight *= torch.arange(width) % 4 < 2
    return model.eval()


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)  # type: ignore[no-any-return]


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def test_report(clock: Clock) -> None:
    report = tw.swap(network())
    level = _C.cpu_level()
    assert [(s.path, s.layer, s.op, s.kernel) for s in report.swapped] == [
        ("0", "Linear", "block_sparse_linear", f"cpu-{level}, blocks of 16x16"),
        ("2", "Linear", "block_sparse_linear", f"cpu-{level}, blocks of 16x16"),
        ("3", "Linear", "semi_structured_linear", f"cpu-{level}, 2:4"),
    ]
    assert report.dense == ["4"]
    assert not report.skipped
    assert clock.tokens == {1, 512}
    (one, many) = report.swapped[0].measured
    assert (one.tokens, one.form, one.ms_dense, one.ms) == (1, "blocks of 16x16", 1.0, 0.5)
    assert many.tokens == 512
    text = str(report)
    assert "{0,2}  Linear  block_sparse_linear" in text
    assert "1: 1 -> 0.5; 512: 1 -> 0.5" in text
    assert "1 linear layer left dense: no zeros in the weight." in text
    assert report.to_dict()["swapped"][0]["measured"][0]["form"] == "blocks of 16x16"


def test_slower_forms_do_not_run(clock: Clock, runs: list[str]) -> None:
    clock.cost = lambda name, tokens: 1.0 if name == "dense" else 1.5
    model = network()
    report = tw.swap(model)
    assert not report.swapped
    assert [entry.path for entry in report.skipped] == ["0", "2", "3"]
    assert "has 0.67x the speed of dense" in report.skipped[0].why
    runs.clear()
    run(model, X)
    assert runs == []


def test_each_number_of_tokens_has_the_faster_one(clock: Clock, runs: list[str]) -> None:
    clock.cost = lambda name, tokens: 1.0 if name == "dense" else (0.5 if tokens > 100 else 2.0)
    model = network()
    stock = copy.deepcopy(model)
    report = tw.swap(model)
    assert report.swapped[0].kernel.endswith("dense up to 22 tokens, then blocks of 16x16")
    assert [measured.form for measured in report.swapped[0].measured] == ["dense", "blocks of 16x16"]
    runs.clear()
    run(model, X)
    assert runs == []
    many = torch.randn(3, 100, 64)
    torch.testing.assert_close(run(model, many), run(stock, many))
    assert runs == ["BlockSparseLinear", "BlockSparseLinear", "SemiStructuredLinear"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_same_outputs(clock: Clock, runs: list[str], dtype: torch.dtype) -> None:
    model = network().to(dtype)
    stock, x = copy.deepcopy(model), X.to(dtype)
    tw.swap(model, verify=x)
    assert 5 in clock.tokens
    runs.clear()
    torch.testing.assert_close(run(model, x), run(stock, x))
    assert len(runs) == 3
    assert run(model, x[:0]).shape == (0, 8)
    assert run(model, x[0]).shape == (8,)


def test_parameters_are_untouched_and_unswap_takes_back(clock: Clock) -> None:
    model = network()
    before, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    expected, shown = run(model, X), repr(model)
    tw.swap(model)
    run(model, X)
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in before.items()
    }
    assert list(model.state_dict()) == list(state)
    assert not list(model.buffers())
    assert repr(model) == shown
    assert isinstance(model[0], nn.Linear)
    assert type(model[4]) is nn.Linear
    assert tw.unswap(model) == 3
    assert type(model[0]) is nn.Linear
    assert NOTE not in vars(model[0])
    assert torch.equal(run(model, X), expected)


def test_other_models_are_untouched(clock: Clock, runs: list[str]) -> None:
    model, sibling = network(), network()
    tw.swap(model)
    runs.clear()
    run(sibling, X)
    assert runs == []
    assert type(sibling[0]) is nn.Linear


def test_training_is_that_of_the_dense_layer(clock: Clock, runs: list[str]) -> None:
    """Zeros grow where no mask holds them, as they do without the swap; then the layer is dense."""
    models = [network().train() for _ in range(2)]
    tw.swap(models[0])
    run(models[0], X)
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        runs.clear()
        for _ in range(2):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
        assert runs == []
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for _ in range(3):
        torch.testing.assert_close(run(models[0], X), run(models[1], X))
    assert runs == []


def test_masked_layers_train_and_are_sparse_again(clock: Clock, runs: list[str]) -> None:
    model = network()
    for index in (0, 2):
        tw.prune.set_mask(model[index], model[index].weight != 0)
    tw.swap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        before = run(model, X)
        model(X).square().sum().backward()
        optimizer.step()
        plain = copy.deepcopy(model)
        tw.unswap(plain)
        for calls in range(3):
            runs.clear()
            torch.testing.assert_close(run(model, X), run(plain, X))
            assert len(runs) == (2 if calls else 0)  # a weight that is new is packed when it comes again
        assert not torch.allclose(run(model, X), before)


def test_changes_of_the_weight_are_seen(clock: Clock, runs: list[str]) -> None:
    model = network()
    tw.swap(model)
    other = network()
    for parameter in other.parameters():
        parameter.data.mul_(1.5)

    def check() -> None:
        plain = copy.deepcopy(model)
        tw.unswap(plain)
        for _ in range(2):
            torch.testing.assert_close(run(model, X), run(plain, X))
        runs.clear()
        run(model, X)
        assert len(runs) == 3

    check()
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[2].bias.add_(1)
    check()
    model.load_state_dict(other.state_dict())
    check()
    model.load_state_dict(network().state_dict(), assign=True)
    check()
    model[0].weight.data = model[0].weight.data * 3
    check()
    model.double()
    model.float()
    check()
    model.train()
    model[0].weight.data.mul_(3)  # torch does not count this
    model.eval()
    check()


def test_a_weight_without_the_zeros_is_dense(clock: Clock, runs: list[str]) -> None:
    model = network()
    tw.swap(model)
    run(model, X)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[3].weight.fill_(1.0)
    plain = copy.deepcopy(model)
    tw.unswap(plain)
    for _ in range(3):
        torch.testing.assert_close(run(model, X), run(plain, X))
    runs.clear()
    run(model, X)
    assert runs == ["BlockSparseLinear"]


def test_gradients_of_the_input_alone(clock: Clock, runs: list[str]) -> None:
    model = network().requires_grad_(False)
    stock = copy.deepcopy(model)
    tw.swap(model)
    runs.clear()
    found = []
    for net in (model, stock):
        x = X.clone().requires_grad_()
        net(x).sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)  # type: ignore[arg-type]
    assert runs == []
    model(X)  # frozen, no gradient wanted
    assert len(runs) == 3


@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
def test_copies_stay_swapped(clock: Clock, runs: list[str], way: str) -> None:
    model = network()
    tw.swap(model)
    expected = run(model, X)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    run(twin, X)
    runs.clear()
    assert torch.equal(run(twin, X), expected)
    assert len(runs) == 3
    with torch.no_grad():
        twin[0].weight.zero_()
    assert torch.equal(run(model, X), expected)
    assert tw.unswap(twin) == 3
    assert tw.unswap(model) == 3


def test_masks_of_torch(clock: Clock, runs: list[str]) -> None:
    model = network()
    stock = copy.deepcopy(model)
    for net in (model, stock):
        torch_prune.custom_from_mask(net[4], "weight", pattern(8, 64, 8))
    report = tw.swap(model, include="4")
    assert [entry.path for entry in report.swapped] == ["4"]
    for _ in range(2):
        runs.clear()
        torch.testing.assert_close(run(model, X), run(stock, X))
    assert runs == ["BlockSparseLinear"]
    for net in (model, stock):
        net(X).square().sum().backward()
        torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert torch.equal(model[4].weight_orig, stock[4].weight_orig)
    for calls in range(3):
        runs.clear()
        torch.testing.assert_close(run(model, X), run(stock, X))
        assert len(runs) == min(calls, 1)
    assert tw.unswap(model) == 1
    torch_prune.remove(model[4], "weight")  # type: ignore[no-untyped-call]


def test_parametrized_later(clock: Clock, runs: list[str]) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = network()
    stock = copy.deepcopy(model)
    tw.swap(model)
    for net in (model, stock):
        parametrize.register_parametrization(net[0], "weight", Doubled())
    for _ in range(2):
        runs.clear()
        torch.testing.assert_close(run(model, X), run(stock, X))
        assert runs == ["BlockSparseLinear", "SemiStructuredLinear"]
    assert tw.unswap(model) == 3
    assert torch.equal(run(model, X), run(stock, X))


def test_where_forms_do_not_run(clock: Clock, runs: list[str]) -> None:
    model = network()
    stock = copy.deepcopy(model)
    tw.swap(model)
    runs.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(model, X), run(stock, X))
    with torch.no_grad():
        mapped = torch.vmap(model)(X[:, None])
        torch.testing.assert_close(mapped[:, 0], stock(X))
        changed = {name: 2 * p for name, p in model.named_parameters()}
        for _ in range(3):
            doubled = torch.func.functional_call(model, changed, (X,))
            assert torch.equal(doubled, torch.func.functional_call(stock, changed, (X,)))
        traced = torch.jit.trace(model, X, check_trace=False)
    with pytest.raises(RuntimeError, match=r"mat1 and mat2|shapes cannot be multiplied"):
        model(X[:, :5])
    assert runs == []
    with torch.no_grad():
        model[0].weight.mul_(3)
        stock[0].weight.mul_(3)
        torch.testing.assert_close(traced(X), stock(X))
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(model(X), stock(X))
    assert len(runs) == 3 + 2
    with torch.no_grad():
        torch.testing.assert_close(model(X), stock(X))


@pytest.mark.slow
def test_compile(clock: Clock) -> None:
    model = network()
    tw.swap(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(run(compiled, X), run(model, X))
        with torch.no_grad():
            model[0].weight.mul_(2)


def test_what_is_left_alone(clock: Clock) -> None:
    class Mine(nn.Linear):
        pass

    model = nn.ModuleDict({
        "scattered": nn.Linear(64, 64), "broken": nn.Linear(64, 64), "mine": Mine(64, 64),
        "replaced": nn.Linear(64, 64), "encoder": nn.TransformerEncoderLayer(64, 1, 64),
        "off": nn.Linear(64, 64),
    })  # fmt: skip
    with torch.no_grad():
        model["scattered"].weight *= torch.rand(64, 64) < 0.5
        for layer in (
            model["broken"],
            model["mine"],
            model["replaced"],
            model["encoder"].linear1,
            model["off"],
        ):
            layer.weight *= pattern(64, 64)
        model["broken"].weight[0, 0] = torch.nan
    model["replaced"].forward = lambda x: x
    report = tw.swap(model, include="!off")
    assert not report.swapped
    whys = {entry.path: entry.why for entry in report.skipped}
    assert sorted(whys) == ["broken", "encoder.linear1", "off", "replaced", "scattered"]
    assert whys["off"] == "not included"
    assert whys["broken"] == "dense: 1 of its 4096 weights are not finite"
    assert whys["replaced"] == "its forward was replaced on the instance"
    assert whys["encoder.linear1"] == "torch.nn.TransformerEncoderLayer reads its weight itself"
    assert whys["scattered"] == "dense: its zeros are too scattered for blocks of 8x8 or n:m"


def test_off(clock: Clock) -> None:
    model = network()
    report = tw.swap(model, linear=False)
    assert (report.swapped, report.skipped, report.dense) == ([], [], [])
    assert tw.unswap(model) == 0


def test_dry_run(clock: Clock) -> None:
    model = network()
    report = tw.swap(model, dry_run=True, verify=X)
    assert clock.tokens == {1, 5, 512}
    assert type(model[0]) is nn.Linear
    assert str(tw.swap(model, verify=X)) == str(report).replace("would be swapped", "swapped")


def test_verify_undoes_what_differs(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    expected = run(model, X)
    forward = BlockSparseLinear.forward
    real = linear_layers.decide

    def then_wrong(*arguments: Any) -> Any:
        works = real(*arguments)
        monkeypatch.setattr(BlockSparseLinear, "forward", lambda self, x: 1.2 * forward(self, x))
        return works

    monkeypatch.setattr(linear_layers, "decide", then_wrong)
    with pytest.raises(RuntimeError, match=r"verify: output differs by .* The swap was undone"):
        tw.swap(model, verify=X)
    assert tw.unswap(model) == 0
    assert torch.equal(run(model, X), expected)


def test_conv1d_of_transformers(clock: Clock, runs: list[str]) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(32, 64))
    with torch.no_grad():
        model[0].weight *= pattern(64, 32)
        model[0].bias.normal_()
    stock = copy.deepcopy(model)
    report = tw.swap(model, verify=X)
    assert [(entry.layer, entry.op) for entry in report.swapped] == [("Conv1D", "block_sparse_linear")]
    runs.clear()
    torch.testing.assert_close(run(model, X), run(stock, X))
    assert runs == ["BlockSparseLinear"]
    twin = copy.deepcopy(model)
    assert tw.unswap(model) == 1
    torch.testing.assert_close(run(twin, X), run(stock, X))


def test_mamba_trains_fused_as_before(clock: Clock) -> None:
    """Its kernels read the projections' weights; a swapped projection is still plain to them."""
    from tilewright.nn.mamba import is_plain

    layer = tw.nn.Mamba(64, d_state=8)
    with torch.no_grad():
        layer.in_proj.weight *= pattern(256, 64)
    tw.swap(layer)
    assert type(layer.in_proj) is not nn.Linear
    assert is_plain(layer.in_proj)


@pytest.mark.parametrize("gains", [False, True])
def test_big_dense_models_cost_little(monkeypatch: pytest.MonkeyPatch, gains: bool) -> None:
    monkeypatch.setattr(dense, "is_better", lambda: gains)
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(4)])
    looked = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and func.overloadpacket.__name__ not in ("detach", "as_strided"):
                looked.append(out.numel())
            return out

    with Counting():
        report = tw.swap(model)
    assert (len(report.dense), len(report.swapped)) == ((0, 4) if gains else (4, 0))
    assert max(looked) <= 4096


@pytest.fixture
def gains(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A processor on which our dense product is the faster one; the shapes it is given."""
    return watched_products(monkeypatch)


def test_dense_layers_where_torch_is_slow(gains: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.Linear(256, 8))
    stock, x = copy.deepcopy(model), torch.randn(2, 20, 256)
    report = tw.swap(model)
    assert [(entry.path, entry.op, entry.kernel) for entry in report.swapped] == [
        ("0", "matmul", "cpu-avx512, dense"),
        ("2", "matmul", "cpu-avx512, dense"),
    ]
    assert report.dense == ["3"], "too small to gain"
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        gains.clear()
        copied(x).square().sum().backward()
        assert len(gains) == 5, "two outputs, two gradients of weights, one of an input"
        stock.zero_grad()
        stock(x).square().sum().backward()
        for ours, theirs in zip(copied.parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    assert tw.unswap(model) == 2
    assert [type(layer) for layer in model] == [type(layer) for layer in stock]


def test_what_dense_layers_stay_torchs(gains: list[tuple[int, ...]]) -> None:
    model = nn.ModuleDict({
        "exact": nn.Linear(256, 256).double(),
        "derived": type("Mine", (nn.Linear,), {})(256, 256),
        "other": nn.MultiheadAttention(256, 4),
        "mixer": tw.nn.Mamba(256),
        "named": nn.Linear(256, 256),
        "normed": torch.nn.utils.parametrizations.weight_norm(nn.Linear(256, 256)),
    })  # fmt: skip
    report = tw.swap(model, include="!named")
    assert not report.swapped
    assert {"exact", "mixer.in_proj", "mixer.out_proj", "named"} <= set(report.dense)
    assert len(tw.swap(model).swapped) == 1


def test_layers_with_zeros_that_no_form_gains_from_are_dense(
    clock: Clock, gains: list[tuple[int, ...]]
) -> None:
    clock.cost = lambda name, tokens: 1.0 if name == "dense" else 1.5
    model = network(256)
    stock, x = copy.deepcopy(model), torch.randn(9, 256)
    report = tw.swap(model)
    assert [entry.op for entry in report.swapped] == ["matmul"] * 3
    assert "dense: " in report.swapped[0].kernel
    assert "has 0.67x the speed of dense" in report.swapped[0].kernel
    torch.testing.assert_close(run(model, x), run(stock, x))


def test_dense_layers_that_are_swapped_can_be_pruned_and_compressed(
    clock: Clock, gains: list[tuple[int, ...]]
) -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()
    assert len(tw.swap(model).swapped) == 2
    x = torch.randn(9, 256)
    tw.prune.shrink(model, x, 0.5)
    assert model[0].weight.shape[0] == 256
    with torch.no_grad():
        model[0].weight *= pattern(*model[0].weight.shape)
    report = tw.prune.compress(model, x)
    assert [entry.paths for entry in report.compressed] == [["0"]]


def test_real_race() -> None:
    """On this machine's clock: nothing is asked of it but an answer, and right outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256)).eval()
    with torch.no_grad():
        model[0].weight *= pattern(256, 256, share=8)
    stock = copy.deepcopy(model)
    x = torch.randn(3, 256)
    report = tw.swap(model, verify=x)
    assert len(report.swapped) + len(report.skipped) == 1
    torch.testing.assert_close(run(model, x), run(stock, x))


def test_compress_says_what_a_swapped_model_keeps_to_itself() -> None:
    """A swapped mixer multiplies by dt_proj's weight in a kernel of its own, even where tokens are given."""
    pytest.importorskip("transformers", minversion="5.0")
    from tiny_models import tiny, tokens

    model = tiny("mamba").eval()
    tw.prune.prune(model, tw.prune.Block(8, 8), 0.5, include="*.dt_proj")
    tw.swap(model, linear=False)
    inputs = {"input_ids": tokens(), "use_cache": False}
    expected = run_model(model, inputs)
    report = tw.prune.compress(model, inputs, tokens=[1, 64])
    why = "its layer is swapped and reads the weight itself: tilewright.unswap(model) first"
    assert {layer.why for layer in report.layers} == {why}
    torch.testing.assert_close(run_model(model, inputs), expected)


def run_model(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits  # type: ignore[no-any-return]
