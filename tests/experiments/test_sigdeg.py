"""The Sig-DEG experiments: their runs, exact numbers, and the law of a student's features."""

import math

import pytest
import torch

import fewstep as fs
import headline_orders
import sigdeg_ablation
import sigdeg_features
import sigdeg_mixture
import sigdeg_mnist
import sigdeg_order
from fewstep.learned.trajectories import make_trajectories
from sigdeg_features import Increments, correlation, two_samples

EXACT = fs.DiffusionModel(sigdeg_mixture.MIXTURE.denoiser, sigdeg_mixture.SCHEDULE)


@pytest.mark.slow
def test_mixture(run):
    record = run(sigdeg_mixture)["sigdeg-mixture"]
    rows = {(r["denoiser"], r["name"]): r for r in record.data["rows"]}
    assert rows["trained", "teacher"]["rmse"] == 0
    assert rows["trained", "teacher"]["evaluations"] == 60 * rows["trained", "H"]["evaluations"] == 300
    # with the exact denoiser, the two-stage method ends closer to the teacher than the one-stage method
    assert rows["exact", "ShARK"]["rmse"] < rows["exact", "Euler-Maruyama"]["rmse"]
    # 0.04 against 0.17 with infinitely many samples; with these 1,024 W1 is known to about 0.04
    assert rows["exact", "ShARK"]["w1"] < rows["exact", "Euler-Maruyama"]["w1"]
    teacher = rows["trained", "teacher"]
    for r in sigdeg_mixture.ratios(record):
        if (r["denoiser"], r["name"]) == ("trained", "K"):
            assert r["w1"] == rows["trained", "K"]["w1"] / teacher["w1"]
            assert r["time"] == rows["trained", "K"]["seconds"] / teacher["seconds"]


@pytest.mark.slow
def test_ablation(run):
    data = run(sigdeg_ablation)["sigdeg-ablation"].data
    for name in ("mixture", "digits"):
        rows = data[name]["rows"]
        assert len(rows) == 3 * (3 * 2 + 1)  # per number of steps: three depths, two heads, one untrained
        for r in rows:
            assert len(r["knots"]) == len(r["mmd"]) == len(r["sliced_w2"]) == r["steps"]
            assert math.isclose(sum(r["shares"]), 1)
            assert math.isclose(r["takeover"][0], r["knots"][-1], rel_tol=1e-5)
            assert math.isclose(r["local"][0], r["knots"][0], rel_tol=1e-5)
            assert math.isclose(r["local"][-1], r["takeover"][-1], rel_tol=1e-5)


@pytest.mark.slow
def test_order(run):
    record = run(sigdeg_order, cases=("igbm",), trajectories=32, iterations=1, paths=24, finer_paths=16)
    (row,) = record["sigdeg-order"].data["rows"]
    assert row["estimates"][2]["solver"] == "SigStep"
    assert row["estimates"][2]["paths"] == 24


@pytest.mark.slow
def test_headline(run):
    found = run(headline_orders)["headline-orders"].data["estimates"]
    assert [e["declared"] for e in found] == [0.5, 1.0, 0.5, 1.5, 1.5, 1.0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mnist_with_any_network_resumes(run, any_network, monkeypatch):
    record = run(sigdeg_mnist)["sigdeg-mnist"]
    assert len(record.data["rows"]) == 2 + 3 * 3
    monkeypatch.setattr("fewstep.learned.trajectories._Maker.block", None)  # nothing is done twice
    again = run(sigdeg_mnist)["sigdeg-mnist"]
    assert again.data["rows"] == record.data["rows"]


def test_noise_levels_of_mnist_nest():
    levels = sigdeg_mnist.levels()
    assert len(levels) == 21
    assert (levels.diff() < 0).all()
    torch.testing.assert_close(levels[2:-2:2], torch.tensor(sigdeg_mnist.TEN, dtype=torch.float64))
    assert all(len(kept) == n + 1 for n, kept in sigdeg_mnist.KEPT.items())


def test_noise_levels_of_mixture_nest_between_those_of_the_schedule():
    fine = sigdeg_mixture.levels(30)
    assert (fine.diff() < 0).all()
    assert (float(fine[0]), float(fine[-1])) == (10.0, 0.05)
    for steps in (3, 5, 10):
        torch.testing.assert_close(fine[:: 30 // steps], sigdeg_mixture.levels(steps))


def test_refined_grid_is_the_teachers():
    """Euler-Maruyama on it, along the same noise, ends where the trajectories do."""
    sigmas = sigdeg_mixture.levels(2)
    options = {"count": 8, "event_shape": (1,), "seed": 3}
    data = make_trajectories(EXACT, sigmas, substeps=4, **options)
    fine = make_trajectories(EXACT, sigdeg_mixture.refined(sigmas, 4), substeps=1, **options).coarsen(4)
    every = torch.arange(8)
    torch.testing.assert_close(fine.pick(every).knots, data.pick(every).knots)


@pytest.mark.slow
def test_quantiles_have_the_moments_of_the_mixture():
    q, m = sigdeg_mixture.quantiles(1 << 16), sigdeg_mixture.MIXTURE
    mean = float(m.weights @ m.means[:, 0])
    second = float(m.weights @ (m.means[:, 0] ** 2 + m.stds**2))
    assert abs(float(q.mean()) - mean) < 1e-4
    assert abs(float(q.square().mean()) - second) < 1e-3
    # W1 of a shifted law is the shift
    assert math.isclose(sigdeg_mixture.distances([q + 0.25], 0)["w1"], 0.25, rel_tol=1e-6)


@pytest.mark.parametrize("parts", [2, 60])
def test_left_sum_has_another_law(parts):
    """Fresh features and joined ones are uncorrelated, those of a left sum are not.

    Of N independent pairs the sample correlation is normal of standard deviation 1/sqrt(N) where the true
    one is 0; with 4.5 of them the test's level is 7e-6. The left sum's is -(1/2n) / sqrt(1/12 + 1/(6 n^2)):
    with n = 60 fine steps -0.029, at N = 2^17 10.4 standard deviations off: the power is 1 - 2e-9, and more
    with n = 2.
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
    """What a student learns, by hand: the denoiser at the path's mean over the step, given W and H."""

    def forward(self, x, sigma, sigma_next, xi):
        a, h = sigma**-2, sigma_next**-2 - sigma**-2
        mean = a * x + h / 2 * EXACT.denoiser(x, sigma) + h.sqrt() * (xi[:, 0] / 2 + xi[:, 1] / 12**0.5)
        tau = a + h / 2
        return EXACT.denoiser(mean / tau, tau**-0.5)


@pytest.mark.slow
def test_student_on_fresh_features_has_the_law_of_one_on_the_teachers():
    """Kolmogorov and Smirnov's two-sample test of level 1e-3 on 2^16 samples each.

    Left sums of 2 parts give another law: over 12 pairs of seeds their distance was 0.026 with a standard
    deviation of 0.0012. The critical one is 1.95 sqrt(2/N) = 0.0108, so the power is above 0.999 even if
    the deviation were four times as large.
    """
    shape, levels = (1 << 16, 1), sigdeg_mixture.levels(5)
    student = fs.SigSampler(fs.EulerMaruyama().plan(levels), Middle(), "H")

    def ends(source, seed):
        return fs.sample(EXACT, student, shape=shape, seed=seed, path=source).flatten()

    fresh = ends(fs.FreshIncrements(shape, levy="H", seed=5), 1)
    data = make_trajectories(EXACT, levels, count=shape[0], event_shape=(1,), substeps=2, seed=9, levy="K")
    teachers = sigdeg_ablation.Replay(sigdeg_ablation.everything(data).xi)
    for source, seed in ((teachers, 2), (Increments(shape, 2, left=False, seed=6), 3)):
        assert two_samples(fresh, ends(source, seed))["p"] > sigdeg_features.LEVEL
    left = Increments(shape, 2, left=True, seed=7)
    assert two_samples(fresh, ends(left, 4))["p"] < sigdeg_features.LEVEL
