"""The pictures of a recording: what they show is what it says, and the same rows give the same file."""

import copy

import matplotlib.figure
import pytest
from recordings import example, pair, recording, row, without_time

from mixft.benchmarks.plot_style import STYLES, digest, style
from mixft.benchmarks.plots import PLOTS, ratio_bars

ALL = {"ratios": ratio_bars, **PLOTS}


@pytest.fixture
def drawn(monkeypatch):
    """The axes of every figure that is saved."""
    axes = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure, *args, **options):
        axes.extend(figure.axes)
        save(figure, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return axes


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("draw", ALL.values(), ids=ALL)
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_the_same_again_and_carries_its_digest(tmp_path, draw, suffix):
    one, two = tmp_path / f"one.{suffix}", tmp_path / f"two.{suffix}"
    draw(example(), one)
    draw(example(), two)
    assert one.read_bytes() == two.read_bytes()
    assert digest(example()).encode() in one.read_bytes()


def test_a_digest_follows_the_figures():
    other = copy.deepcopy(example())
    other["rows"][0]["seconds"] *= 1.001
    assert digest(other) != digest(example())


def test_a_bar_starts_at_1_and_ends_at_the_ratio(tmp_path, drawn):
    ratio_bars(recording(pair("a/1", {"torch": 2.5}) + pair("a/2", {"torch": 0.8})), tmp_path / "a.png")
    bars = [(bar.get_x(), bar.get_width()) for bar in drawn[0].patches]
    assert bars == [(1, pytest.approx(1.5)), (1, pytest.approx(-0.2))]
    assert "2.50" in texts(drawn[0])
    assert "0.80" in texts(drawn[0])
    low, high = drawn[0].get_xlim()
    assert low < 0.8 * 0.96 < 2.5 * 1.05 < high


def test_a_peer_without_a_time_is_named(tmp_path, drawn, monkeypatch):
    notes = []
    monkeypatch.setattr(matplotlib.figure.Figure, "supxlabel", lambda self, text, **options: notes.append(text))
    rows = [
        *pair("a/1", {"torch": 2.0, "torchao": 3.0}),
        *pair("a/2", {"torch": 2.0}),
        without_time("a/2", "torchao", "refused", "no"),
        without_time("a/1", "bitsandbytes", "wrong", "error 1"),
        without_time("a/1", "gemlite", "missing", "not installed"),
        without_time("a/1", "torch.compile", "refused", "quick"),
    ]
    ratio_bars(recording(rows), tmp_path / "a.png")
    assert "torchao: refused" in texts(drawn[0])
    assert "bitsandbytes: wrong output" in texts(drawn[0])
    assert notes == ["not installed where this was recorded: gemlite\nrefused every case: torch.compile"]


def test_every_case_of_mixft_is_on_the_roofline(tmp_path, drawn):
    PLOTS["roofline"](example(), tmp_path / "a.png")
    bandwidth, products = drawn
    points = [line for axes in (bandwidth, products) for line in axes.lines if line.get_linestyle() == "None"]
    assert len(points) == len({row["case"] for row in example()["rows"]})
    first = next(row for row in example()["rows"] if row["family"] == "adamw")
    assert bandwidth.lines[0].get_ydata()[0] == pytest.approx(first["bytes"] / first["seconds"] / 1e9)


def test_a_stack_adds_up_and_the_peak_is_beside_it(tmp_path, drawn):
    memory = {"parameters": 2**20, "exp_avg": 2**20, "state2": 2 * 2**20, "peak": 5 * 2**20}
    PLOTS["memory"](recording([row("a/1", memory=memory)]), tmp_path / "a.png")
    assert [(bar.get_x(), bar.get_width()) for bar in drawn[0].patches] == [(0, 1), (1, 3)]
    assert list(drawn[0].lines[0].get_xdata()) == [5, 5]


def test_the_slope_of_growth_in_proportion_is_1(tmp_path, drawn):
    sweeps = [{"name": "step", "variable": "tensors", "value": value} for value in (10, 1000, 100)]
    rows = [row(f"a/{sweep['value']}", seconds=1e-6 * sweep["value"], sweep=sweep) for sweep in sweeps]
    PLOTS["scaling"](recording(rows), tmp_path / "a.png")
    assert drawn[0].lines[0].get_label() == "mixft, slope 1.00"
    assert list(drawn[0].lines[0].get_xdata()) == [10, 100, 1000]


@pytest.mark.parametrize("draw", ALL.values(), ids=ALL)
def test_a_recording_with_nothing_to_draw_is_refused(tmp_path, draw):
    with pytest.raises(ValueError, match="recording"):
        draw(recording([]), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_every_provider_looks_like_no_other():
    assert len(set(STYLES.values())) == len(STYLES)
    assert style("mixft abc123")[0] == style("mixft")[0]
