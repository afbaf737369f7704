"""``mixft.optim`` on a GPU: a step does not wait for it, and one that was captured replays bit for bit."""

import pytest
import torch
from conftest import HAS_GPU
from optimizer_cases import (
    STORAGES,
    copies,
    every_optimizer,
    every_storage,
    give_gradients,
    members,
    mixed_parameters,
    snapshot,
)

if HAS_GPU:

    @pytest.mark.gpu
    @every_storage
    @every_optimizer
    def test_a_step_never_waits_for_the_gpu(case, storage):
        params = mixed_parameters("cuda")
        optimizer = case.ours(params, **case.options, **storage, max_grad_norm=1.0)
        scaler = torch.amp.GradScaler("cuda")
        scaler.scale(torch.ones((), device="cuda"))
        give_gradients(params)
        optimizer.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for lr in (0.1, 0.01):
                optimizer.param_groups[0]["lr"] = lr
                give_gradients(params)
                scaler.step(optimizer)
                scaler.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert optimizer.last_found_inf.item() == 0

    @pytest.mark.gpu
    @pytest.mark.parametrize("storage", ["fp32", "split", "split-int8-state"])
    @every_optimizer
    def test_a_captured_step_replays_as_eager_steps(case, storage):
        graphed = case.ours(mixed_parameters("cuda"), **case.options, **STORAGES[storage], max_grad_norm=1.0)
        eager = case.ours(copies(members(graphed)), **case.options, **STORAGES[storage], max_grad_norm=1.0)
        give_gradients(members(graphed))
        for param, twin in zip(members(graphed), members(eager), strict=True):
            twin.grad = param.grad.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            graphed.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphed.step()
        for _ in range(3):
            graph.replay()
        for _ in range(4):
            eager.step()
        torch.cuda.synchronize()
        assert snapshot(graphed) == snapshot(eager)
