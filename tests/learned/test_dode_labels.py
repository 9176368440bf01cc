"""D-ODE with one label a sample, on other grids, for every base, in files for people."""

import json
import pickle

import pytest
import torch

import fewstep as fs
from fewstep.learned.dode.fitting_state import HELD_OUT, Model, Walk, Work, spans, widened

EDM = fs.EDM(0.02, 40.0)
MEANS = torch.tensor([[-1.0, 0.5, 0.0], [1.0, -0.5, 0.3], [0.2, 1.0, -1.0]], dtype=torch.float64)
STDS = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)


def guided(guidance):
    """labels (batch,) -> two bumps a class, pushed away from a broad unconditional Gaussian."""

    def problem(labels):
        held_means, held_stds = MEANS[labels], STDS[labels][:, None]

        def denoiser(x, sigma):
            mu, v = held_means.to(x), held_stds.to(x) ** 2
            assert len(x) == len(mu), "one label a sample"
            total = v + sigma.to(x) ** 2
            side = torch.tanh((x * mu).sum(1, keepdim=True) / total)
            of_class = side * mu + v / total * (x - side * mu)
            alone = x / (1 + sigma.to(x) ** 2)
            return alone + guidance * (of_class - alone)

        return fs.DiffusionModel(denoiser, EDM)

    return problem


def start(n, seed=0):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 40.0


def classes(n, seed=0):
    return torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed))


def fitted(base=None, guidance=2.0, **options):
    options = dict(noise=start(256), labels=classes(256), steps=6, batch=50) | options
    return fs.distill_dode(guided(guidance), base or fs.DDIM(), **options)


@pytest.fixture(scope="module")
def table():
    return fitted(terms=2)


def test_each_batch_of_the_fit_has_its_own_labels(table):
    student, report = table
    assert report.student_rmse < 0.7 * report.base_rmse
    others, labels = start(200, 3), classes(200, 4)
    problem = guided(2.0)(labels)
    exact = fs.sample(problem, fs.UniPC(3), noise=others, steps=300)
    learned, base = (fs.sample(problem, s, noise=others, **grid) - exact
                     for s, grid in ((student, {}), (fs.DDIM(), {"steps": 6})))  # fmt: skip
    assert learned.norm() < 0.7 * base.norm()


def test_labels_stream_and_refine_alike(table):
    whole, _ = fitted(terms=2, batch=256)
    torch.testing.assert_close(table[0].kappa, whole.kappa, rtol=1e-8, atol=1e-11)
    _, better = fitted(terms=2, refine="global", iterations=100, minibatch=64)
    assert better.student_rmse < table[1].student_rmse


def test_labels_that_repeat_are_fitted_and_judged_alike():
    model = Model.of(guided(2.0), torch.arange(256) % HELD_OUT, start(256))
    work = Work.of(model, start(256), torch.tensor([10.0], dtype=torch.float64), None)
    for some in (work.kept, work.held):
        assert len((some % HELD_OUT).unique()) == HELD_OUT
    assert sorted([*work.kept.tolist(), *work.held.tolist()]) == list(range(256))


@pytest.mark.parametrize("file", ["t.safetensors", "t.json"])
def test_a_labelled_table_knows_its_model_whatever_the_labels(table, file, tmp_path):
    table[0].save(tmp_path / file)
    for student in (table[0], fs.load(tmp_path / file), pickle.loads(pickle.dumps(table[0]))):
        for labels in (classes(5, 9), torch.tensor([1]), torch.tensor([2, 2])):
            fs.sample(guided(2.0)(labels), student, noise=start(len(labels), 1))
        for guidance in (1.0, 2.5):
            with pytest.raises(fs.InputError, match="answers differently"):
                fs.sample(guided(guidance)(classes(5)), student, noise=start(5, 1))


def test_labels_without_end_are_known_by_their_spread():
    """Embeddings: the answers of new ones lie near those of the fit's, other guidance's do not."""

    def family(guidance):
        def problem(e):
            return fs.DiffusionModel(lambda x, s: (x + guidance * s**2 * e.to(x)) / (1 + s**2), EDM)

        return problem

    draw = lambda n, seed: 1 + 0.1 * torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    student, _ = fs.distill_dode(family(1.0), fs.DDIM(), noise=start(128), labels=draw(128, 0), steps=5)
    assert student.fitted_to.spread
    fs.sample(family(1.0)(draw(20, 5)), student, noise=start(20))
    with pytest.raises(fs.InputError, match="labels"):
        fs.sample(family(2.0)(draw(20, 5)), student, noise=start(20))


def test_a_problem_is_asked_once_and_the_plan_alone_asks_nothing():
    calls = []

    def counted(x, s):
        calls.append(len(x))
        return x / (1 + s * s)

    problem = fs.DiffusionModel(counted, EDM)
    student, _ = fs.distill_dode(problem, fs.DDIM(), noise=start(32), steps=4)
    for solver, expected in ((student, 7), (student, 4), (student.plan, 4)):
        calls.clear()
        fs.sample(problem, solver, noise=start(8))
        assert len(calls) == expected
    calls.clear()
    fs.sample(fs.DiffusionModel(counted, EDM), student, noise=start(8))
    assert len(calls) == 7


def test_the_table_tells_how_it_was_made(tmp_path):
    student, report = fitted(terms=2, note={"guidance": 2.0, "who": "a test"})
    student.save(tmp_path / "t.safetensors")
    student.save(tmp_path / "t.json")
    for back in (fs.load(tmp_path / "t.safetensors"), fs.load(tmp_path / "t.json")):
        assert back.words == student.words
        assert torch.equal(back.kappa, student.kappa)
        for word in ("guidance: 2", "solver: DDIM(eta=0)", "evaluations: 6", "terms: 2", "DPMSolverPP(2M)",
                     "fit: greedy", "start states: 256", "who: a test", "fewstep 0"):  # fmt: skip
            assert word in str(back)
        assert back.words["rmse"] == report.student_rmse
        problem = guided(2.0)(classes(8))
        a, b = (fs.sample(problem, s, noise=start(8)) for s in (student, back))
        assert torch.equal(a, b)
    readable = json.loads((tmp_path / "t.json").read_text())
    assert readable["columns"]["sigma"] == student.plan.sigma.tolist()
    for damage in ("", "[]", '{"format": "fewstep-dode-1"}', '{"columns": 3}'):
        (tmp_path / "t.json").write_text(damage)
        with pytest.raises(fs.InputError):
            fs.load(tmp_path / "t.json")


def test_a_refined_table_survives_json(tmp_path):
    student, _ = fitted(fs.DPMSolverPP(2), refine="global", learn_grid=True, iterations=20, rate=0.03)
    student.save(tmp_path / "t.json")
    back = fs.load(tmp_path / "t.json")
    assert all(torch.equal(v, back.plan.tensors()[k]) for k, v in student.plan.tensors().items()
               if not v.isnan().any())  # fmt: skip
    assert torch.equal(back.kappa.isnan(), student.kappa.isnan())


def test_files_of_version_0_1_0_load(tmp_path):
    """One row of answers, no words, no word on labels."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    problem = fs.DiffusionModel(lambda x, s: x / (1 + s * s), EDM)
    student, _ = fs.distill_dode(problem, fs.DDIM(), noise=start(32), steps=4)
    student.save(tmp_path / "new.safetensors")
    with safe_open(str(tmp_path / "new.safetensors"), framework="pt") as file:
        meta = json.loads(file.metadata()["fewstep"])
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    old = {k: meta[k] for k in ("format", "name", "prediction", "schedule", "event")}
    old["answers"] = meta["answers"][0]
    save_file(tensors, str(tmp_path / "old.safetensors"), {"fewstep": json.dumps(old)})
    back = fs.load(tmp_path / "old.safetensors")
    a, b = (fs.sample(problem, s, noise=start(4)) for s in (student, back))
    assert torch.equal(a, b)
    assert back.words == {}


BASES = [
    fs.DDIM(), fs.PNDM(), fs.PNDM("plms"), fs.IPNDM(2), fs.IPNDM(4), fs.IPNDM(4, variable=True),
    *[fs.DPMSolver(p, multistep=m) for p in (1, 2, 3) for m in (False, True)],
    *[fs.DPMSolverPP(p, multistep=m) for p in (1, 2, 3) for m in (False, True)],
    *[fs.DEIS(p, v) for p in (2, 3) for v in ("log_rho", "rho", "t")],
    fs.EDMHeun(), fs.EDMEuler(), fs.UniPC(2), fs.UniPC(3), fs.UniPC(2, prediction="noise"),
]  # fmt: skip
VP = fs.DiscreteVP.named("linear")
BUMPS = fs.DiffusionModel(
    lambda x, s: 0.8 * torch.tanh(0.8 * x / (0.09 + s * s)) + 0.09 / (0.09 + s * s) * (
        x - 0.8 * torch.tanh(0.8 * x / (0.09 + s * s))), VP)  # fmt: skip


def names(solver):
    return ",".join(
        [type(solver).__name__, *(str(v) for v in vars(solver).values() if isinstance(v, (int, str)))]
    )


@pytest.mark.parametrize("base", BASES, ids=names)
@pytest.mark.parametrize("final", ["x0", "sigma_min"])
def test_every_base_is_wrapped(base, final):
    """Born equal to its base to the bit, and fitted it is closer to the teacher."""
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grid = dict(steps=6, final=final)
    student, _ = fs.distill_dode(BUMPS, base, noise=noise, terms=2, **grid)
    own = fs.sample(BUMPS, base, noise=noise, **grid)
    noughts = fs.DODE(widened(_plan(base, grid), 2), torch.zeros_like(student.kappa), student.fitted_to)
    assert torch.equal(fs.sample(BUMPS, noughts, noise=noise), own)
    fresh = torch.randn(256, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    exact = fs.sample(BUMPS, fs.UniPC(3), noise=fresh, steps=400, final=final)
    errors = [float((fs.sample(BUMPS, s, noise=fresh, **g) - exact).norm()) for s, g in
              ((student, {}), (base, grid))]  # fmt: skip
    assert errors[0] <= 1.1 * errors[1]  # the guard's promise, on noise that chose nothing
    assert student.plan.nfe == _plan(base, grid).nfe


def _plan(base, grid):
    from fewstep.learned.dode.fitting_state import plan_of

    return plan_of(base, fs.sigma_grid(VP, **grid), VP)


@pytest.mark.parametrize("base", BASES, ids=names)
def test_a_walk_forgets_only_what_no_row_asks_for(base):
    plan = _plan(base, dict(steps=7))
    x = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    walk = Walk(BUMPS, plan, x * VP.sigma_max)
    for i in range(plan.nfe):
        walk.row(i)
        assert len(walk.history) == spans(plan)[i]
    assert spans(plan)[-1] == 0
    expected = fs.sample(BUMPS, plan, noise=x * VP.sigma_max * float(VP.alpha(plan.sigmas[:1])))
    torch.testing.assert_close(walk.x, expected, rtol=1e-9, atol=1e-10)


BAD = {
    "no labels": (dict(labels=None), "problem: got function .* and no labels"),
    "labels of a single model": (dict(problem=guided(2.0)(classes(64))), "labels: got some beside a Den"),
    "too few labels": (dict(labels=classes(5)), r"got shape \(5,\), expected a tensor with one label"),
    "labels as a list": (dict(labels=[0] * 64), "labels: got list"),
    "a note that is no JSON": (dict(note={"x": torch.ones(1)}), "note: "),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_labels_are_refused(case):
    changes, words = BAD[case]
    options = dict(problem=guided(2.0), base=fs.DDIM(), noise=start(64), labels=classes(64), steps=4)
    with pytest.raises(fs.InputError, match=words):
        fs.distill_dode(**(options | changes))


class TestOtherGrids:
    """`fs.regrid`: kappa interpolated, measured, and believed only where it helps."""

    def setup_method(self):
        self.noise = torch.randn(256, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def fit(self, base, **options):
        return fs.distill_dode(BUMPS, base, noise=self.noise, **(dict(steps=10) | options))[0]

    @pytest.mark.parametrize("steps", [7, 9, 12, 16])
    def test_neighbouring_counts_gain(self, steps):
        student = self.fit(fs.DDIM())
        fresh = torch.randn(256, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        made, report = fs.regrid(student, BUMPS, fs.DDIM(), noise=fresh, steps=steps, refit=True)
        assert report.fallback == ""
        assert made.plan.nfe == steps
        assert report.refit_rmse <= report.student_rmse * 1.2
        assert report.student_rmse < 0.7 * report.base_rmse
        assert made.words["fit"] == "interpolated from 10 evaluations"
        fs.sample(BUMPS, made, noise=fresh)

    @pytest.mark.parametrize("base", [fs.DDIM(), fs.DPMSolver(2), fs.EDMHeun(), fs.UniPC(2)], ids=names)
    def test_its_own_grid_gives_the_table_back(self, base):
        student = self.fit(base, guard=False, steps=6)
        made, report = fs.regrid(student, BUMPS, base, noise=self.noise, steps=6)
        assert not report.fallback
        torch.testing.assert_close(made.kappa, student.kappa, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(made.plan.update_eval, student.plan.update_eval, rtol=1e-9, atol=1e-12)

    def test_where_it_hurts_the_base_comes_with_the_reason(self):
        student = self.fit(fs.DDIM(), guard=False, steps=3)
        student = fs.DODE(student.plan, torch.full_like(student.kappa, 3.0), student.fitted_to, student.words)
        made, report = fs.regrid(student, BUMPS, fs.DDIM(), noise=self.noise, steps=8)
        assert "with the base" in report.fallback
        own = fs.sample(BUMPS, fs.DDIM(), noise=self.noise, steps=8)
        assert torch.equal(fs.sample(BUMPS, made, noise=self.noise), own)

    def test_bad_input_is_refused(self):
        student = self.fit(fs.DDIM())
        other = fs.DiffusionModel(lambda x, s: 0.5 * BUMPS.denoiser(x, s), VP)
        refined = self.fit(
            fs.DDIM(), steps=4, refine="global", learn_grid=True, iterations=50, rate=0.03, guard=False
        )
        for table, problem, base, words in (
            (student, other, fs.DDIM(), "answers differently"), (student, BUMPS, fs.UniPC(2), "base: got"),
            (refined, BUMPS, fs.DDIM(), "has no kappa to interpolate"),
        ):  # fmt: skip
            with pytest.raises(fs.InputError, match=words):
                fs.regrid(table, problem, base, noise=self.noise, steps=8)
        with pytest.raises(fs.InputError, match="steps: got None"):
            fs.regrid(student, BUMPS, fs.DDIM(), noise=self.noise)

    def test_labels_come_along(self):
        student, _ = fitted(terms=1)
        made, report = fs.regrid(
            student, guided(2.0), fs.DDIM(), noise=start(100, 8), labels=classes(100, 8), steps=8
        )
        assert report.student_rmse < report.base_rmse
        assert made.fitted_to.labelled
