"""A whole step as one graph: captured once, it replays as steps that Python takes, bit for bit, overflows included."""

import gc

import pytest
import torch

pytest.importorskip("triton")

from conftest import HAS_GPU
from optimizer_cases import CASES, STORAGES, bits, copies, every_optimizer, members, parameters, snapshot

import mixft.optim
from mixft.amp import GradAccumulator, LossScaler, clip_grad_norm_
from mixft.kernels import device_cache, multi_tensor
from mixft.kernels.recently_used import RecentlyUsed

if not HAS_GPU:
    from recorded_graph import Graph

SHAPES = [(17,), (5, 7), ()]
F16, BF16 = torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


class Training:
    """An optimizer with its scaler, and the micro-batches' gradients that one step takes."""

    def __init__(self, make, params, micro_batches=1):
        self.params = params
        self.optimizer = make(params)
        self.scaler = LossScaler(init_scale=8.0, growth_interval=2, hysteresis=2, device="cpu")
        self.accumulator = GradAccumulator(self.optimizer, self.scaler) if micro_batches > 1 else None
        self.batches = [[torch.zeros_like(param) for param in params] for _ in range(micro_batches)]

    def give(self, values):
        for batch, given in zip(self.batches, values, strict=True):
            for grad, value in zip(batch, given, strict=True):
                grad.copy_(value)

    def step(self):
        for batch in self.batches:
            for param, grad in zip(self.params, batch, strict=True):
                param.grad = self.scaler.scale(grad).to(param.dtype)
            if self.accumulator is not None:
                self.accumulator.accumulate()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def outcome(self):
        norm = self.optimizer.last_grad_norm
        last = [None if norm is None else bits(norm), self.optimizer.last_found_inf.item()]
        return snapshot(self.optimizer), self.scaler.state_dict(), last


def gradients(training, bad=None):
    values = [[torch.randn_like(grad) for grad in batch] for batch in training.batches]
    if bad is not None:
        values[-1][1][2, 3] = bad
    return values


def replays_as_eager_steps(make, params, micro_batches=1, between=lambda *_: None, training=Training):
    graphed, eager = training(make, params, micro_batches), training(make, copies(params), micro_batches)
    first = gradients(graphed)
    for each in (graphed, eager):
        each.give(first)
        each.step()
    before = graphed.outcome()
    with Graph().capture() as graph:
        graphed.step()
    # Full by now, in a longer run.
    device_cache._entries = RecentlyUsed(device_cache.LIMIT)
    assert graphed.outcome()[:2] == before[:2]
    for number, bad in enumerate([None, None, float("inf"), float("nan"), None]):
        values = gradients(graphed, bad)
        for each in (graphed, eager):
            each.give(values)
            between(each, number)
        graph.replay()
        eager.step()
        assert graphed.outcome() == eager.outcome(), number
    assert eager.scaler.overflow_steps == 2
    assert eager.scaler.state_dict()["scale"] == 8.0
    return graph


if not HAS_GPU:

    @pytest.mark.parametrize(
        ("case", "storage"),
        [(CASES[0], "fp32"), (CASES[0], "stochastic"), *((case, "split-int8-state") for case in CASES)],
        ids=str,
    )
    def test_a_step_with_a_scaler(case, storage):
        params = parameters("cpu", BF16 if "split" in storage else F16, SHAPES)
        options = case.options | STORAGES[storage] | {"max_grad_norm": 1.0 if "int8" in storage else None}
        replays_as_eager_steps(lambda params: case.ours(params, **options), params)

    def test_scaler_accumulator_clipping_and_optimizer_as_one_graph():
        """The rate is a tensor, which changes between replays."""

        def make(params):
            groups = [{"params": params[:2]}, {"params": params[2:], "lr": torch.tensor(0.1)}]
            return mixft.optim.AdamW(groups, master_weights="split", state_dtype=torch.int8, max_grad_norm=1.0)

        def schedule(training, number):
            training.optimizer.param_groups[1]["lr"].fill_(0.1 / (number + 1))

        params = parameters("cpu", F16, SHAPES)
        graph = replays_as_eager_steps(make, params, micro_batches=3, between=schedule)
        assert graph.kernels == ["accumulate_kernel"] * 3 + ["grad_scalars_kernel"] + ["optimizer_step_kernel"] * 2

    @pytest.mark.filterwarnings("ignore:invalid value encountered")
    def test_unscaling_and_clipping_by_hand_and_two_optimizers_of_one_scaler():
        params = parameters("cpu", F16, SHAPES)

        class Two(Training):
            def __init__(self, make, params, micro_batches):
                super().__init__(make, params[:2], micro_batches)
                self.params = params
                self.second = mixft.optim.Lion(params[2:], lr=0.1)
                self.batches = [[torch.zeros_like(param) for param in params]]

            def step(self):
                for param, grad in zip(self.params, self.batches[0], strict=True):
                    param.grad = self.scaler.scale(grad).to(param.dtype)
                self.scaler.unscale_(self.optimizer)
                self.norm = clip_grad_norm_(self.optimizer.param_groups[0]["params"], 0.5)
                self.scaler.step(self.optimizer)
                self.scaler.step(self.second)
                self.scaler.update()

            def outcome(self):
                return *super().outcome(), snapshot(self.second), bits(self.norm)

        graph = replays_as_eager_steps(mixft.optim.SGD, params, training=Two)
        assert graph.kernels == [
            *["unscale_kernel", "grad_scalars_kernel", "unscale_kernel", "optimizer_step_kernel"],
            *["grad_scalars_kernel", "optimizer_step_kernel"],
        ]

    def test_gradients_that_a_backward_sums_itself():
        """In ``main_grad``, as ``mixft.nn.Linear(fuse_wgrad_accumulation=True)`` does; the sum holds the scale."""

        class Fused(Training):
            def __init__(self, make, params, micro_batches):
                for param in params:
                    param.main_grad = torch.zeros_like(param, dtype=torch.float32, requires_grad=False)
                super().__init__(make, params, micro_batches)

            def step(self):
                for batch in self.batches:
                    for param, grad in zip(self.params, batch, strict=True):
                        param.main_grad.add_(self.scaler.scale(grad.float()))
                    self.accumulator.accumulate()
                self.scaler.step(self.optimizer)
                self.scaler.update()

        params = parameters("cpu", F16, SHAPES)
        graph = replays_as_eager_steps(mixft.optim.AdamW, params, micro_batches=2, training=Fused)
        assert graph.kernels == ["unscale_kernel", "optimizer_step_kernel"]

    def test_gradients_that_have_moved_since_the_last_step():
        """Their table is made inside the capture, and is the graph's; so are copies of those that are strided."""
        params = parameters("cpu", F16, SHAPES)
        optimizer, eager = mixft.optim.AdamW(params), mixft.optim.AdamW(copies(params))
        for each in (optimizer, eager):
            for param in members(each):
                param.grad = torch.ones_like(param)
            each.step()
        for param, twin in zip(params, members(eager), strict=True):
            param.grad = twin.grad = (
                torch.empty(param.shape[::-1], dtype=F16).mT if param.dim() == 2 else torch.empty_like(param.data)
            )
        graph = Graph()
        with graph.capture():
            optimizer.step()
        gc.collect()
        for _ in range(2):
            for param in params:
                param.grad.copy_(torch.randn(param.shape))
            graph.replay()
            eager.step()
            assert snapshot(optimizer) == snapshot(eager)

    @every_optimizer
    def test_gradients_that_stay_where_they_are_take_no_copy_to_the_device(case, monkeypatch):
        tables = []
        monkeypatch.setattr(multi_tensor, "to_device", lambda host, device: tables.append(host) or host)
        monkeypatch.setattr(device_cache, "_entries", RecentlyUsed(device_cache.LIMIT))
        params = parameters("cpu", F16, SHAPES)
        optimizer = case.ours(params, **case.options, max_grad_norm=1.0)
        scaler = LossScaler(device="cpu")
        accumulator = GradAccumulator(optimizer, scaler)
        for param in params:
            param.grad = torch.zeros_like(param)
        made = []
        for _ in range(3):
            for _ in range(2):
                scaler.scale(torch.ones(()))
                for param in params:
                    param.grad.add_(1.0)
                accumulator.accumulate(set_to_none=False)
            scaler.step(optimizer)
            scaler.update()
            made.append(len(tables))
        assert 0 < made[0] == made[1] == made[2]

    def test_steps_between_the_capture_and_its_replays_have_their_own_rate():
        param = torch.nn.Parameter(torch.zeros(3))
        optimizer = mixft.optim.SGD([param], lr=1.0)
        param.grad = torch.full((3,), -1.0)
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 10.0
        graph = Graph()
        with graph.capture():
            optimizer.step()
        optimizer.step()
        assert param.tolist() == [11.0] * 3
        optimizer.param_groups[0]["lr"] = 100.0
        optimizer.step()
        graph.replay()
        optimizer.step()
        assert param.tolist() == [221.0] * 3

    def test_what_a_graph_cannot_hold_is_seen():
        value, graph = torch.ones(()), Graph()
        with graph.capture():
            doubled = value * 2
            value.add_(1)
        assert value.item() == 1
        graph.replay()
        assert (value.item(), doubled.item()) == (2, 2)
        with graph.capture(), pytest.raises(AssertionError, match="_local_scalar_dense waits"):
            value.item()
        del value
        with pytest.raises(AssertionError, match="was freed after the capture"):
            graph.replay()
