"""The studies of Sig-DEG on a mixture: their runs, exact numbers, and the law of a student's features."""

import math

import pytest
import torch

import fewstep as fs
from experiments import names, sigdeg_ablation, sigdeg_features, sigdeg_mixture
from experiments.sigdeg_features import Increments, correlation, two_samples
from fewstep.learned.trajectories import make_trajectories
from fewstep_analysis import Record

EXACT = fs.DiffusionModel(sigdeg_mixture.MIXTURE.denoiser, sigdeg_mixture.SCHEDULE)


def test_the_study_of_the_mixture_runs_on_a_smoke_budget(tmp_path):
    lines = sigdeg_mixture.run(tmp_path, budget="smoke")
    record = Record.load(tmp_path / "records" / "sigdeg-mixture.json")
    rows = {(r["denoiser"], r["name"]): r for r in record.data["rows"]}
    assert rows["trained", "teacher"]["rmse"] == 0
    assert rows["trained", "teacher"]["evaluations"] == 60 * rows["trained", "H"]["evaluations"] == 300
    # of the exact denoiser the two-stage tableau's ends are nearer to the teacher's than the one-stage one's
    assert rows["exact", "ShARK"]["rmse"] < rows["exact", "Euler-Maruyama"]["rmse"]
    # 0.04 against 0.17 with samples without number; of these 1,024 W1 is known to about 0.04
    assert rows["exact", "ShARK"]["w1"] < rows["exact", "Euler-Maruyama"]["w1"]
    found = {(r["denoiser"], r["name"]): r for r in sigdeg_mixture.ratios(record)}
    teacher = rows["trained", "teacher"]
    assert found["trained", "K"]["w1"] == rows["trained", "K"]["w1"] / teacher["w1"]
    assert found["trained", "K"]["time"] == rows["trained", "K"]["seconds"] / teacher["seconds"]
    assert (tmp_path / "figures" / "sigdeg-mixture.svg").exists()
    assert sum("expected at most 1.5" in line for line in lines) == len(found)


def test_the_ablation_runs_on_a_smoke_budget(tmp_path):
    lines = sigdeg_ablation.run(tmp_path, budget="smoke")
    data = Record.load(tmp_path / "records" / "sigdeg-ablation.json").data
    for name in ("mixture", "digits"):
        rows = data[name]["rows"]
        # three depths, two heads and the untrained parent of three numbers of steps, and one with feedback
        assert len(rows) == 3 * (3 * 2 + 1) + 1
        for r in rows:
            assert len(r["knots"]) == len(r["mmd"]) == len(r["sliced_w2"]) == r["steps"]
            if not r["feedback"]:
                assert math.isclose(sum(r["shares"]), 1)
                assert math.isclose(r["takeover"][0], r["knots"][-1], rel_tol=1e-5)
                assert math.isclose(r["local"][0], r["knots"][0], rel_tol=1e-5)
                assert math.isclose(r["local"][-1], r["takeover"][-1], rel_tol=1e-5)
    assert (tmp_path / "figures" / "sigdeg-ablation.svg").exists()
    assert lines[0] == "mixture"


def test_both_are_studies_of_the_command():
    assert {"sigdeg-mixture", "sigdeg-ablation"} <= set(names())
    assert "sigdeg-features" not in names()


def test_the_levels_nest_and_their_ends_are_the_schedules():
    fine = sigdeg_mixture.levels(30)
    assert (fine.diff() < 0).all()
    assert (float(fine[0]), float(fine[-1])) == (10.0, 0.05)
    for steps in (3, 5, 10):
        torch.testing.assert_close(fine[:: 30 // steps], sigdeg_mixture.levels(steps))


def test_the_refined_grid_is_the_teachers():
    """Euler-Maruyama on it, along the same noise, ends where the trajectories do."""
    sigmas = sigdeg_mixture.levels(2)
    data = make_trajectories(EXACT, sigmas, count=8, event_shape=(1,), substeps=4, seed=3)
    fine = make_trajectories(
        EXACT, sigdeg_mixture.refined(sigmas, 4), count=8, event_shape=(1,), substeps=1, seed=3
    )
    torch.testing.assert_close(fine.coarsen(4).pick(torch.arange(8)).knots, data.pick(torch.arange(8)).knots)


def test_quantiles_are_those_of_the_mixture():
    q = sigdeg_mixture.quantiles(1 << 16)
    m = sigdeg_mixture.MIXTURE
    mean = float(m.weights @ m.means[:, 0])
    second = float(m.weights @ (m.means[:, 0] ** 2 + m.stds**2))
    assert abs(float(q.mean()) - mean) < 1e-4
    assert abs(float(q.square().mean()) - second) < 1e-3
    # a shift of the law is its distance
    assert math.isclose(sigdeg_mixture.apart([q + 0.25], 0)["w1"], 0.25, rel_tol=1e-6)


@pytest.mark.parametrize("parts", [2, 4, 60])
def test_a_left_sum_has_another_law_than_the_one_that_is_drawn(parts):
    """Fresh features and joined ones are uncorrelated, those of a left sum are not.

    Of N independent pairs the sample correlation is normal of standard deviation 1/sqrt(N) where the true
    one is 0; at 4.5 of them the test's level is 7e-6. The left sum's is -(1/2n) / sqrt(1/12 + 1/(6 n^2)):
    with n = 60 fine steps -0.029, at N = 2^17 10.4 standard deviations off: the power is 1 - 2e-9, and more
    with n = 2 and 4.
    """
    shape, bound = (1 << 17,), 4.5 / math.sqrt(1 << 17)

    def seen(source):
        W, H = source.increment(0.3, 1.7).coordinates()[:2]
        assert abs(float(W.square().mean()) - 1) < 4.5 * math.sqrt(2 / shape[0])
        return float(torch.corrcoef(torch.stack([W, H]))[0, 1])

    assert abs(seen(fs.FreshIncrements(shape, levy="H", seed=1))) < bound
    assert abs(seen(Increments(shape, parts, left=False, seed=2))) < bound
    left = seen(Increments(shape, parts, left=True, seed=3))
    assert abs(left) > bound
    assert abs(left - correlation(parts)) < bound


class Middle(torch.nn.Module):
    """By hand what a student learns: the denoiser at the path's mean over the step, as W and H tell it."""

    def forward(self, x, sigma, sigma_next, xi):
        a, h = sigma**-2, sigma_next**-2 - sigma**-2
        mean = a * x + h / 2 * EXACT.denoiser(x, sigma) + h.sqrt() * (xi[:, 0] / 2 + xi[:, 1] / 12**0.5)
        tau = a + h / 2
        return EXACT.denoiser(mean / tau, tau**-0.5)


MANY = (1 << 16, 1)


def ends(source, seed):
    student = fs.SigSampler(fs.EulerMaruyama().plan(sigdeg_mixture.levels(5)), Middle(), "H")
    return fs.sample(EXACT, student, shape=MANY, seed=seed, path=source).flatten()


def test_a_student_on_fresh_features_has_the_law_of_one_on_the_teachers():
    """Kolmogorov and Smirnov's two-sample test of level 1e-3 on 2^16 samples each.

    Left sums of 2 parts give another law: over 12 pairs of seeds their distance was 0.026 with a standard
    deviation of 0.0012. The critical one is 1.95 sqrt(2/N) = 0.0108, so that the power is above 0.999 even
    were the deviation four times as large.
    """
    fresh = ends(fs.FreshIncrements(MANY, levy="H", seed=5), 1)
    levels = sigdeg_mixture.levels(5)
    data = make_trajectories(EXACT, levels, count=MANY[0], event_shape=(1,), substeps=2, seed=9, levy="K")
    teachers = sigdeg_ablation.Replay(data.pick(torch.arange(MANY[0])).xi)
    for source, seed in ((teachers, 2), (Increments(MANY, 2, left=False, seed=6), 3)):
        assert two_samples(fresh, ends(source, seed))["p"] > sigdeg_features.LEVEL
    left = Increments(MANY, 2, left=True, seed=7)
    assert two_samples(fresh, ends(left, 4))["p"] < sigdeg_features.LEVEL
