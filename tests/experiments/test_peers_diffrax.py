"""diffrax's solvers as series of a work-precision figure; skipped where diffrax is not installed."""

import pytest
import torch

import fewstep as fs
from fewstep_analysis.monte_carlo import Experiment, grid_of, own_noise
from fewstep_analysis.problems import by_name, geometric_brownian_motion
from fewstep_analysis.work import sde_work_precision, work_figure

pytest.importorskip("diffrax")

TWINS = [("geometric_brownian_motion", "Euler", fs.EulerMaruyama), ("sine", "ItoMilstein", fs.Milstein),
         ("additive_sine", "Euler", fs.EulerMaruyama), ("additive_in_time", "ShARK", fs.ShARK)]  # fmt: skip


@pytest.mark.parametrize(("name", "theirs", "ours"), TWINS)
def test_diffrax_on_stored_increments_equals_this_library(name, theirs, ours):
    from peers_diffrax import solve_diffrax

    problem, level = by_name(name), 5
    e = Experiment(problem.sde, [fs.ShARK()], problem.y0, (0.0, 1.0), [level], level, 64, "exact", None,
                   "cpu", torch.float64, 0)  # fmt: skip
    noise, start = own_noise(e, 0, 64), e.start(64)
    a = solve_diffrax(name, theirs, start, e.ends, noise)
    b = fs.solve(problem.sde, ours(), start, grid_of(e.ends, level), path=noise).y
    assert a.shape == b.shape
    assert (a - b).abs().max() < 1e-12  # float64 throughout: 1e-6 would do for the same method


def test_diffrax_solvers_are_series_of_the_same_figure(tmp_path):
    solvers = [fs.EulerMaruyama(), fs.ShARK()]
    from peers_diffrax import diffrax_series

    options = {"levels": (2, 4), "paths": 50, "repeats": 1, "peers": diffrax_series}
    record = sde_work_precision(by_name("additive_sine"), solvers, **options)
    error = {(one["package"], one["name"]): one["error"] for one in record.data["series"]}
    assert error["diffrax", "Euler"] == pytest.approx(error["fewstep", "EulerMaruyama"], rel=1e-9)
    assert error["diffrax", "ShARK"] == pytest.approx(error["fewstep", "ShARK"], rel=1e-9)
    assert all(s > 0 for one in record.data["series"] for s in one["seconds"])
    assert "diffrax" in record.made["versions"]
    assert work_figure(record, tmp_path / "work.svg").read_text().count("diffrax") >= 2


def test_other_parameters_are_not_mistaken_for_the_defaults():
    from peers_diffrax import diffrax_series

    problem = geometric_brownian_motion(mu=0.1)
    record = sde_work_precision(problem, [fs.Milstein()], levels=(2, 3), paths=20, torchsde=False, repeats=1,
                                peers=diffrax_series)  # fmt: skip
    assert {one["package"] for one in record.data["series"]} == {"fewstep"}
