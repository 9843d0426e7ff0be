"""Pruned linear layers become the fastest exact form, or stay dense. The clock is a table here."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import tilewright as tw
from tilewright.prune import compressing

Cost = Callable[[str, int], float]


class Clock:
    """Stands in for the race: a cost for each form and number of tokens, and a record of what was raced."""

    def __init__(self) -> None:
        self.cost: Cost = lambda name, tokens: 1.0 if name == "dense" else 0.5
        self.races: list[tuple[tuple[str, ...], int]] = []

    def __call__(
        self, modules: Mapping[str, nn.Module], x: Tensor, seconds: float, undisturbed: bool = False
    ) -> dict[str, float]:
        self.races.append((tuple(modules), len(x)))
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


def blocks(linear: nn.Linear, size: int = 32, keep: float = 0.25, mask: bool = True) -> nn.Linear:
    """Blocks of zeros, as a mask or in the weight alone."""
    rows, columns = linear.weight.shape
    grid = torch.arange(-(-rows // size) * -(-columns // size)).view(-(-rows // size), -1)
    kept = (grid * 7 % 4 < 4 * keep).repeat_interleave(size, 0).repeat_interleave(size, 1)[:rows, :columns]
    if mask:
        tw.prune.set_mask(linear, kept)
    else:
        with torch.no_grad():
            linear.weight *= kept
    return linear


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = blocks(nn.Linear(64, 128)), blocks(nn.Linear(128, 64, bias=False), mask=False)
        self.scattered, self.head = nn.Linear(64, 64), nn.Linear(64, 5)
        tw.prune.set_mask(self.scattered, torch.rand(64, 64) < 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scattered(self.down(self.up(x).relu())))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))


def test_masked_layers_become_sparse_and_the_rest_stays(clock: Clock, x: Tensor) -> None:
    model = Net().eval()
    expected, kept = model(x), dict(model.named_children())
    report = tw.prune.compress(model, x)
    assert isinstance(model.up, tw.nn.BlockSparseLinear)
    assert isinstance(model.down, tw.nn.BlockSparseLinear)
    assert model.scattered is kept["scattered"]
    assert model.head is kept["head"]
    torch.testing.assert_close(model(x), expected)
    assert [(layer.name, layer.is_sparse) for layer in report.layers] == [
        ("up", True),
        ("down", True),
        ("scattered", False),
    ]
    assert report.left == ["head"]
    up = report.layers[0]
    assert (up.density, up.pattern, up.shape, up.tokens) == (0.25, "blocks of 32x32", (128, 64), [6])
    assert up.bytes_dense == 4 * (128 * 64 + 128)
    assert up.bytes < up.bytes_dense / 2
    assert up.calls == {6: 1}
    assert (up.ms_dense(6), up.ms(6)) == (1.0, 0.5)
    assert report.error < 1e-5
    assert report.model_ms > 0


def test_undo_puts_the_same_layers_back(clock: Clock, x: Tensor) -> None:
    model = Net().eval()
    before, expected = dict(model.named_modules()), model(x)
    parameters = dict(model.named_parameters())
    report = tw.prune.compress(model, x)
    assert dict(model.named_modules()) != before
    report.undo()
    report.undo()
    assert dict(model.named_modules()) == before
    assert all(parameters[name] is value for name, value in model.named_parameters())
    assert torch.equal(model(x), expected)
    assert tw.prune.mask_of(model.up) is not None


@pytest.mark.parametrize("sparse", [1.0, 0.98, 0.9709])
def test_a_form_has_to_win_by_the_margin(clock: Clock, x: Tensor, sparse: float) -> None:
    model = Net().eval()
    clock.cost = lambda name, tokens: 1.0 if name == "dense" else sparse
    report = tw.prune.compress(model, x)
    assert report.compressed == []
    assert type(model.up) is nn.Linear
    assert "the fastest sparse form, has 1.0" in report.layers[0].why
    assert report.model_ms == 0.0


def test_a_form_has_to_win_twice(clock: Clock, x: Tensor) -> None:
    model = Net().eval()
    first: set[str] = set()

    def cost(name: str, tokens: int) -> float:
        if name == "dense":
            return 1.0
        lucky = name == "blocks of 32x32" and name not in first
        first.add(name)
        return 0.1 if lucky else 0.7 if name == "blocks of 16x16" else 2.0

    clock.cost = cost
    report = tw.prune.compress(model, x, include="up")
    assert report.layers[0].kernel == "blocks of 16x16"
    assert clock.races[1:] == [(("dense", "blocks of 32x32"), 6), (("dense", "blocks of 16x16"), 6)]


def test_the_fastest_form_is_taken(clock: Clock, x: Tensor) -> None:
    costs = {"dense": 1.0, "blocks of 32x32": 0.5, "blocks of 16x16": 0.3, "blocks of 8x8": 0.4}
    clock.cost = lambda name, tokens: costs[name]
    model = Net().eval()
    report = tw.prune.compress(model, x, include="up")
    assert report.layers[0].kernel == "blocks of 16x16"
    assert model.up.block == (16, 16)
    assert report.layers[0].times == {name: {6: cost} for name, cost in costs.items()}
    assert report.layers[1].why == "not included"


def crossing(name: str, tokens: int) -> float:
    """Sparse below 100 tokens, dense above."""
    return tokens if name == "dense" else 50 + 0.5 * tokens


def test_several_token_counts_cross_over(clock: Clock, x: Tensor) -> None:
    model = Net().eval()
    expected, weight = model(x), model.up.weight
    clock.cost = lambda name, tokens: crossing("dense" if name != "dense" else "sparse", tokens)
    report = tw.prune.compress(model, x, tokens=[256, 4, 64, 400])
    layer = report.layers[0]
    assert layer.tokens == [4, 64, 256, 400]
    assert layer.chosen == {4: "blocks of 32x32", 64: "blocks of 32x32", 256: "dense", 400: "dense"}
    assert isinstance(model.up, tw.nn.CrossoverLinear)
    assert model.up.steps == ((128, 0),)  # between 64 and 256
    assert isinstance(model.up.form_for(128), tw.nn.BlockSparseLinear)
    assert isinstance(model.up.form_for(129), nn.Linear)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x[:1].expand(200, 3, 64)), expected[:1].expand(200, 3, 5))
    assert layer.bytes > layer.bytes_dense
    assert not any(p.requires_grad for p in model.up.parameters())
    assert weight.requires_grad
    assert model.up.form_for(999).weight.data_ptr() == weight.data_ptr()  # the dense form costs nothing more
    assert "frozen" in layer.why
    report.undo()
    assert model.up.weight is weight
    assert weight.requires_grad


def test_one_form_is_enough_if_it_wins_everywhere(clock: Clock, x: Tensor) -> None:
    model = Net().eval()
    best = {4: "blocks of 32x32", 64: "blocks of 16x16"}
    clock.cost = lambda name, tokens: 1.0 if name == "dense" else 0.5 if name == best[tokens] else 0.51
    report = tw.prune.compress(model, x, tokens=[4, 64])
    assert isinstance(model.up, tw.nn.BlockSparseLinear)
    assert set(report.layers[0].chosen.values()) <= set(best.values())
    assert len(set(report.layers[0].chosen.values())) == 1


@pytest.mark.parametrize("training", [False, True])
def test_layers_in_training_do_not_cross_over(clock: Clock, x: Tensor, training: bool) -> None:
    model = Net().train(training)
    clock.cost = lambda name, tokens: crossing("dense" if name != "dense" else "sparse", tokens)
    report = tw.prune.compress(model, x, tokens=[4, 400], crossover=training)
    assert report.compressed == []
    assert type(model.up) is nn.Linear
    clock.cost = lambda name, tokens: 1.0 if name == "dense" else 0.9
    tw.prune.compress(model, x, tokens=[4, 400], crossover=training)
    assert isinstance(model.up, tw.nn.BlockSparseLinear)
    assert model.up.training == training


def test_training_goes_on_and_zeros_stay(clock: Clock, x: Tensor) -> None:
    model = Net().train()
    model.up.weight.requires_grad_(False)
    with torch.no_grad():  # zeros inside of a block, pruned by the mask
        mask = tw.prune.mask_of(model.up).clone()
        row, column = mask.nonzero()[0].tolist()
        mask[row, column] = False
    tw.prune.set_mask(model.up, mask)
    down = model.down.weight != 0
    tw.prune.compress(model, x)
    assert not model.up.values.requires_grad
    assert model.up.bias.requires_grad
    model.up.values.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    assert not model.up.to_dense()[~mask].any()
    assert not model.down.to_dense()[~down].any()


class Shared(nn.Module):
    """One layer at two places, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = blocks(nn.Linear(64, 64, bias=False))
        self.again = nn.ModuleList([self.one])
        self.twin = nn.Linear(64, 64, bias=False)
        self.twin.weight = self.one.weight
        self.embedding = nn.Embedding(64, 32)
        self.head = nn.Linear(32, 64, bias=False)
        self.embedding.weight = self.head.weight
        blocks(self.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.twin(self.again[0](self.one(x)))[..., :32]) + self.embedding.weight[0, 0]


def test_shared_layers_are_handled_once(clock: Clock, x: Tensor) -> None:
    model = Shared().eval()
    expected = model(x)
    report = tw.prune.compress(model, x)
    assert isinstance(model.one, tw.nn.BlockSparseLinear)
    assert model.again[0] is model.one
    assert model.twin is model.one
    assert report.layers[0].paths == ["one", "again.0", "twin"]
    assert report.layers[0].calls == {6: 3}
    assert len(clock.races) == 2
    assert report.layers[1].why == "its weight is also that of embedding"
    torch.testing.assert_close(model(x), expected)
    report.undo()
    assert model.twin is not model.one
    assert model.twin.weight is model.one.weight is model.again[0].weight


def test_layers_alike_are_timed_once(clock: Clock, x: Tensor) -> None:
    model = nn.Sequential(*(blocks(nn.Linear(64, 64)) for _ in range(3))).eval()
    report = tw.prune.compress(model, x)
    assert [layer.measured_as for layer in report.layers] == ["", "0", "0"]
    assert len(clock.races) == 2
    assert len(report.compressed) == 3
    assert "a layer alike" in report.explain("2")


def test_masks_of_torch_are_understood(clock: Clock, x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    torch_prune.custom_from_mask(model[0], "weight", tw.prune.mask_of(blocks(nn.Linear(64, 64))))
    expected = model(x)
    report = tw.prune.compress(model, x)
    assert isinstance(model[0], tw.nn.BlockSparseLinear)
    assert sorted(model.state_dict()) == ["0.bias", "0.weight"]
    torch.testing.assert_close(model(x), expected)
    report.undo()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(("keep", "names"), [(2, ["2:4"]), (1, ["2:4", "1:4"])])
def test_semi_structured_zeros(clock: Clock, x: Tensor, keep: int, names: list[str]) -> None:
    model = nn.Sequential(nn.Linear(64, 48)).eval()
    order = torch.rand(48, 16, 4, generator=torch.Generator().manual_seed(0)).argsort(-1)
    tw.prune.set_mask(model[0], (order < keep).flatten(1))
    expected = model(x)
    report = tw.prune.compress(model, x)
    layer = report.layers[0]
    assert isinstance(model[0], tw.nn.SemiStructuredLinear)
    assert (layer.pattern, layer.kernel) == (names[-1], names[0])
    assert list(layer.times) == ["dense", *names]
    assert layer.bytes < layer.bytes_dense
    torch.testing.assert_close(model(x), expected)


def test_a_form_that_refuses_is_left_out(clock: Clock, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise ValueError("not today")

    monkeypatch.setattr(tw.nn.BlockSparseLinear, "from_linear", refuse)
    model = Net().eval()
    report = tw.prune.compress(model, x)
    assert report.compressed == []
    assert "blocks of 32x32: not today" in report.explain("up")


def test_what_cannot_be_replaced_stays(clock: Clock, x: Tensor) -> None:
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(blocks(Mine(64, 64)), blocks(nn.Linear(64, 64)), blocks(nn.Linear(64, 64))).eval()
    model[1].register_forward_hook(lambda module, inputs, output: output)
    model[2].forward = lambda input: nn.functional.linear(input, model[2].weight, model[2].bias)
    report = tw.prune.compress(model, x)
    assert [layer.why for layer in report.layers] == [
        "it is a Mine, not a plain torch.nn.Linear",
        "it has hooks",
        "its forward was replaced on the instance",
    ]
    layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True)
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            blocks(module)
    report = tw.prune.compress(layer.eval(), x)
    assert [item.why for item in report.layers] == [
        "torch.nn.TransformerEncoderLayer reads its weight itself",
        "torch.nn.TransformerEncoderLayer reads its weight itself",
        "it is a NonDynamicallyQuantizableLinear, not a plain torch.nn.Linear",
    ]


def test_a_layer_that_is_never_reached_says_so(clock: Clock, x: Tensor) -> None:
    model = Net().eval()
    model.unused = blocks(nn.Linear(64, 64))
    report = tw.prune.compress(model, x)
    assert report.layers[-1].why == "example_inputs never reach it, and tokens is not given"
    report = tw.prune.compress(model, x, tokens=4)
    assert report.layers[-1].is_sparse


class Reader(nn.Module):
    """Reads the weight of a layer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = blocks(nn.Linear(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) @ self.inner.weight


def test_a_model_that_no_longer_runs_is_as_it_was(clock: Clock, x: Tensor) -> None:
    model = Reader().train()
    inner, expected = model.inner, model(x)
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        tw.prune.compress(model, x)
    assert model.inner is inner
    assert torch.equal(model(x), expected)
    assert model.training
    assert not inner._forward_hooks


def test_other_outputs_undo_it(clock: Clock, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net().eval()
    up = model.up
    real = tw.nn.BlockSparseLinear.forward
    monkeypatch.setattr(compressing, "_race", lambda m, *_: {n: 1.0 if n == "dense" else 0.5 for n in m})
    monkeypatch.setattr(tw.nn.BlockSparseLinear, "forward", lambda self, x: real(self, x) + 1)
    with pytest.raises(RuntimeError, match=r"after compress, output differs by .*; the model is as it was"):
        tw.prune.compress(model, x)
    assert model.up is up


def test_bad_arguments(clock: Clock, x: Tensor) -> None:
    model = Net().eval()
    for options, error, message in (
        ({"tokens": 0}, ValueError, "tokens must be a positive int, several of them or None, got 0"),
        ({"tokens": [4, 2.5]}, TypeError, "tokens must be a positive int, several of them or None, got 2.5"),
        ({"tokens": []}, ValueError, "tokens must be .* got none"),
        ({"tokens": "many"}, TypeError, "tokens must be .* got 'many'"),
        ({"margin": -0.1}, ValueError, r"margin must be a number in \[0, inf\), got -0.1"),
        ({"seconds": "1"}, TypeError, r"seconds must be a number in \[0, inf\), got '1'"),
        ({"include": 3}, TypeError, "include must be a pattern of names or several of them, got 3"),
    ):
        with pytest.raises(error, match=message):
            tw.prune.compress(model, x, **options)
    with pytest.raises(TypeError, match="example_inputs must be a tensor"):
        tw.prune.compress(model, 3)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        tw.prune.compress(3, x)
    with pytest.raises(TypeError, match=r"put a single Linear into a torch\.nn\.Sequential"):
        tw.prune.compress(model.up, x)
    with torch.no_grad():
        model.up.weight[3, 4] = float("inf")
    with pytest.raises(ValueError, match="up: 1 of its 8192 weights are not finite"):
        tw.prune.compress(model, x)
    with torch.no_grad():
        model.up.weight[3, 4] = 0
        model.up.weight[~tw.prune.mask_of(model.up)] = 1
    with pytest.raises(ValueError, match="up: 6144 weights that its mask prunes are not zero"):
        tw.prune.compress(model, x)
    assert clock.races == []


def test_report(clock: Clock, x: Tensor, tmp_path: Path) -> None:
    model = Net().eval()
    clock.cost = lambda name, tokens: crossing("dense" if name != "dense" else "sparse", tokens)
    report = tw.prune.compress(model, x, tokens=[4, 400])
    text = str(report)
    assert "2 of 3 linear layers with zeros became sparse; 1 without zeros left alone" in text
    assert "All of them at 4 tokens" in text
    read = json.loads(report.to_json(tmp_path / "report.json"))
    assert read == json.loads((tmp_path / "report.json").read_text())
    assert read["layers"][0]["chosen"] == {"4": "blocks of 32x32", "400": "dense"}
    assert read["totals"]["4"] == [104.0, 8.0]
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 0
    assert "25.0% of its weights are kept, in the pattern: blocks of 32x32" in report.explain("up")
    assert "At 400 tokens: blocks of" in report.explain("up") or "At 400 tokens: dense" in report.explain(
        "up"
    )
    assert (
        "zeros in blocks of 8x8 and more make up 0% only; its rows fit no n:m: their fullest groups keep"
        in report.explain("scattered")
    )
    assert report.explain("head") == "head has no zeros and stays dense."
    with pytest.raises(KeyError, match="no linear layer 'neck'; there are up, down, scattered, head"):
        report.explain("neck")


def test_a_compressed_model_is_a_plain_one(clock: Clock, x: Tensor) -> None:
    model = Net().eval()
    clock.cost = lambda name, tokens: crossing("dense" if name != "dense" else "sparse", tokens)
    tw.prune.compress(model, x, tokens=[4, 400])
    assert isinstance(model.up, tw.nn.CrossoverLinear)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    assert all(isinstance(value, Tensor) for value in model.state_dict().values())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("crossover", [False, True])
@pytest.mark.parametrize("form", ["blocks", "2:4"])
def test_a_compressed_model_saves_and_loads_as_the_dense_one(
    clock: Clock, x: Tensor, form: str, crossover: bool
) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()
    if form == "blocks":
        blocks(model[0])
    else:
        tw.prune.prune(model, "2:4", include="0")
    if crossover:
        clock.cost = lambda name, tokens: crossing("dense" if name != "dense" else "sparse", tokens)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tw.prune.compress(model, x, tokens=[4, 400])
    kind = tw.nn.BlockSparseLinear if form == "blocks" else tw.nn.SemiStructuredLinear
    assert isinstance(model[0], tw.nn.CrossoverLinear if crossover else kind)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())

    fresh = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()
    fresh.load_state_dict(after)  # what knows nothing of sparse layers
    torch.testing.assert_close(fresh(x), model(x))
    halved = {name: value / 2 for name, value in after.items()}
    fresh.load_state_dict(halved)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for assign in (False, True):
            other.load_state_dict(halved, assign=assign)
            torch.testing.assert_close(other(x), fresh(x))
            assert all(torch.equal(other.state_dict()[name], value) for name, value in halved.items())
    with pytest.raises(RuntimeError, match=r"weight must have shape \(64, 64\), got \(64, 32\)"):
        model.load_state_dict(after | {"0.weight": torch.zeros(64, 32)})


def test_a_compressed_model_of_transformers_is_saved_and_loaded(clock: Clock, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=128, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config).eval(), torch.arange(3, 19)[None]
    tw.prune.prune(model, tw.prune.Block(32, 32), 0.9)
    expected = model(ids).logits
    assert tw.prune.compress(model, ids).compressed
    model.save_pretrained(tmp_path)
    loaded, report = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(loaded.eval()(ids).logits, expected)


def test_other_dtypes(clock: Clock, x: Tensor) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        model = Net().eval().to(dtype)
        report = tw.prune.compress(model, x.to(dtype))
        assert isinstance(model.up, tw.nn.BlockSparseLinear)
        assert model.up.values.dtype == dtype
        assert report.error < (0.05 if dtype == torch.bfloat16 else 1e-12)


def test_the_real_clock(x: Tensor) -> None:
    """What it finds depends on the machine; that it finds something does not."""
    model = Net().eval()
    expected = model(x)
    report = tw.prune.compress(model, x, tokens=[1, 16], seconds=0.005, progress=True)
    torch.testing.assert_close(model(x), expected)
    for layer in report.layers[:2]:
        assert all(ms > 0 for times in layer.times.values() for ms in times.values())
        assert all(layer.ms(tokens) <= layer.ms_dense(tokens) for tokens in layer.tokens)
