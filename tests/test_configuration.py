"""Shipped launch configurations, and the architecture that they are picked by."""

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mixft.kernels import configuration as module
from mixft.kernels.architecture import ARCHITECTURES, architecture_of
from mixft.kernels.configuration import configuration, configurations

SHIPPED = sorted((Path(module.__file__).parent / "configs").glob("*.json"))


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Writes a configuration file that the module then takes for a shipped one."""
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(module, "__file__", str(tmp_path / "configuration.py"))

    def write(*entries: dict) -> None:
        document = {"provenance": {}, "entries": list(entries)}
        (tmp_path / "configs" / "op.json").write_text(json.dumps(document))

    configurations.cache_clear()
    yield write
    configurations.cache_clear()


def entry(bucket: str, architectures: list[str], **config: int) -> dict:
    return {"architectures": architectures, "bucket": bucket, "config": config}


def test_a_configuration_is_picked_by_architecture_and_bucket(shipped):
    shipped(
        entry("small", ["sm_80", "sm_90"], rows=16, columns=32),
        entry("large", ["sm_80"], rows=128, columns=64),
        entry("large", ["sm_90"], rows=128, columns=256),
    )
    assert configuration("op", Tile, ARCHITECTURES["sm_90"], "large") == Tile(128, 256)
    assert configuration("op", Tile, ARCHITECTURES["sm_80"], "large") == Tile(128, 64)
    assert configuration("op", Tile, ARCHITECTURES["sm_90"], "small") == Tile(16, 32)


def test_an_architecture_without_one_is_named_with_those_that_have(shipped):
    shipped(entry("small", ["sm_90", "sm_80"], rows=16, columns=32))
    with pytest.raises(RuntimeError, match=r"'small' configuration of op for sm_75; supported: sm_80, sm_90$"):
        configuration("op", Tile, ARCHITECTURES["sm_75"], "small")


def test_an_unknown_architecture_in_a_file_is_refused(shipped):
    shipped(entry("small", ["sm_81"], rows=16, columns=32))
    with pytest.raises(ValueError, match="'sm_81'"):
        configurations("op", Tile)


def test_an_unknown_field_in_a_file_is_refused(shipped):
    shipped(entry("small", ["sm_80"], rows=16, colums=32))
    with pytest.raises(TypeError, match="colums"):
        configurations("op", Tile)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_says_where_it_comes_from(path):
    document = json.loads(path.read_text())
    provenance = document["provenance"]
    assert set(provenance) == {"triton", "device", "date", "method"}
    assert provenance["triton"].count(".") == 2
    datetime.date.fromisoformat(provenance["date"])
    assert provenance["method"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_has_one_configuration_for_each_architecture_and_bucket(path):
    entries = json.loads(path.read_text())["entries"]
    keys = [(arch, item["bucket"]) for item in entries for arch in item["architectures"]]
    assert len(keys) == len(set(keys))
    assert {arch for arch, _ in keys} <= set(ARCHITECTURES)


@pytest.fixture
def gpu(monkeypatch):
    """A torch that reports one CUDA device of the given compute capability."""

    def report(capability: tuple[int, int]) -> torch.device:
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return torch.device("cuda", 0)

    architecture_of.cache_clear()
    yield report
    architecture_of.cache_clear()


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((7, 5), "sm_75"),
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
    ],
)
def test_a_device_is_served_by_the_highest_architecture_of_its_major_number(gpu, capability, name):
    assert architecture_of(gpu(capability)).name == name


@pytest.mark.parametrize("name", ["gfx942:sramecc+:xnack-", "gfx942"])
def test_a_rocm_device_is_known_by_its_name(gpu, monkeypatch, name):
    device = gpu((9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    assert architecture_of(device).name == "gfx942"


def test_another_rocm_device_is_refused_by_name(gpu, monkeypatch):
    device = gpu((11, 0))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName="gfx1100"))
    with pytest.raises(RuntimeError, match="no kernels for gfx1100; it supports sm_75"):
        architecture_of(device)


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (11, 0), (13, 0)])
def test_an_unsupported_device_is_refused_by_name(gpu, capability):
    with pytest.raises(RuntimeError, match=rf"{capability[0]}\.{capability[1]}.*sm_75"):
        architecture_of(gpu(capability))


def test_the_interpreter_keeps_to_the_smallest_limits_with_tensor_cores():
    arch = architecture_of(torch.device("cpu"))
    limits = [other.shared_memory for other in ARCHITECTURES.values() if other.backend == "cuda" and other.tensor_cores]
    assert arch.tensor_cores
    assert arch.shared_memory == min(limits)
