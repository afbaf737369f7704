"""PrecisionPolicy: which module gets which dtype, the casts at the borders, and that all of it can be undone."""

import copy
import io
import pickle
from collections import OrderedDict, namedtuple

import pytest
import torch
from conftest import assert_within_budget
from optimizer_cases import bits
from precision_runs import BF16, F16, F32, TOKENS, Net, cpu_routines, dtypes, train  # noqa: F401
from torch import nn
from torch.utils.checkpoint import checkpoint

import mixft
from mixft.optim import AdamW
from mixft.precision.border import border_of, cast

RULES = {"*": "fp16", "*LayerNorm*": "fp32", "classifier": "fp32"}


def test_names_and_classes_match_and_the_last_rule_wins():
    model = Net()
    report = mixft.PrecisionPolicy(RULES).apply(model)
    rows = {row.name: (row.kind, row.dtype, row.pattern, row.parameters) for row in report.modules}
    assert rows == {
        "embed": ("Embedding", F16, "*", 60),
        "block.dense": ("Linear", F16, "*", 42),
        "block.LayerNorm": ("LayerNorm", F32, "*LayerNorm*", 12),
        "norm1": ("LayerNorm", F32, "*LayerNorm*", 12),
        "classifier": ("Linear", F32, "classifier", 21),
    }
    assert {name: param.dtype for name, param in model.named_parameters()} == {
        f"{name}.{key}": dtype
        for name, (_, dtype, _, _) in rows.items()
        for key in (("weight",) if name == "embed" else ("weight", "bias"))
    }
    assert set(dtypes(Net()).values()) == {F32}
    mixft.PrecisionPolicy({"classifier": F32, "*": F16}).apply(model)
    assert set(dtypes(model).values()) == {F16}


def test_a_rule_takes_what_is_inside_and_leaves_the_rest():
    model = Net()
    report = mixft.PrecisionPolicy({"block": torch.bfloat16}).apply(model)
    assert [row.name for row in report.modules if row.pattern] == ["block.dense", "block.LayerNorm"]
    assert {name for name, dtype in dtypes(model).items() if dtype == BF16} == {
        f"block.{name}.{key}" for name in ("dense", "LayerNorm") for key in ("weight", "bias")
    }
    assert border_of(model.classifier) is None


def test_report_prints_every_module_its_rule_and_the_totals():
    text = str(mixft.PrecisionPolicy({"*": "fp16", "embed": "bf16"}).apply(Net()))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["module", "class", "dtype", "rule", "parameters"]
    assert ["embed", "Embedding", "bfloat16", "'embed'", "60"] in lines
    assert ["norm1", "LayerNorm", "float16", "'*'", "12"] in lines
    assert lines[-2:] == [["bfloat16:", "60", "parameters"], ["float16:", "87", "parameters"]]
    assert len({len(line) for line in text.splitlines()[:-2]}) == 1
    assert "none" in str(mixft.PrecisionPolicy({"embed": "bf16"}).apply(Net()))


def test_inputs_are_cast_and_outputs_keep_their_dtype():
    model = Net()
    mixft.PrecisionPolicy(RULES).apply(model)
    logits = model(TOKENS, mask=torch.zeros(2, 3))
    assert logits.dtype == F32
    assert model.seen["block.dense"] == (F16, F16)
    assert model.seen["norm1"] == (F32, F32)
    assert model.seen["classifier"] == (F32, F32)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("rules", [{"*": "low"}, {"*": "low", "*LayerNorm*": "fp32", "classifier": "fp32"}])
def test_forward_and_backward_against_fp64(dtype, rules):
    model = Net(64)
    exact = copy.deepcopy(model).double()
    plain = copy.deepcopy(model).to(dtype)
    rules = {pattern: dtype if name == "low" else name for pattern, name in rules.items()}
    mixft.PrecisionPolicy(rules).apply(model)
    with torch.no_grad():
        for ours, reference in zip(model.parameters(), exact.parameters(), strict=True):
            reference.copy_(ours)
    outputs = [net(TOKENS) for net in (model, exact, plain)]
    for output in outputs:
        output.double().square().sum().backward()
    epsilon = torch.finfo(dtype).eps
    assert_within_budget(outputs[0], outputs[1].detach(), outputs[2].detach(), epsilon)
    for ours, reference, other in zip(model.parameters(), exact.parameters(), plain.parameters(), strict=True):
        assert ours.grad.dtype == ours.dtype
        assert_within_budget(ours.grad, reference.grad, other.grad, 4 * epsilon)


def test_cast_reaches_into_containers():
    Pair = namedtuple("Pair", "left right")  # built from arguments, not from a list
    one = torch.ones(2)
    tree = {
        "a": [one, (one.double(), None)],
        "b": Pair(one, 3),
        "c": OrderedDict(x=one),
        "d": torch.arange(2),
        "e": "t",
    }
    cast_tree = cast(tree, F16)
    assert cast_tree["a"][0].dtype == cast_tree["a"][1][0].dtype == F16
    assert type(cast_tree["a"][1]) is tuple
    assert type(cast_tree["b"]) is Pair
    assert cast_tree["b"].left.dtype == cast_tree["c"]["x"].dtype == F16
    assert type(cast_tree["c"]) is OrderedDict
    assert cast_tree["d"] is tree["d"]
    assert cast_tree["e"] == "t"
    assert cast(one, F32) is one


def test_a_mask_of_lowest_numbers_stays_finite_and_an_overflow_does_not():
    mask = torch.tensor([0.0, torch.finfo(F32).min, 1e6, -float("inf")])
    assert cast(mask, F16).tolist() == [0.0, -65504.0, float("inf"), -float("inf")]
    assert cast(mask, BF16)[1] == torch.finfo(F32).min or cast(mask, BF16)[1].isinf()
    grown = torch.tensor([torch.finfo(F32).min], requires_grad=True)
    assert cast(grown, F16).isinf().all()


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, *, pair):
        return self.linear(pair["x"]) + pair["y"][0]


def test_keyword_arguments_are_cast():
    model = Keyword()
    mixft.PrecisionPolicy({"*": "bf16"}).apply(model)
    assert model(pair={"x": torch.ones(1, 2), "y": [torch.ones(1, 2)]}).dtype == BF16


def test_buffers_stay_and_layers_with_running_statistics_keep_fp32():
    model = nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
    report = mixft.PrecisionPolicy({"*": "fp16"}).apply(model)
    assert model[1].running_mean.dtype == model[1].weight.dtype == F32
    assert model[2].weight.dtype == F16
    assert [(row.dtype, row.parameter_dtype) for row in report.modules] == [(F16, F16), (F16, F32), (F16, F16)]
    assert "float16, parameters float32" in str(report)
    for mode in (True, False):
        assert model.train(mode)(torch.randn(4, 2, 3)).dtype == F16
    assert model[1].running_mean.abs().sum() > 0
    net = Net()
    mixft.PrecisionPolicy({"*": "fp16"}).apply(net)
    assert (net.positions.dtype, net.frequencies.dtype) == (torch.int64, F32)


def test_activations_and_losses_compute_in_what_they_are_given():
    model = nn.ModuleDict({"act": nn.GELU(), "loss": nn.CrossEntropyLoss(), "linear": nn.Linear(2, 2)})
    mixft.PrecisionPolicy({"*": "fp16"}).apply(model)
    assert model["act"](torch.ones(2)).dtype == F32
    assert model["linear"](torch.ones(2)).dtype == F16


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.norm(self.embed(tokens)))


def test_tied_weights_stay_tied_and_conflicts_are_refused_by_name():
    model = Tied()
    before = model.embed.weight
    mixft.PrecisionPolicy({"*": "fp16", "norm": "fp32"}).apply(model)
    assert model.head.weight is model.embed.weight is before
    assert before.dtype == F16
    model(TOKENS % 8).float().sum().backward()
    assert before.grad.dtype == F16
    model = Tied()
    for rules in ({"*": "fp16", "head": "fp32"}, {"embed": "fp16"}):
        with pytest.raises(ValueError, match=r"'embed' and 'head' share the parameter 'weight'"):
            mixft.PrecisionPolicy(rules).apply(model)
        assert set(dtypes(model).values()) == {F32}
        assert border_of(model.embed) is None


def test_a_tie_is_judged_by_the_dtype_that_a_module_without_a_rule_goes_back_to():
    model = Tied().to(BF16)
    mixft.PrecisionPolicy({"*": "fp32"}).apply(model)
    mixft.PrecisionPolicy({"embed": "bf16"}).apply(model)
    assert set(dtypes(model).values()) == {BF16}


def test_one_module_in_two_places_has_one_dtype():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared})
    with pytest.raises(ValueError, match="'a' and 'b' are the same module"):
        mixft.PrecisionPolicy({"*": "fp16", "b": "fp32"}).apply(model)
    assert [row.name for row in mixft.PrecisionPolicy({"*": "fp16"}).apply(model).modules] == ["a"]
    assert len(shared._forward_pre_hooks) == 1


@pytest.mark.parametrize(
    ("rules", "error", "match"),
    [
        ({}, ValueError, "rules is empty"),
        ({"*": "fp8"}, ValueError, r"rule '\*' is 'fp8'; it must be one of fp16, bf16, fp32"),
        ({"*": torch.float64}, ValueError, "float64"),
        ({3: "fp16"}, TypeError, "rules is"),
        ("fp16", TypeError, "rules is"),
    ],
)
def test_bad_rules(rules, error, match):
    with pytest.raises(error, match=match):
        mixft.PrecisionPolicy(rules)


def test_bad_models():
    policy = mixft.PrecisionPolicy({"*": "fp16", "lm_head": "fp32"})
    model = Net()
    with pytest.raises(ValueError, match=r"pattern 'lm_head' matches no module .* embed, block, norm1, classifier"):
        policy.apply(model)
    assert set(dtypes(model).values()) == {F32}
    with pytest.raises(TypeError, match="model must be"):
        policy.apply([model])
    with pytest.raises(ValueError, match="no shape yet"):
        mixft.PrecisionPolicy({"*": "fp16"}).apply(nn.Sequential(nn.LazyLinear(2)))
    with pytest.raises(TypeError, match="optimizer is a SGD"):
        mixft.PrecisionPolicy({"*": "fp16"}).apply(model, torch.optim.SGD(model.parameters(), lr=1.0))
    for call in (policy.remove, lambda net: policy.evaluating(net).__enter__()):
        with pytest.raises(ValueError, match="no policy is applied"):
            call(model)


def test_apply_is_idempotent_and_another_policy_replaces_it():
    model = Net()
    policy = mixft.PrecisionPolicy(RULES)
    first, second = str(policy.apply(model)), str(policy.apply(model))
    assert first == second
    assert len(model.classifier._forward_pre_hooks) == 1
    mixft.PrecisionPolicy({"embed": "bf16"}).apply(model)
    assert {name for name, dtype in dtypes(model).items() if dtype != F32} == {"embed.weight"}
    assert border_of(model.classifier) is None


def test_remove_gives_back_dtypes_hooks_and_keys():
    model = Net().to(BF16)
    model.classifier.float()
    keys, before = list(model.state_dict()), dtypes(model)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    policy = mixft.PrecisionPolicy({"*": "fp32", "norm1": "fp16"})
    policy.apply(model)
    assert list(model.state_dict()) == keys
    mixft.PrecisionPolicy({"*": "fp16"}).apply(model)
    policy.remove(model)
    assert dtypes(model) == before
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert not any(module._forward_pre_hooks or module._forward_pre_hooks_with_kwargs for module in model.modules())


@pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_cast_on_their_own(through):
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    policy = mixft.PrecisionPolicy({"*": "fp16", "1": "fp32"})
    policy.apply(model)
    twin = through(model)
    assert twin(torch.ones(1, 2)).dtype == F32
    assert torch.equal(twin(torch.ones(1, 2)), model(torch.ones(1, 2)))
    assert border_of(twin[0]) is not border_of(model[0])
    policy.remove(twin)
    assert model[0].weight.dtype == F16
    assert twin[0].weight.dtype == F32
    assert border_of(model[0]) is not None


def test_state_dict_round_trip():
    model, other = Net(), Net()
    for net in (model, other):
        mixft.PrecisionPolicy(RULES).apply(net)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert dtypes(other) == dtypes(model)


def test_compiled_and_checkpointed_forward_are_the_eager_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 2))
    mixft.PrecisionPolicy({"*": "fp16", "LayerNorm": "fp32"}).apply(model)
    inputs = torch.randn(3, 4)
    expected = model(inputs)
    expected.float().square().sum().backward()
    gradients = [param.grad.clone() for param in model.parameters()]
    runs = (torch.compile(model, backend="aot_eager"), lambda x: checkpoint(model, x, use_reentrant=False))
    for run in runs:
        model.zero_grad()
        output = run(inputs)
        output.float().square().sum().backward()
        assert torch.equal(output, expected)
        assert all(torch.equal(param.grad, grad) for param, grad in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("master_weights", ["fp32", "split", "none"])
def test_the_optimizer_keeps_parameters_and_fp32_values(master_weights):
    model = Net()
    values = {name: param.detach().clone() for name, param in model.named_parameters()}
    params = list(model.parameters())
    optimizer = AdamW(params, master_weights=master_weights)
    policy = mixft.PrecisionPolicy({"*": "bf16", "norm1": "fp32"})
    policy.apply(model, optimizer)
    assert all(ours is param for ours, param in zip(model.parameters(), params, strict=True))
    policy.remove(model, optimizer)
    assert not any(optimizer.state.values())
    for name, param in model.named_parameters():
        rounded = master_weights == "none" and not name.startswith("norm1")
        assert torch.equal(param, values[name].bfloat16().float() if rounded else values[name]), name


def test_training_goes_on_after_apply_with_the_same_moments_and_masters():
    model = Net()
    optimizer = AdamW(model.parameters())
    train(model, optimizer)
    before = {
        param: {name: bits(value) for name, value in optimizer.state[param].items()} for param in model.parameters()
    }
    weights = {param: bits(param) for param in model.parameters()}
    mixft.PrecisionPolicy({"*": "fp16"}).apply(model, optimizer)
    for param in model.parameters():
        assert bits(optimizer.state[param]["master"]) == weights[param]
        assert {name: bits(value) for name, value in optimizer.state[param].items() if name != "master"} == before[
            param
        ]
    train(model, optimizer)
    assert all(torch.equal(param, optimizer.state[param]["master"].half()) for param in model.parameters())


def test_bert():
    from mixft.cli.model_folder import quiet_transformers

    transformers = quiet_transformers()
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForSequenceClassification(config).eval()
    inputs = {
        "input_ids": TOKENS,
        "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
        "labels": torch.tensor([0, 1]),
    }
    exact = model(**inputs)
    policy = mixft.PrecisionPolicy(RULES)
    norms = {row.name: row.dtype for row in policy.apply(model).modules if "Norm" in row.kind}
    assert len(norms) == 5
    assert set(norms.values()) == {F32}
    assert model.bert.encoder.layer[0].attention.self.query.weight.dtype == F16
    output = model(**inputs)
    assert output.logits.dtype == F32
    torch.testing.assert_close(output.logits, exact.logits, atol=2e-3, rtol=0)
    output.loss.backward()
    with policy.evaluating(model):
        torch.testing.assert_close(model(**inputs).logits, exact.logits, atol=2e-3, rtol=0)
    mixft.PrecisionPolicy({"*": "bf16"}).apply(model)
    assert model(**inputs).logits.isfinite().all()
