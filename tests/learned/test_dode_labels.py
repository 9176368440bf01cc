"""Fitted tables and the models they belong to: labels, fingerprints, files."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fewstep as fs

DATA = Path(__file__).parents[1] / "data"  # files that version 0.1 wrote
EDM = fs.EDM(0.02, 40.0)
MEANS = torch.tensor([[-1.0, 0.5, 0.0], [1.0, -0.5, 0.3], [0.2, 1.0, -1.0]], dtype=torch.float64)
STDS = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)


def guided(guidance):
    """labels (batch,) -> two bumps per class, guided away from a broad unconditional Gaussian."""

    def problem(labels):
        held_means, held_stds = MEANS[labels], STDS[labels][:, None]

        def denoiser(x, sigma):
            mu, v = held_means.to(x), held_stds.to(x) ** 2
            assert len(x) == len(mu), "one label per sample"
            total = v + sigma.to(x) ** 2
            side = torch.tanh((x * mu).sum(1, keepdim=True) / total)
            of_class = side * mu + v / total * (x - side * mu)
            alone = x / (1 + sigma.to(x) ** 2)
            return alone + guidance * (of_class - alone)

        return fs.DiffusionModel(denoiser, EDM)

    return problem


def start(n, seed=0, dim=3):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 40.0


def classes(n, seed=0):
    return torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed))


def fitted(base=None, guidance=2.0, **options):
    options = dict(noise=start(256), labels=classes(256), steps=6, batch=50) | options
    return fs.distill_dode(guided(guidance), base or fs.DDIM(), **options)


@pytest.fixture(scope="module")
def labelled():
    return fitted(terms=2, notes={"guidance": 2.0, "who": "a test"})


def test_each_batch_of_the_fit_has_its_own_labels(labelled):
    table, report = labelled
    assert report.student_rmse < 0.7 * report.base_rmse
    others, problem = start(200, 3), guided(2.0)(classes(200, 4))
    exact = fs.sample(problem, fs.UniPC(3), noise=others, steps=300)
    learned, base = (fs.sample(problem, s, noise=others, **grid) - exact
                     for s, grid in ((table, {}), (fs.DDIM(), {"steps": 6})))  # fmt: skip
    assert learned.norm() < 0.7 * base.norm()


def test_labelled_fits_are_batched(labelled):
    full, _ = fitted(terms=2, batch=256)
    torch.testing.assert_close(labelled[0].fit.kappa, full.fit.kappa, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("file", ["t.safetensors", "t.json"])
def test_labelled_table_accepts_its_model_with_any_labels(labelled, file, tmp_path):
    labelled[0].save(tmp_path / file)
    for table in (labelled[0], fs.load(tmp_path / file), pickle.loads(pickle.dumps(labelled[0]))):
        for labels in (classes(5, 9), torch.tensor([1]), torch.tensor([2, 2])):
            fs.sample(guided(2.0)(labels), table, noise=start(len(labels), 1))
        for guidance in (1.0, 2.5):
            with pytest.raises(fs.InputError, match="answers differently"):
                fs.sample(guided(guidance)(classes(5)), table, noise=start(5, 1))


def test_continuous_labels_are_checked_by_the_range_of_their_answers():
    """Embeddings: the answers of new ones lie near those of the fit, those of another guidance do not."""

    def family(guidance):
        def problem(e):
            return fs.DiffusionModel(lambda x, s: (x + guidance * s**2 * e.to(x)) / (1 + s**2), EDM)

        return problem

    def draw(n, seed):
        return 1 + 0.1 * torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))

    table, _ = fs.distill_dode(family(1.0), fs.DDIM(), noise=start(128), labels=draw(128, 0), steps=5)
    assert table.fit.fingerprint.spread
    fs.sample(family(1.0)(draw(20, 5)), table, noise=start(20))
    with pytest.raises(fs.InputError, match="labels"):
        fs.sample(family(2.0)(draw(20, 5)), table, noise=start(20))


def shrink(x, s):
    return x / (1 + s * s)


def test_another_model_schedule_or_shape_is_refused():
    v = torch.logspace(-1, 0, 3, dtype=torch.float64)
    denoiser = lambda x, s: x * v.to(x) / (v.to(x) + s * s)  # noqa: E731
    table, _ = fs.distill_dode(fs.DiffusionModel(denoiser, EDM), fs.DDIM(), noise=start(32), steps=4)
    fs.sample(fs.DiffusionModel(denoiser, EDM), table, noise=start(4))
    for other in (lambda x, s: 0.9 * denoiser(x, s), lambda x, s: -denoiser(x, s),
                  lambda x, s: denoiser(x, s).flip(-1)):  # fmt: skip
        with pytest.raises(fs.InputError, match="answers differently"):
            fs.sample(fs.DiffusionModel(other, EDM), table, noise=start(4))
    with pytest.raises(fs.InputError, match="schedule: .* was fitted to"):
        fs.sample(fs.DiffusionModel(denoiser, fs.EDM(0.02, 80.0)), table, noise=start(4))
    with pytest.raises(fs.InputError, match="event: .* was fitted to"):
        fs.sample(fs.DiffusionModel(shrink, EDM), table, noise=start(4, dim=2))


def test_model_is_asked_once_per_problem_and_never_without_fit():
    calls = []

    def counted(x, s):
        calls.append(len(x))
        return shrink(x, s)

    problem = fs.DiffusionModel(counted, EDM)
    table, _ = fs.distill_dode(problem, fs.DDIM(), noise=start(32), steps=4)
    for solver, expected in ((table, 7), (table, 4), (replace(table, fit=None), 4)):
        calls.clear()
        fs.sample(problem, solver, noise=start(8))
        assert len(calls) == expected
    calls.clear()
    fs.sample(fs.DiffusionModel(counted, EDM), table, noise=start(8))
    assert len(calls) == 7


def test_notes_say_how_a_table_was_made(labelled, tmp_path):
    table, report = labelled
    for file in ("t.safetensors", "t.json"):
        table.save(tmp_path / file)
        back = fs.load(tmp_path / file)
        assert back.fit.notes == table.fit.notes
        assert torch.equal(back.fit.kappa, table.fit.kappa)
        for word in ("guidance: 2", "solver: DDIM(eta=0)", "evaluations: 6", "terms: 2", "DPMSolverPP(2M)",
                     "fit: greedy", "start states: 256", "who: a test", "fewstep 0", "kappa"):  # fmt: skip
            assert word in str(back)
        assert back.fit.notes["rmse"] == report.student_rmse
        problem = guided(2.0)(classes(8))
        a, b = (fs.sample(problem, s, noise=start(8)) for s in (table, back))
        assert torch.equal(a, b)
    readable = json.loads((tmp_path / "t.json").read_text())
    assert readable["columns"]["sigma"] == table.sigma.tolist()
    assert repr(back) == f"<Plan DODE(DDIM(eta=0)): 6 evaluations, fitted to {EDM!r}>"


def test_regrid_keeps_labels():
    made, report = fs.regrid(fitted()[0], guided(2.0), fs.DDIM(), noise=start(100, 8), labels=classes(100, 8), steps=8)
    assert report.student_rmse < report.base_rmse
    assert made.fit.fingerprint.labelled


def old_problem(labels):
    v = torch.tensor([0.1, 0.5], dtype=torch.float64)[labels][:, None] ** 2
    return fs.DiffusionModel(lambda x, s: v.to(x) / (v.to(x) + s * s) * x, fs.EDM(0.1, 10.0))


@pytest.mark.parametrize("file", ["dode-0.safetensors", "dode-1.safetensors", "dode-1.json", "dode-1-labels.json"])
def test_tables_of_version_0_1_load_and_sample_alike(file, tmp_path):
    """Their samples are those that version 0.1 made; the first tables had one row of answers and no notes."""
    table = fs.load(DATA / file)
    problem = fs.DiffusionModel(shrink, fs.EDM(0.1, 10.0))
    if "labels" in file:
        problem = old_problem(torch.tensor([0, 1, 1, 0]))
        assert table.fit.kappa.isnan().all()
    noise = 10 * torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = load_file(DATA / "samples-1.safetensors")["dode-1-labels" if "labels" in file else "dode-1"]
    torch.testing.assert_close(fs.sample(problem, table, noise=noise), expected, rtol=1e-12, atol=1e-12)
    assert bool(table.fit.notes) == ("-0" not in file)
    with pytest.raises(fs.InputError, match="answers differently"):
        fs.sample(fs.DiffusionModel(lambda x, s: 0 * x, problem.schedule), table, noise=noise)
    table.save(tmp_path / "t.json")
    again = fs.load(tmp_path / "t.json")
    torch.testing.assert_close(again.tensors(), table.tensors(), rtol=0, atol=0, equal_nan=True)


BAD = {
    "no labels": (dict(labels=None), "problem: got function .* and no labels"),
    "labels of a single model": (dict(problem=guided(2.0)(classes(64))), "labels: got labels for a Diff"),
    "too few labels": (dict(labels=classes(5)), r"of shape \(5,\), expected a tensor, one label for each"),
    "labels as a list": (dict(labels=[0] * 64), "labels: got list"),
    "no model from labels": (dict(problem=lambda labels: None), "returns no DiffusionModel"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_labels_are_refused(case):
    changes, words = BAD[case]
    options = dict(problem=guided(2.0), base=fs.DDIM(), noise=start(64), labels=classes(64), steps=4)
    with pytest.raises(fs.InputError, match=words):
        fs.distill_dode(**(options | changes))
