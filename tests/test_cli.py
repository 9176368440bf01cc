"""The command line, run as a user runs it."""

import json
import subprocess
import sys

import pytest


def cli(*words, **kw):
    return subprocess.run(
        [sys.executable, "-m", "fewstep.analysis", *words], capture_output=True, text=True, **kw
    )


def test_convergence_writes_figure_and_record(tmp_path):
    words = "--solver euler_maruyama --solver milstein --problem sine --reference levels --levels 3 6"
    out = cli("convergence", *words.split(), "--paths", "100", "--out", "o.svg", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert "EulerMaruyama: order" in out.stdout
    assert (tmp_path / "o.svg").read_text().startswith("<?xml")
    record = json.loads((tmp_path / "o.json").read_text())
    assert [e["solver"] for e in record["data"]["estimates"]] == ["EulerMaruyama", "Milstein"]
    assert record["seed"] == 0
    assert "\x1b" not in out.stdout + out.stderr  # plain in a pipe
    assert "%|" not in out.stderr  # no progress bar in a pipe


def test_solvers_lists_cards_as_text_and_json():
    text = cli("solvers").stdout
    rows = json.loads(cli("solvers", "--json").stdout)
    for row in rows:
        assert row["solver"] in text
    assert {"EulerMaruyama", "UniPC", "ShARK"} <= {r["solver"] for r in rows}


BAD = {
    "solver": (["convergence", "--solver", "milsten"], "Did you mean 'milstein'"),
    "problem": (["convergence", "--solver", "milstein", "--problem", "gbm"], "problem: got 'gbm'"),
    "levels": (["convergence", "--solver", "milstein", "--levels", "4", "5"], "at least three"),
    "noise": (["convergence", "--solver", "sh_ark"], "'diagonal' noise"),
    "teacher": (["train-teacher", "cats"], "wanted one of digits"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path):
    words, message = BAD[case]
    out = cli(*words, cwd=tmp_path)
    assert out.returncode == 2
    assert message in out.stderr
    assert len(out.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["demo", "convergence", "solvers", "train-teacher"])
def test_every_command_has_help_with_an_example(command):
    out = cli(command, "--help")
    assert out.returncode == 0
    assert f"Example: fewstep {command}" in out.stdout


@pytest.mark.slow
def test_the_demo_makes_good_on_its_figures(tmp_path):
    """The whole main job, at full budget: the student near its teacher, far from the naive sampler."""
    out = cli("demo", "--out", "d", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    table = json.loads((tmp_path / "d" / "report.json").read_text())["data"]["table"]
    teacher, naive, learned = (row["sliced_w2"] for row in table[:3])
    assert learned < 1.5 * teacher
    assert naive > 1.7 * learned
    assert table[0]["seconds"] > 50 * table[2]["seconds"]


def test_a_quick_demo_writes_what_it_says(tmp_path):
    out = cli("demo", "--quick", "--out", "d", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    for name in ("digits.png", "convergence.png", "report.json", "student.safetensors"):
        assert (tmp_path / "d" / name).stat().st_size > 1000
        assert name in out.stdout
    assert "Next:" in out.stdout
