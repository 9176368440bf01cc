"""The command line, run as a user runs it."""

import json
import subprocess
import sys

import pytest


def cli(*words, **kw):
    return subprocess.run(
        [sys.executable, "-m", "fewstep_analysis", *words], capture_output=True, text=True, **kw
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


def test_weak_orders_and_a_solver_as_reference(tmp_path):
    words = "--solver milstein --problem sine --levels 2 4 --paths 500"
    out = cli("convergence", *words.split(), "--weak", "square", "--reference", "levels", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert json.loads((tmp_path / "order.json").read_text())["data"]["estimates"][0]["test"] == "square"
    out = cli("convergence", *words.split(), "--reference", "srid2", "--dtype", "float32", "--block", "100",
              cwd=tmp_path)  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert json.loads((tmp_path / "order.json").read_text())["data"]["estimates"][0]["reference"] == "SRID2"


def test_work_precision_of_an_sde_has_torchsde_beside(tmp_path):
    words = "--problem sine --solver milstein --solver srid2 --levels 3 5 --paths 200 --out wp.png"
    out = cli("work-precision", *words.split(), cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert (tmp_path / "wp.png").stat().st_size > 1000
    series = json.loads((tmp_path / "wp.json").read_text())["data"]["series"]
    by = {(one["package"], one["name"]): one["error"] for one in series}
    assert {p for p, _ in by} - {"diffrax"} == {"fewstep", "torchsde"}
    for ours, theirs in (("Milstein", "milstein"), ("SRID2", "srk")):  # the same methods on the same path
        a, b = by["fewstep", ours], by["torchsde", theirs]
        assert max(abs(x - y) / y for x, y in zip(a, b)) < 1e-9


def test_work_precision_of_samplers_takes_many_budgets(tmp_path):
    words = "--problem ring --solver DDIM --nfe 5 8 --paths 64 --out ring.svg"
    out = cli("work-precision", *words.split(), cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert (tmp_path / "ring.svg").exists()
    assert (tmp_path / "ring.json").exists()


def test_the_headline_study_runs_on_a_smoke_budget(tmp_path):
    out = cli("study", "headline-orders", "--budget", "smoke", "--paths", "64", "--out", ".", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert "LogODE (general)" in out.stdout
    assert (tmp_path / "figures" / "headline-orders.svg").exists()
    assert (
        len(json.loads((tmp_path / "records" / "headline-orders.json").read_text())["data"]["estimates"]) == 6
    )


BAD = {
    "reference": (["convergence", "--solver", "milstein", "--reference", "srid"], "Did you mean 'srid2'"),
    "work problem": (["work-precision", "--problem", "sin"], "Did you mean 'sine'"),
    "study": (["study", "headlines"], "Did you mean 'headline-orders'"),
    "budget": (["study", "headline-orders", "--budget", "paperr"], "Did you mean 'paper'"),
    "weak test": (
        ["convergence", "--solver", "milstein", "--weak", "squares", "--reference", "levels"],
        "Did you mean 'square'",
    ),
    "dtype": (["convergence", "--solver", "milstein", "--dtype", "float16"], "dtype: got 'float16'"),
    "coarse reference": (
        ["convergence", "--solver", "milstein", "--reference", "euler_maruyama"],
        "cannot judge",
    ),
    "solver": (["convergence", "--solver", "milsten"], "Did you mean 'milstein'"),
    "problem": (["convergence", "--solver", "milstein", "--problem", "gbm"], "problem: got 'gbm'"),
    "levels": (["convergence", "--solver", "milstein", "--levels", "4", "5"], "at least three"),
    "noise": (["convergence", "--solver", "sh_ark"], "'diagonal' noise"),
    "teacher": (["train-teacher", "cats"], "expected one of digits"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path):
    words, message = BAD[case]
    out = cli(*words, cwd=tmp_path)
    assert out.returncode == 2
    assert message in out.stderr
    assert len(out.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_demo_makes_good_on_its_figures(tmp_path):
    """The whole main job, at full budget: the student near its teacher, far from the naive sampler."""
    out = cli("demo", "--out", "d", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    table = json.loads((tmp_path / "d" / "report.json").read_text())["data"]["table"]
    teacher, naive, learned = (row["sliced_w2"] for row in table[:3])
    assert learned < 1.5 * teacher
    assert naive > 1.7 * learned
    # a count, not a clock: the ratio of seconds stands in the record and depends on the machine
    assert table[0]["evaluations"] >= 50 * table[2]["evaluations"]


def test_a_quick_demo_writes_what_it_says(tmp_path):
    out = cli("demo", "--quick", "--out", "d", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    for name in ("digits.png", "convergence.png", "report.json", "student.safetensors"):
        assert (tmp_path / "d" / name).stat().st_size > 1000
        assert name in out.stdout
    assert "Next:" in out.stdout
