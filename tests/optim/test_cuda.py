"""What only a GPU can show: streams, graphs, synchronization, allocation, several devices."""

import pytest
import torch
from optim_cases import CASES, OPTIMIZERS, assert_same_bits, make, parameters, run, set_grads, snapshot

import tilewright as tw

pytestmark = pytest.mark.cuda

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = [300, 4097, 70_000]


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd_nesterov"])
@pytest.mark.parametrize(
    "more", [{}, {"max_grad_norm": 0.5, "param_precision": "stochastic", "seed": 1}], ids=str
)
def test_a_captured_step_replays_as_eager_steps(name: str, more: dict) -> None:
    eager_params, params = (parameters(SIZES, torch.bfloat16, CUDA) for _ in range(2))
    lr = torch.tensor(1e-2, device=CUDA)
    eager, optimizer = make(CASES[name], eager_params, **more), make(CASES[name], params, **more)
    for each in (eager, optimizer):
        each.param_groups[0]["lr"] = lr
        run(each, 1)
    static_grads = [p.grad for p in params]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(1, 4):
        lr.fill_(1e-2 / step)
        set_grads(eager_params, step)
        eager.step()
        for static, p in zip(static_grads, eager_params, strict=True):
            static.copy_(p.grad)
        graph.replay()
    assert_same_bits(snapshot(optimizer), snapshot(eager))


def test_the_first_capture_may_be_the_first_use() -> None:
    """States made beforehand by loading a checkpoint; no kernel has run before the capture."""
    params = parameters([5000], torch.float32, CUDA)
    optimizer = tw.optim.SGD8bit(params, lr=0.1, momentum=0.9)
    empty = {"step": 0, "state1": torch.zeros(5000)}
    optimizer.load_state_dict({"state": {0: empty}, "param_groups": optimizer.state_dict()["param_groups"]})
    set_grads(params, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    assert int(optimizer.state[params[0]]["step"]) == 1


def test_a_graph_needs_states_that_exist() -> None:
    params = parameters([5000], torch.float32, CUDA)
    optimizer = tw.optim.AdamW8bit(params)
    set_grads(params, 0)
    with (
        pytest.raises(RuntimeError, match="take one step before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


def test_steps_between_replays_leave_the_graph_alone() -> None:
    """Two graphs and ordinary steps, each over other tensors, in turn: as if all were ordinary steps."""
    sizes = [300, 4097, 70_000, *[5 + i % 7 for i in range(300)]]  # more rows than one upload takes
    subsets = [slice(None), slice(0, 2), slice(1, None)]
    eager_params, params = (parameters(sizes, torch.float32, CUDA) for _ in range(2))
    eager, optimizer = (tw.optim.AdamW8bit(p, max_grad_norm=1.0) for p in (eager_params, params))
    for each in (eager, optimizer):
        run(each, 1)
    grads = [torch.zeros_like(p) for p in params]

    def choose(mine: list, subset: slice, step: int) -> None:
        set_grads(mine, step)
        kept = {id(p) for p in mine[subset]}
        for p, static in zip(mine, grads, strict=True):
            if mine is params:
                p.grad = static.copy_(p.grad)
            if id(p) not in kept:
                p.grad = None

    graphs = []
    for subset in subsets[:2]:
        choose(params, subset, 0)
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            optimizer.step()
    for step in range(1, 10):
        subset = subsets[step % 3]
        choose(eager_params, subset, step)
        choose(params, subset, step)
        eager.step()
        if step % 3 == 2:
            optimizer.step()
        else:
            graphs[step % 3].replay()
    assert_same_bits(snapshot(optimizer), snapshot(eager))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_waits_for_nothing_and_allocates_nothing(name: str) -> None:
    params = parameters(SIZES, torch.float32, CUDA)
    optimizer = OPTIMIZERS[name](params, max_grad_norm=1.0)
    run(optimizer, 1)
    for step in range(2):
        set_grads(params, step)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_a_step_runs_on_the_current_stream() -> None:
    """bitsandbytes launches on the default stream: a gradient made on another one may come too late."""
    stream = torch.cuda.Stream()
    params = parameters([1 << 22], torch.float32, CUDA)
    expected = parameters([1 << 22], torch.float32, CUDA)
    optimizer, plain = (tw.optim.SGD8bit(p, lr=0.1, momentum=0.9) for p in (params, expected))
    expected[0].grad = torch.ones_like(expected[0])
    plain.step()
    params[0].grad = torch.zeros_like(params[0])
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        params[0].grad.fill_(1.0)
        optimizer.step()
    torch.cuda.synchronize()
    assert torch.equal(params[0], expected[0])


def test_parameters_on_several_devices() -> None:
    on_cpu, on_gpu = parameters([5000], torch.float32, CPU), parameters([5000], torch.float32, CUDA)
    optimizer = tw.optim.AdamW8bit([*on_cpu, *on_gpu])
    run(optimizer, 1)
    assert optimizer.state[on_gpu[0]]["state1"].is_cuda
    assert not optimizer.state[on_cpu[0]]["state1"].is_cuda
    clipped = tw.optim.AdamW8bit([*on_cpu, *on_gpu], max_grad_norm=1.0)
    before = snapshot(clipped)
    with pytest.raises(NotImplementedError, match="lie on 2 devices"):
        clipped.step()
    assert_same_bits(snapshot(clipped), before)


def test_a_model_moved_to_the_gpu_after_its_first_step() -> None:
    model = torch.nn.Linear(80, 80)
    optimizer = tw.optim.AdamW8bit(model.parameters())
    for device in (CPU, CUDA, CPU):
        model.to(device)
        model(torch.ones(2, 80, device=device)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert int(optimizer.state[model.weight]["step"]) == 3


def test_a_state_left_on_the_cpu_is_moved() -> None:
    params = parameters([5000], torch.float32, CUDA)
    optimizer = tw.optim.AdamW8bit(params)
    run(optimizer, 1)
    state = optimizer.state[params[0]]
    optimizer.state[params[0]] = {key: value.cpu() for key, value in state.items()}
    run(optimizer, 1)
    assert all(value.is_cuda for value in optimizer.state[params[0]].values())


def test_checkpoints_cross_devices() -> None:
    params = parameters([5000], torch.float32, CUDA)
    optimizer = tw.optim.AdamW8bit(params)
    run(optimizer, 2)
    on_cpu = parameters([5000], torch.float32, CPU)
    other = tw.optim.AdamW8bit(on_cpu)
    other.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(other.state_dict())
    on_cpu[0].data.copy_(params[0])
    assert_same_bits([t.cpu() for t in snapshot(optimizer)], snapshot(other))


@pytest.mark.nightly
def test_more_than_two_to_the_31_elements() -> None:
    numel = 2**31 + 300
    p = torch.nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16, device=CUDA))
    p.grad = torch.zeros_like(p)
    p.grad[-300:] = 1.0
    tw.optim.SGD8bit([p], lr=1.0, momentum=0.9).step()
    assert bool((p[-300:] == -1.0).all())
    assert float(p.sum(dtype=torch.float64)) == -300.0
