"""``mixft tune``: a configuration that is wrong or does not fit is discarded with the reason, and the fastest ships."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mixft.benchmarks import timing, tuning, tuning_files, tuning_spaces
from mixft.benchmarks.case import Case, each
from mixft.benchmarks.cases.linear import linear
from mixft.benchmarks.tuning import compiled_fault, sweep
from mixft.benchmarks.tuning_spaces import SPACES, Space
from mixft.cli import main
from mixft.kernels import configuration as module
from mixft.kernels import matmul_persistent, matmul_tiles
from mixft.kernels.architecture import ARCHITECTURES, architecture_of
from mixft.kernels.compilation import kernel_modules
from mixft.kernels.configuration import configuration, configurations, substitute
from mixft.kernels.matmul_epilogue import Product
from mixft.kernels.matmul_tiles import MatmulConfig

CPU = torch.device("cpu")
ARCH = architecture_of(CPU)
# What the sweep looks at of a compiled variant.
SOUND = SimpleNamespace(spilled_bytes=0, shared_memory=1024)


@dataclass(frozen=True)
class Pace:
    """A configuration of an op that takes so many milliseconds and is off by ``error``."""

    milliseconds: int
    error: int = 0


def toy_work(x):
    pace = configuration("toy", Pace, ARCH, "all")
    if pace.milliseconds < 0:
        raise RuntimeError("out of registers")
    time.sleep(pace.milliseconds / 1e3)
    return [2 * x + pace.error]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A space of an op whose file ships ten milliseconds."""
    (tmp_path / "configs").mkdir()
    entry = {"architectures": ["sm_86", "sm_90"], "bucket": "all", "config": {"milliseconds": 10, "error": 0}}
    provenance = {"triton": "3.7.1", "device": None, "date": "2026-11-21", "method": "by hand"}
    (tmp_path / "configs/toy.json").write_text(json.dumps({"provenance": provenance, "entries": [entry]}))
    monkeypatch.setattr(module, "__file__", str(tmp_path / "configuration.py"))
    monkeypatch.setattr(timing, "FLUSH_BYTES", {"cpu": 2**10})
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-5)
    configurations.cache_clear()
    case = Case(
        "toy/5", lambda device: torch.arange(5.0), lambda x: [2 * x.double()], {"mixft": each(toy_work)}, 1e-6, 40
    )
    yield lambda *candidates: Space("toy", "all", "matmul_tiles", case, candidates)
    configurations.cache_clear()


def test_a_substitute_is_what_launchers_get_and_then_what_ships_again():
    shipped = configuration("matmul", MatmulConfig, ARCH, "small")
    other = replace(shipped, BLOCK_K=16)

    def fail():
        with substitute("matmul", other, ARCH, "small"):
            assert configuration("matmul", MatmulConfig, ARCH, "small") is other
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert configuration("matmul", MatmulConfig, ARCH, "small") is shipped


def test_the_fastest_sound_candidate_is_chosen(toy):
    found = sweep(toy(Pace(2), Pace(1, error=3), Pace(-1), Pace(6)), CPU, 2.0, compiles=False)
    assert found.shipped == {"milliseconds": 10, "error": 0}
    assert found.chosen == {"milliseconds": 2, "error": 0}
    assert 2 < found.speedup < 6
    reasons = {trial.config["milliseconds"]: trial.discarded for trial in found.trials}
    assert reasons == {
        10: None,
        2: None,
        6: None,
        1: "error 3.8e-01, bound 1.0e-06",
        -1: "RuntimeError: out of registers",
    }
    assert configuration("toy", Pace, ARCH, "all") == Pace(10)


def test_what_ships_stays_where_nothing_is_clearly_faster(toy):
    found = sweep(toy(Pace(10, error=0), Pace(20)), CPU, 1.0, compiles=False)
    assert found.chosen == found.shipped
    assert found.speedup == 1


def test_candidates_that_the_time_does_not_reach_are_counted(toy):
    found = sweep(toy(*(Pace(2 + number) for number in range(5))), CPU, 1e-9, compiles=False)
    assert found.untried == 5
    assert len(found.trials) == 1


def test_an_unsound_shipped_configuration_is_said(toy):
    with substitute("toy", Pace(10, error=1), ARCH, "all"):
        found = sweep(toy(Pace(2)), CPU, 1.0, compiles=False)
    assert found.speedup is None
    assert found.chosen == found.shipped
    assert found.untried == 1


@pytest.mark.parametrize(
    ("compiled", "said"),
    [
        (SOUND, None),
        (SimpleNamespace(spilled_bytes=8, shared_memory=1024), "spills 8 bytes"),
        (SimpleNamespace(spilled_bytes=0, shared_memory=10**6), "needs 1000000 bytes of shared memory of 101376"),
        (RuntimeError("no such instruction"), "does not compile: RuntimeError: no such instruction"),
    ],
)
def test_the_compiled_code_is_looked_at_first(monkeypatch, compiled, said):
    seen = []

    def compile_variant(variant, arch):
        seen.append(variant)
        if isinstance(compiled, Exception):
            raise compiled
        return compiled

    monkeypatch.setattr(tuning, "compile_variant", compile_variant)
    space = next(space for space in SPACES if (space.op, space.bucket) == ("matmul", "medium"))
    fault = compiled_fault(space, MatmulConfig(64, 32, 32, 8, num_warps=2, num_stages=3), ARCH)
    assert fault is None if said is None else said in fault
    assert {variant.constexprs["BLOCK_N"] for variant in seen} == {32}
    assert {(variant.num_warps, variant.num_stages) for variant in seen} == {(2, 3)}
    assert all("medium" in variant.name for variant in seen)


@pytest.fixture
def two_tiny_candidates(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(timing, "FLUSH_BYTES", {"cpu": 2**10})
    monkeypatch.setattr(tuning, "TIMED", timing.Effort(rounds=2, seconds=0.1, fewest_rounds=2))
    candidates = [MatmulConfig(16, 16, 16, 1, 4, 1), MatmulConfig(24, 16, 16, 1, 4, 1)]
    space = Space("matmul", "small", "matmul_tiles", linear(3, 32, 16, torch.float16), candidates)
    monkeypatch.setattr(tuning_spaces, "SPACES", (space,))


def test_the_whole_command_in_the_interpreter(two_tiny_candidates, tmp_path, capsys):
    file = tmp_path / "tuning.json"
    assert main(["tune", "matmul", "--device", "cpu", "--seconds", "60", "--json", str(file)]) == 0
    assert "matmul, small, sm_86, linear/3x32x16-fp16: " in capsys.readouterr().out
    (found,) = tuning_files.read(file)["sweeps"]
    shipped, sound, broken = found["trials"]
    assert shipped["config"] == found["shipped"]
    assert sound["seconds"] > 0
    assert sound["config"]["BLOCK_K"] == 16
    assert "power of 2" in broken["discarded"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu"], "mixft tune measures on a GPU"),
        (["nothing", "--device", "cpu"], "no op to tune is named 'nothing'; there are matmul"),
        (["--device", "cpu", "--write"], "rehearses a sweep without --write"),
        (["--from", "/no/such/file.json"], "--from /no/such/file.json cannot be used"),
        (["--from", "a.json", "--write"], "leave the other options out"),
        (["--from", "a.json", "--seconds", "9"], "leave the other options out"),
        (["--json", "/no/such/folder/file.json", "--device", "cpu"], "--json /no/such/folder/file.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, arguments, said):
    monkeypatch.setenv("TRITON_INTERPRET", "0" if arguments == ["--device", "cpu"] else "1")
    assert main(["tune", *arguments]) == 2
    output = capsys.readouterr()
    assert said in output.err
    assert output.err.count("\n") == 1


def test_without_triton_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["tune", "--device", "cpu"]) == 2
    assert "pip install triton" in capsys.readouterr().err


ENVIRONMENT = {"triton": "3.6.0", "device_name": "Example GPU", "date": "2026-12-01T10:00:00+00:00"}


def choice(architecture: str = "sm_90", **fields) -> dict:
    shipped = {"milliseconds": 10, "error": 0}
    made = {"op": "toy", "bucket": "all", "architecture": architecture, "shipped": shipped, "speedup": 1.5}
    return made | {"chosen": {"milliseconds": 4, "error": 0}} | fields


def test_a_choice_ships_for_its_architecture_alone(toy, tmp_path, capsys):
    record = tmp_path / "gpu.json"
    tuning_files.write({"stages": [], "tuning": tuning_files.record(ENVIRONMENT, [choice()])}, record)
    assert main(["tune", "--from", str(record)]) == 0
    assert "toy.json, sm_90, all: 1.50x" in capsys.readouterr().out
    configurations.cache_clear()
    assert configurations("toy", Pace) == {("sm_86", "all"): Pace(10), ("sm_90", "all"): Pace(4)}
    document = json.loads((tmp_path / "configs/toy.json").read_text())
    measured = {"triton": "3.6.0", "device": "Example GPU", "date": "2026-12-01", "speedup": 1.5}
    assert [entry["architectures"] for entry in document["entries"]] == [["sm_86"], ["sm_90"]]
    assert document["entries"][1]["measured"] == measured
    assert document["provenance"]["method"] == "by hand"


def test_a_choice_that_is_what_ships_changes_no_file(toy, tmp_path, capsys):
    before = (tmp_path / "configs/toy.json").read_text()
    same = choice(chosen={"milliseconds": 10, "error": 0})
    tuning_files.write(tuning_files.record(ENVIRONMENT, [same]), tmp_path / "tuning.json")
    assert main(["tune", "--from", str(tmp_path / "tuning.json")]) == 0
    assert "no file changes" in capsys.readouterr().out
    assert (tmp_path / "configs/toy.json").read_text() == before


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (choice("sm_86", shipped={"milliseconds": 9, "error": 0}), "measured against {'milliseconds': 9"),
        (choice("sm_75"), "no entry for sm_75"),
    ],
)
def test_a_record_of_other_files_changes_none(toy, tmp_path, capsys, second, said):
    before = (tmp_path / "configs/toy.json").read_text()
    tuning_files.write(tuning_files.record(ENVIRONMENT, [choice(), second]), tmp_path / "tuning.json")
    assert main(["tune", "--from", str(tmp_path / "tuning.json")]) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "configs/toy.json").read_text() == before


@pytest.mark.parametrize("text", ["[]", "{", '{"format": 1}', '{"tuning": null}'])
def test_a_file_without_a_record_is_refused(tmp_path, capsys, text):
    (tmp_path / "a.json").write_text(text)
    assert main(["tune", "--from", str(tmp_path / "a.json")]) == 2
    assert "a.json cannot be used" in capsys.readouterr().err


def test_the_shipped_files_keep_their_meaning_through_the_layout(tmp_path):
    for path in (Path(module.__file__).parent / "configs").glob("*.json"):
        document = json.loads(path.read_text())
        assert json.loads(tuning_files._layout(document)) == document


@pytest.mark.parametrize("space", SPACES, ids=lambda space: f"{space.op}-{space.bucket}")
def test_a_space_is_of_a_shipped_bucket_and_reaches_the_compiled_code(space):
    arch = ARCHITECTURES["sm_90"]
    kind = type(space.candidates[0])
    shipped = configuration(space.op, kind, arch, space.bucket)
    assert len(set(space.candidates)) == len(space.candidates)
    other = next(config for config in space.candidates if config != shipped)
    variants = kernel_modules()[space.module].variants
    before = variants(arch)
    with substitute(space.op, other, arch, space.bucket):
        # Who computes a plain product is no part of any kernel, and Triton before 3.4 has no descriptors.
        assert (variants(arch) == before) == (space.op == "plain_matmul" or not before)


MATMULS = [space for space in SPACES if "matmul" in space.op and "int8" not in space.op and "only" not in space.op]


@pytest.mark.parametrize("space", MATMULS, ids=lambda space: f"{space.op}-{space.bucket}")
def test_a_case_is_of_its_bucket(space):
    size, _, *activation = space.case.name.split("/")[1].split("-")
    rows, inner, columns = map(int, size.split("x"))
    a, b = torch.empty(rows, inner, device="meta"), torch.empty(columns, inner, device="meta").t()
    product = Product(a, b, torch.empty(rows, columns, device="meta"), *activation)
    bucket = product.size if space.op == "matmul_persistent" else matmul_tiles.bucket(product)
    assert bucket == space.bucket


@pytest.mark.parametrize("make", [tuning_spaces.tiles_space, tuning_spaces.persistent_space])
def test_a_matmul_is_timed_with_the_kernel_and_the_configuration_of_its_space(monkeypatch, make):
    arch = ARCHITECTURES["sm_90"]
    monkeypatch.setattr(tuning_spaces, "architecture_of", lambda device: arch)
    launched = []
    for kernel in (matmul_persistent, matmul_tiles):
        monkeypatch.setattr(kernel, "launch", lambda product, config, *more: launched.append((product, config)))
    space = make("medium", linear(33, 32, 16, torch.float16, "gelu"), (64, 64, 32, 4, 2), activation="gelu")
    candidate = space.candidates[0]
    with substitute(space.op, candidate, arch, "medium"):
        space.case.providers["mixft"](space.case.inputs(CPU)).run()
    ((product, config),) = launched
    assert config == candidate
    assert product.activation == "gelu"
    assert product.bias is not None


def test_spaces_of_other_architectures_are_left_out():
    kept = [space.op for space in SPACES if tuning.ships(space, CPU)]
    assert "matmul_persistent" not in kept
    assert {"matmul", "plain_matmul", "int8_matmul", "grad"} <= set(kept)
