"""``mixft.amp.clip_grad_norm_`` and ``grad_norm`` beside torch's, and against FP64."""

import pytest
import torch
from conftest import EPSILON, assert_rounded_once, assert_within_budget

from mixft.amp import clip_grad_norm_, grad_norm

INF, NAN = float("inf"), float("nan")
NORMS = [2, 2.0, "inf", INF, -INF, 1.0, 0.0, 3.0, 0.5, -1.0]


def with_gradients(device, dtypes, scale=1.0):
    """Parameters of many layouts, one without a gradient."""
    values = [torch.randn(17), torch.randn(5, 3).t(), torch.randn(0, 4), torch.randn(40, 6)[:, ::2], torch.randn(())]
    values += [torch.randn(1001)[1:]]
    params = []
    for number, value in enumerate(values):
        param = torch.nn.Parameter(torch.zeros_like(value).to(device, dtypes[number % len(dtypes)]))
        param.grad = (scale * value).to(param)
        params.append(param)
    return [*params, torch.nn.Parameter(torch.zeros(3, device=device))]


def twins(params, dtype=None):
    copies = []
    for param in params:
        copy = torch.nn.Parameter(param.detach().to(dtype or param.dtype, copy=True))
        copy.grad = None if param.grad is None else param.grad.to(dtype or param.dtype, copy=True)
        copies.append(copy)
    return copies


def filled(params):
    """Without the empty gradient, which has no largest or smallest element."""
    return [param for param in params if param.numel()]


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize(
    "dtypes",
    [[torch.float32], [torch.float16], [torch.bfloat16, torch.float16, torch.float32], [torch.float32, torch.float64]],
)
def test_norm_and_gradients_are_torch_s(device, dtypes, norm_type):
    params = filled(with_gradients(device, dtypes))
    exact, in_fp32 = twins(params, torch.float64), twins(params, torch.float32)
    wanted, own, stock = (
        torch.nn.utils.clip_grad_norm_(copies, 0.7, norm_type) for copies in (exact, in_fp32, twins(params))
    )
    before = [param.grad.clone() for param in params if param.grad is not None]
    assert torch.equal(grad_norm(params, norm_type), grad_norm(params, norm_type))
    assert all(map(torch.equal, before, [param.grad for param in params if param.grad is not None]))
    norm = clip_grad_norm_(params, 0.7, norm_type)
    assert norm.shape == ()
    assert norm.dtype == (stock.dtype if torch.finfo(stock.dtype).bits > 16 else torch.float32)
    assert_within_budget(norm, wanted, own, EPSILON[torch.float32])
    for param, twin, like in zip(params, exact, in_fp32, strict=True):
        if twin.grad is None:
            assert param.grad is None
            continue
        assert_rounded_once(param.grad, twin.grad, like.grad)


def test_a_small_norm_changes_nothing(device):
    params = with_gradients(device, [torch.float16, torch.float32])
    before = [param.grad.clone() for param in params[:-1]]
    norm = clip_grad_norm_(params, 1e4)
    assert norm < 1e4
    assert all(torch.equal(param.grad, grad) for param, grad in zip(params, before, strict=False))


def test_fp16_norms_beyond_fp16(device):
    params = with_gradients(device, [torch.float16], scale=1e4)
    flat = torch.cat([param.grad.flatten() for param in params[:-1]])
    exact = flat.double().norm()
    assert exact > 65504
    assert_within_budget(clip_grad_norm_(params, 1.0), exact, flat.float().norm(), EPSILON[torch.float32])
    assert grad_norm(params).item() == pytest.approx(1.0, rel=EPSILON[torch.float16])


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_nonfinite_gradients(device, bad, norm_type):
    params = with_gradients(device, [torch.float32])[:2]
    params[0].grad[3] = bad
    theirs = twins(params)
    before = [param.grad.clone() for param in params]
    for call in (
        lambda: clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True),
        lambda: grad_norm(params, norm_type, error_if_nonfinite=True),
    ):
        with pytest.raises(RuntimeError, match=r"of the gradients is (nan|inf), so they cannot be clipped"):
            call()
    assert all(torch.equal(param.grad.nan_to_num(), grad.nan_to_num()) for param, grad in zip(params, before, strict=1))
    ours, stock = clip_grad_norm_(params, 1.0, norm_type), torch.nn.utils.clip_grad_norm_(theirs, 1.0, norm_type)
    torch.testing.assert_close(ours, stock, rtol=0, atol=0, equal_nan=True)
    for param, twin in zip(params, theirs, strict=True):
        torch.testing.assert_close(param.grad, twin.grad, rtol=0, atol=0, equal_nan=True)


def test_forms_of_the_argument():
    params = with_gradients("cpu", [torch.float32])
    exact, own = (torch.nn.utils.clip_grad_norm_(twins(params, kind), 1.0) for kind in (torch.float64, torch.float32))
    first = params[0].grad.clone()
    assert_within_budget(grad_norm(iter(params)), exact, own, EPSILON[torch.float32])
    assert_within_budget(grad_norm(params[0]), first.double().norm(), first.norm(), EPSILON[torch.float32])
    found = clip_grad_norm_((param for param in params), 1.0, foreach=True)
    assert_within_budget(found, exact, own, EPSILON[torch.float32])
    assert torch.equal(clip_grad_norm_([], 1.0), torch.tensor(0.0))
    with pytest.warns(UserWarning, match="none of the 1 parameters has a gradient"):
        assert torch.equal(clip_grad_norm_([torch.nn.Parameter(torch.ones(2))], 1.0), torch.tensor(0.0))
    with pytest.warns(UserWarning, match="empty generator"):
        clip_grad_norm_((param for param in ()), 1.0)
    with pytest.raises(ValueError, match="foreach is False"):
        clip_grad_norm_(params, 1.0, foreach=False)


def test_sparse_gradients_are_refused_as_torch_refuses_them():
    table = torch.nn.Embedding(6, 2, sparse=True)
    table(torch.tensor([1, 4])).sum().backward()
    with pytest.raises(TypeError, match=r"of shape \(6, 2\) is a torch\.sparse_coo tensor"):
        clip_grad_norm_(table.weight, 1.0)


def test_nothing_is_read_on_the_host(monkeypatch):
    params = with_gradients("cpu", [torch.float32])[:2]
    ones = torch.ones(())
    monkeypatch.setattr("mixft.amp.clip_grad.grad_scalars_unchecked", lambda *_: type("Found", (), {"norm": ones}))
    monkeypatch.setattr("mixft.amp.clip_grad.unscale_", lambda *args: None)

    def refuse(tensor):
        raise AssertionError("a value was read on the host")

    for reader in ("item", "__bool__", "__float__", "__int__", "tolist"):
        monkeypatch.setattr(torch.Tensor, reader, refuse)
    clip_grad_norm_(params, 1.0)
    clip_grad_norm_(params, 1.0, INF)
