"""What is said of wrong arguments; the ops under the masks; torch.compile."""

import pytest
import torch

from tilewright.prune import Block, NOfM, global_masks, mask, parse_pattern, scores

ops = torch.ops.tilewright
W = torch.linspace(-1, 1, 12 * 20).view(12, 20)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        (("w", "2:4"), {}, TypeError, "weight must be a tensor, got str"),
        ((W.int(), "2:4"), {}, TypeError, "weight must have dtype .*, got int32"),
        ((W[0], "element", 0.5), {}, ValueError, r"weight must have shape \(out, in, ...\), got \(20,\)"),
        ((W, "3:8"), {}, ValueError, r"weight: pattern '3:8' .* multiple of 8, got 20 columns"),
        ((W, "4:4"), {}, ValueError, "pattern '4:4': needs 1 <= n < m <= 32, got n = 4, m = 4"),
        ((W, "0:4"), {}, ValueError, "got n = 0, m = 4"),
        ((W, "2:64"), {}, ValueError, "got n = 2, m = 64"),
        ((W, "rows", 0.5), {}, ValueError, "pattern must be 'n:m' .*, got 'rows'"),
        ((W, (4, 4), 0.5), {}, TypeError, r"pattern must be 'n:m' .*, got \(4, 4\)"),
        ((W, "2:4", 0.75), {}, ValueError, "pattern '2:4' removes 0.5, got 0.75: leave it out"),
        ((W, "2:4"), {"scope": "row"}, ValueError, "scope: pattern '2:4' compares within its groups"),
        ((W, "element"), {}, ValueError, "sparsity is needed for pattern 'element'"),
        ((W, "element", 1.0), {}, ValueError, r"in \[0, 1\), got 1.0"),
        ((W, "element", -0.1), {}, ValueError, r"in \[0, 1\), got -0.1"),
        ((W, "element", float("nan")), {}, ValueError, r"in \[0, 1\), got nan"),
        ((W, "element", "0.5"), {}, TypeError, r"sparsity must be a number in \[0, 1\), got '0.5'"),
        ((W, "element", True), {}, TypeError, "sparsity must be a number"),
        ((W, "element", 0.5, "l1"), {}, ValueError, "criterion must be .* or 'random', got 'l1'"),
        ((W, "element", 0.5, "sparsegpt"), {}, ValueError, "call tilewright.prune.sparsegpt"),
        ((W, "element", 0.5, "wanda"), {}, ValueError, "activation_norm is needed by criterion 'wanda'"),
        ((W, "element", 0.5, "taylor"), {}, ValueError, "gradient is needed by criterion 'taylor'"),
        ((W, "element", 0.5, "magnitude", W[0]), {}, ValueError, "activation_norm is for criterion 'wanda'"),
        ((W, "element", 0.5, "wanda", W[:, 0]), {}, ValueError, "activation_norm must have shape"),
        ((W, "element", 0.5, "wanda", W[0] / 0), {}, ValueError, "activation_norm: holds"),
        ((W, "element", 0.5, "wanda", W[0] - 2), {}, ValueError, "activation_norm: holds 20 negative"),
        ((W, "element", 0.5, "taylor"), {"gradient": W.T}, ValueError, "gradient must have shape"),
        ((W, "element", 0.5), {"seed": 1}, ValueError, "seed is for criterion 'random'"),
        ((W, "element", 0.5, "random"), {"seed": -1}, ValueError, "seed must be an int .*, got -1"),
        ((W, "element", 0.5, "random"), {"seed": 0.5}, TypeError, "seed must be an int"),
        ((W, "element", 0.5, "lp"), {"p": 0}, ValueError, r"p must be a number in \(0, inf\], got 0"),
        ((W, "element", 0.5, "lp"), {"p": "2"}, TypeError, r"p must be a number in \(0, inf\], got '2'"),
        ((W, "element", 0.5), {"scope": "global"}, ValueError, "scope must be 'layer', .*, got 'global'"),
        ((W, "row", 0.5), {"scope": "row"}, ValueError, "with pattern 'row' each row of weight is one unit"),
        ((W.to_sparse(), "2:4"), {}, ValueError, "weight must be a dense tensor"),
    ],
)  # fmt: skip
def test_bad_input(arguments, options, kind, message) -> None:
    with pytest.raises(kind, match=message):
        mask(*arguments, **options)


@pytest.mark.parametrize(
    ("rows", "columns", "kind"), [(0, 4, ValueError), (4, -1, ValueError), (2.0, 4, TypeError)]
)
def test_bad_blocks(rows: object, columns: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"Block: (rows|columns), unless it is None, must be a positive int"):
        Block(rows, columns)


@pytest.mark.parametrize(
    "pattern", ["2:4", "3:5", "element", "row", "column", Block(4, 4), Block(1, 4)], ids=str
)
def test_non_finite_weights_are_named(backend, pattern: str | Block) -> None:
    sparsity = None if ":" in str(pattern) else 0.5
    for bad in (float("nan"), float("inf"), float("-inf")):
        w = W.to(backend.device).clone()
        w[3, 7] = w[5, 2] = w[11, 19] = bad
        message = r"layers.0.fc: holds 3 non-finite values, first at \(3, 7\)"
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(ValueError, match=message):
                mask(w.to(dtype), pattern, sparsity, name="layers.0.fc")
        if sparsity is None:
            continue
        for p in (1, 2, 3, float("inf")):
            with pytest.raises(ValueError, match=message):
                mask(w, pattern, sparsity, "lp", p=p, name="layers.0.fc")
        with pytest.raises(ValueError, match=r"weights\[1\]: holds 3 non-finite"):
            global_masks([W.to(backend.device), w], pattern, sparsity)
        with pytest.raises(ValueError, match=r"gradient of fc: holds 3 non-finite"):
            mask(W.to(backend.device), pattern, sparsity, "taylor", gradient=w, name="fc")


def test_scores_that_overflow_are_named(backend) -> None:
    w = (W * 1e30).to(backend.device)
    with pytest.raises(ValueError, match="weight: the scores overflow float32"):
        mask(w, Block(4, 4), 0.5, "lp")
    assert mask(w, Block(4, 4), 0.5).any()


def test_bad_global_input() -> None:
    cases = [
        (([W], "2:4", 0.5), {}, ValueError, "'2:4' keeps as many in every group"),
        ((W, "element", 0.5), {}, TypeError, "weights must be a list of tensors or a dictionary, got Tensor"),
        (([W, W.double()], "element", 0.5), {}, TypeError, r"weights\[1\] has dtype torch.float64"),
        (
            ([W, W], "element", 0.5, "wanda", [W[0]]),
            {},
            ValueError,
            "activation_norms: got 1 tensors for 2 weights",
        ),
        (({"a": W}, "element", 0.5, "wanda", {"b": W[0]}), {}, ValueError, "activation_norms: nothing for a"),
        (({"a": W}, "element", 0.5, "wanda", [W[0]]), {}, TypeError, "activation_norms must be a dictionary"),
        (
            ({"a": W}, "element", 0.5, "wanda", {"a": W[:, 0]}),
            {},
            ValueError,
            "activation_norm of a must have",
        ),
        (([W, W], "element", None), {}, ValueError, "sparsity is needed"),
    ]
    for arguments, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            global_masks(*arguments, **options)


def test_float64_has_no_cuda_kernel() -> None:
    import tilewright.testing

    with (
        tilewright.testing.emulated(),
        pytest.raises(NotImplementedError, match="float64 has no CUDA kernel"),
    ):
        mask(W.double(), "2:4")


def test_patterns() -> None:
    assert parse_pattern("2:4") == NOfM(2, 4)
    assert parse_pattern(Block(3, 4)) == Block(3, 4)
    assert [str(parse_pattern(x)) for x in ("1:8", "row", "column", "element", Block(2, None))] == [
        "1:8", "row", "column", "element", "block 2xall"]  # fmt: skip
    assert parse_pattern("2:4").fits((5, 8))
    assert not parse_pattern("2:4").fits((5, 6))
    assert parse_pattern("2:4").fits((5, 2, 3, 2))
    assert Block(4, 4).fits((3, 3))
    assert not Block(4, 4).fits((3,))
    assert Block(4, None).sizes((10, 6)) == (4, 6)
    assert Block(4, 4).units((10, 6)) == (3, 2)


def test_masks_that_break_their_pattern() -> None:
    kept = mask(W, "2:4")
    parse_pattern("2:4").check_mask(kept)
    kept[0, :4] = True
    with pytest.raises(ValueError, match="fc: 1 of 60 groups keep more than 2:4"):
        parse_pattern("2:4").check_mask(kept, "fc")
    block = Block(5, 6)
    kept = mask(W, block, 0.5)
    block.check_mask(kept)
    kept[11, 19] = ~kept[11, 19]
    kept[0, 0] = ~kept[0, 0]
    with pytest.raises(ValueError, match="fc: 2 of 12 units of pattern 'block 5x6' are kept in part"):
        block.check_mask(kept, "fc")


def samples(device: torch.device) -> dict[str, tuple]:
    w = W.to(device)
    norm = w[0].abs()
    return {
        "prune_scores": (w, None, norm, "sum", 1.0, 4, -1, 0, 0),
        "prune_n_of_m": (w, None, norm, "sum", 2, 4, 0, "weight"),
        "prune_best": ([w, w], [w, w], [], "products", 1.0, 4, 4, 20, False, 0, ["a", "b"]),
    }


@pytest.mark.parametrize("name", ["prune_scores", "prune_n_of_m", "prune_best"])
def test_opcheck(backend, name: str) -> None:
    torch.library.opcheck(getattr(ops, name).default, samples(backend.device)[name])


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    norm = torch.rand(20)

    def pruned(w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        halves = global_masks([w, w * 2], "element", 0.5)
        return (
            w * mask(w, "2:4", criterion="wanda", activation_norm=norm),
            w * mask(w, Block(4, 4), 0.5, "lp"),
            w * mask(w, "element", 0.5, scope="row"),
            w * mask(w, "row", 0.5, "random", seed=1),
            scores(w, pattern="column"),
            w * halves[0],
        )

    compiled = torch.compile(pruned, fullgraph=True, backend="aot_eager")
    w = W.clone().requires_grad_()
    for actual, expected in zip(compiled(w), pruned(w), strict=True):
        assert torch.equal(actual, expected)
    compiled(w)[0].sum().backward()
    assert torch.equal(w.grad, mask(w, "2:4", criterion="wanda", activation_norm=norm).float())
    with pytest.raises(ValueError, match="holds 240 non-finite values"):
        compiled(W * float("nan"))
