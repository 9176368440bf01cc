"""What all experiments share: the command line, records, tables, packed images; comparing records."""

import sys
from pathlib import Path

import pytest
import torch

import base
import fewstep as fs
import regenerate
import strong_order
from fewstep_analysis import Record


@pytest.mark.slow
def test_command_line_runs_with_changed_budget(tmp_path, monkeypatch, capsys):
    words = ["strong_order.py", "--budget", "smoke", "--out", str(tmp_path), "--set", "paths=16"]
    monkeypatch.setattr(sys, "argv", words)
    strong_order.EXPERIMENT.main()
    assert "wrote strong-order-sine.json" in capsys.readouterr().out
    record = Record.load(tmp_path / "records" / "strong-order-sine.json")
    assert record.data["estimates"][0]["paths"] == 16
    expected = "python analysis/experiments/strong_order.py --budget smoke --set paths=16"
    assert record.made["command"] == expected
    assert (tmp_path / "figures" / "strong-order-sine.svg").exists()


@pytest.mark.parametrize("name", base.NAMES)
def test_help_of_every_script_has_an_example(name, monkeypatch, capsys):
    e = base.load(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit):
        e.main()
    example = e.command("smoke")
    assert f"Example: {example}" in capsys.readouterr().out
    assert (base.ROOT / example.split()[1]).exists()


def test_unknown_budget_and_field_are_rejected(tmp_path, monkeypatch, capsys):
    with pytest.raises(fs.InputError, match="Did you mean 'smoke'"):
        strong_order.EXPERIMENT.run("smok", tmp_path)
    monkeypatch.setattr(sys, "argv", ["strong_order.py", "--set", "path=3"])
    with pytest.raises(SystemExit) as end:
        strong_order.EXPERIMENT.main()
    assert end.value.code == 2
    assert "Did you mean 'paths'" in capsys.readouterr().err


@pytest.mark.parametrize("name", base.NAMES)
def test_committed_records_make_tables(name):
    e = base.load(name)
    saved = e.saved()
    assert set(saved) == set(e.records or (e.name,)) or e.device != "cpu"  # another device may never have been at hand
    assert all(text.strip() for text in e.tables(saved).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in base.NAMES if n != "benchmarks"])  # which draws those of its parts
def test_committed_records_make_figures(name, tmp_path):
    e = base.load(name)
    e.draw(e.saved(), tmp_path)
    expected = {f for f in e.figures if f.endswith(".svg") and (e.device == "cpu" or Path(f).stem in e.saved())}
    assert {p.name for p in tmp_path.iterdir()} >= expected


def test_table_shows_missing_cells_as_dashes():
    assert base.table(["a", "b"], [[1, None], ["", 2]]) == "| a | b |\n| --- | --- |\n| 1 | - |\n| - | 2 |"


def test_packed_images_are_exact_to_the_grey_level():
    x = 2.2 * torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 1.1
    back = base.unpacked(base.packed({"x": x}))["x"]
    assert (back - x.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6


def test_differences_ignore_timings_and_find_numbers():
    old = {"rmse": [1.0, 2.0], "seconds": 3.0, "name": "a", "ratio": 1.0}
    assert list(regenerate.differences(old, old | {"seconds": 9.0, "rmse": [1.0, 2.0 + 1e-6]}, 1e-4)) == []
    found = dict(regenerate.differences(old, old | {"rmse": [1.1, 2.0], "name": "b"}, 1e-4))
    assert found[".rmse[0]"] == pytest.approx(0.1 / 1.1)
    assert set(found) == {".rmse[0]", ".name"}
    assert list(regenerate.differences(old, {"rmse": [1.0]}, 1e-4))
