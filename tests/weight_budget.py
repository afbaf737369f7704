"""The weights of an optimizer beside those of torch's own, in FP64 and in FP32."""

import torch
from conftest import EPSILON, assert_within_budget
from optimizer_cases import copies, members, weight


def references(make, params):
    """What ``make`` makes of copies of ``params`` in FP64, and of copies in FP32."""
    return [make(copies(params, dtype)) for dtype in (torch.float64, torch.float32)]


def assert_same_weights(ours, exact, single):
    """Hold the FP32 weights of all parameters to the error of the FP32 reference."""
    weights = [weight(ours, param) for param in members(ours)]
    assert_within_budget(flat(weights), flat(members(exact)), flat(members(single)), EPSILON[torch.float32])


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
