"""Attention with dropout on a CPU: the function against FP64, and in a model of transformers."""

import pytest
import torch
import transformers
from conftest import assert_within_budget

from mixft.cli.attention import use_dropout_attention
from mixft.nn import Dropout
from mixft.nn.attention import dropout_attention


def exact(query, key, value, mask, p, scale):
    scores = query.double() @ key.double().transpose(2, 3) * scale
    weights = (scores if mask is None else scores + mask.double()).softmax(-1)
    kept = Dropout(p)(torch.ones(weights.shape))
    return (weights * kept) @ value.double()


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_against_fp64_with_the_same_weights_dropped(p, masked):
    query = torch.randn(2, 7, 3, 8).transpose(1, 2).requires_grad_()
    key = torch.randn(2, 3, 5, 8, requires_grad=True)
    value = torch.randn(2, 3, 5, 6, requires_grad=True)
    mask = torch.zeros(2, 1, 1, 5).masked_fill(torch.tensor([[0, 0, 0, 0, 1]]).bool(), -1e9) if masked else None
    grad = torch.randn(2, 3, 7, 6)
    found, wanted = [], []
    for function, results in ((dropout_attention, found), (exact, wanted)):
        torch.manual_seed(3)
        out = function(query, key, value, mask, p, 0.25)
        results += [out, *torch.autograd.grad(out, (query, key, value), grad.to(out.dtype))]
    for got, want in zip(found, wanted, strict=True):
        assert_within_budget(got, want.double(), want.float(), 2**-20)
    assert not masked or not found[3][:, :, 4].any()


def bert(dropout):
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        attention_probs_dropout_prob=dropout,
        hidden_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return transformers.BertForSequenceClassification(config)


TOKENS = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}


def test_a_model_computes_the_same_without_dropout_and_saves_no_trace(tmp_path):
    model = bert(0.5)
    expected = model.eval()(**TOKENS).logits
    use_dropout_attention(model)
    assert model.config._attn_implementation == "mixft"
    torch.testing.assert_close(model(**TOKENS).logits, expected)
    model.save_pretrained(tmp_path)
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    torch.testing.assert_close(again.eval()(**TOKENS).logits, expected)


def test_a_model_trains_with_its_weights_dropped(monkeypatch):
    model = bert(0.5)
    use_dropout_attention(model.train())
    calls = []
    monkeypatch.setattr(
        "mixft.cli.attention.dropout_attention", lambda *args: calls.append(args[4]) or dropout_attention(*args)
    )
    first, second = (model(**TOKENS).logits for _ in range(2))
    assert calls == [0.5] * 4
    assert not torch.equal(first, second)
    dropped = torch.stack([model(**TOKENS).logits for _ in range(200)]).mean(0)
    torch.testing.assert_close(dropped, model.eval()(**TOKENS).logits, rtol=0.1, atol=0.05)


def test_another_attention_of_a_model_is_left():
    model = bert(0.5)
    model.set_attn_implementation("eager")
    use_dropout_attention(model)
    assert model.config._attn_implementation == "eager"
