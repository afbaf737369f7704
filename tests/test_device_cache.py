"""Tables on the device: kept by content, made for one stream, and made in a CUDA graph from memory set aside before."""

import pytest
import torch
from conftest import HAS_GPU
from step_problems import RULES, Problem, scalar

from mixft.kernels import device_cache
from mixft.kernels.multi_tensor import counts_for, groups_of, programs_for, table_of
from mixft.kernels.recently_used import RecentlyUsed
from mixft.ops import grad_scalars

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def streams(monkeypatch):
    """A cache of its own, with the stream and the state of capturing set by hand; nothing touches a GPU."""
    state = {"stream": 1, "capturing": False}
    monkeypatch.setattr(device_cache, "_entries", RecentlyUsed(device_cache.LIMIT))
    monkeypatch.setattr(device_cache, "_kept_for_graphs", [])
    monkeypatch.setattr(device_cache, "_reserved", {})
    monkeypatch.setattr(device_cache, "_stream", lambda device: state["stream"])
    monkeypatch.setattr(device_cache, "capturing", lambda device: state["capturing"])
    monkeypatch.setattr(device_cache, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    return state


def make(key, device):
    return torch.empty(0)


def test_an_entry_is_kept_for_its_stream(streams):
    first = device_cache.cached(make, "a", GPU)
    assert device_cache.cached(make, "a", GPU) is first
    assert device_cache.cached(make, "b", GPU) is not first
    streams["stream"] = 2
    assert device_cache.cached(make, "a", GPU) is not first


def test_what_was_not_used_lately_goes_first(streams):
    """Tables that take half of the limit each, of which the third sends away the one that was not asked for again."""

    def half(key, device):
        return torch.empty(device_cache.LIMIT // 2, dtype=torch.uint8), "what is no tensor takes nothing"

    first, second = (device_cache.cached(half, key, GPU) for key in range(2))
    assert device_cache.cached(half, 0, GPU) is first
    device_cache.cached(half, 2, GPU)
    assert device_cache.cached(half, 0, GPU) is first
    assert device_cache.cached(half, 1, GPU) is not second


def test_small_tables_of_a_thousand_parameters_stay(streams):
    """As where each is stepped by itself; every one takes a block of the device's allocator, however small it is."""
    tables = [device_cache.cached(make, key, GPU) for key in range(1000)]
    assert all(device_cache.cached(make, key, GPU) is table for key, table in enumerate(tables))
    for key in range(1000, device_cache.LIMIT // device_cache.SMALLEST + 1):
        device_cache.cached(make, key, GPU)
    assert device_cache.cached(make, 1, GPU) is tables[1]
    assert device_cache.cached(make, 0, GPU) is not tables[0]


def test_one_that_is_larger_than_the_limit_is_kept_until_the_next():
    cache = RecentlyUsed(10)
    cache.add("large", 1, 11)
    assert cache.get("large") == 1
    cache.add("small", 2, 3)
    assert cache.items() == [("small", 2)]
    cache.add("small", 3, 8)
    cache.add("other", 4, 2)
    assert cache.items() == [("small", 3), ("other", 4)]


def test_a_capture_takes_what_another_stream_has_and_keeps_it(streams):
    first = device_cache.cached(make, "a", GPU)
    streams.update(stream=2, capturing=True)
    assert device_cache.cached(make, "a", GPU) is first
    streams["stream"] = 1
    assert device_cache.cached(make, "a", GPU) is first
    assert device_cache._kept_for_graphs == [first, first]


def test_what_a_capture_makes_is_not_for_others(streams):
    streams["capturing"] = True
    inside = device_cache.cached(make, "a", GPU)
    assert device_cache._kept_for_graphs == [inside]
    streams["capturing"] = False
    assert device_cache.cached(make, "a", GPU) is not inside


def test_the_source_of_a_table_made_in_a_capture_was_set_aside_and_stays(streams, monkeypatch):
    table = torch.arange(1000).reshape(10, 100)
    device_cache._set_aside(table.nbytes)
    reserved = device_cache._reserved["pinned"]
    streams["capturing"] = True
    monkeypatch.setattr(torch.Tensor, "to", lambda source, device, non_blocking: source)
    first = device_cache.to_device(table, GPU)
    second = device_cache.to_device(table.int() + 1, GPU)
    assert torch.equal(first, table)
    assert torch.equal(second, table.int() + 1)
    assert first.data_ptr() == reserved.data_ptr()
    assert second.data_ptr() == reserved.data_ptr() + table.nbytes
    assert len(device_cache._kept_for_graphs) == 2


def test_a_capture_without_a_step_before_is_refused(streams):
    streams["capturing"] = True
    with pytest.raises(RuntimeError, match="take one step like it before the capture"):
        device_cache.to_device(torch.zeros(3), GPU)


def test_memory_is_set_aside_for_eight_tables_of_the_size(streams):
    device_cache._set_aside(10)
    assert device_cache._reserved["pinned"].nbytes == device_cache.RESERVE
    device_cache._set_aside(device_cache.RESERVE)
    assert device_cache._reserved["pinned"].nbytes == 16 * device_cache.RESERVE


def test_replays_share_no_counters(streams, monkeypatch):
    outside = programs_for([3, 40000], 16384, CPU)
    assert outside.tensor.tolist() == [0, 1, 1, 1]
    assert outside.chunk.tolist() == [0, 0, 1, 2]
    assert programs_for([3, 40000], 16384, CPU).tickets is outside.tickets
    assert counts_for(3, CPU) is counts_for(3, CPU)
    monkeypatch.setattr("mixft.kernels.multi_tensor.capturing", lambda device: True)
    inside = programs_for([3, 40000], 16384, CPU)
    assert inside.tensor is outside.tensor
    assert inside.tickets is not outside.tickets
    assert counts_for(3, CPU) is not counts_for(3, CPU)


def test_chunks_beyond_2_to_the_31_elements():
    """The offset of a chunk is its number times the chunk's size at 64 bits; the number itself fits 32."""
    programs = programs_for([2**31 + 5, 7], 16384, CPU)
    assert programs.count == 2**17 + 2
    assert programs.chunk[2**17].item() == 2**17
    assert programs.chunk[2**17].item() * 16384 == 2**31
    assert programs.tensor[-1].item() == 1
    columns = (2**31 + 5, 7), (2**40, 2**41)
    (group,) = groups_of(((torch.float32, torch.float32),), columns, (1, 2))
    assert table_of(group, CPU).tolist() == [[2**31 + 5, 2**40], [7, 2**41]]


def test_an_address_that_16_does_not_divide_is_launched_apart():
    columns = (5, 6, 7), (64, 72, 96), range(3)
    groups = groups_of(((torch.float32,) * 3,), columns, (1, 2))
    assert [(group.is_aligned, group.columns) for group in groups] == [
        (True, ((5, 7), (64, 96), (0, 2))),
        (False, ((6,), (72,), (1,))),
    ]


def test_groups_of_a_thousand_tensors_each_alone_are_remembered():
    """A group is the key of its table, which is made again where the group is."""

    def group(number):
        return groups_of(((torch.float32,),), ((5,), (16 * number,)), (1, 2))

    groups = [group(number) for number in range(1, 1001)]
    assert all(group(number) is known for number, known in enumerate(groups, start=1))


if HAS_GPU:

    @pytest.mark.gpu
    @pytest.mark.parametrize("state", ["fp32", "codes"])
    def test_a_captured_step_replays_as_eager_steps(state):
        torch.manual_seed(0)
        shapes = [(1000,), (17,), (40000,)]
        eager = Problem(RULES["adamw"], GPU, shapes, torch.bfloat16, master="split", state=state)
        graphed = Problem(RULES["adamw"], GPU, shapes, torch.bfloat16, master="split", state=state)
        graphed.tensors = eager.snapshot()
        lr = scalar(0.01, GPU)

        def step(problem):
            found = grad_scalars(problem.tensors["grads"], max_norm=1.0)
            problem.run(lr=lr, clip_coef=found.clip_coef, found_inf=found.found_inf)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(graphed)
        torch.cuda.synchronize()
        # Gradients that have moved since: their table is made inside the capture.
        graphed.tensors["grads"] = [grad.clone() for grad in graphed.tensors["grads"]]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(graphed)
        for _ in range(3):
            graph.replay()
        for _ in range(4):
            step(eager)
        torch.cuda.synchronize()
        for name in ("params", "masters", "exp_avgs", "exp_avg_sqs", "steps"):
            assert all(map(torch.equal, graphed.tensors[name], eager.tensors[name])), name
