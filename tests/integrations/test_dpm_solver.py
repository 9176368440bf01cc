"""Networks of other repositories: score_sde's functions, DPM-Solver's interface, EDM's networks."""

import math

import pytest
import torch

import fewstep as fs
from fewstep.integrations.dpm_solver import DPMSolverSchedule, from_model_fn

MEAN, VARIANCE = 0.7, 0.3
"""The data are N(MEAN, VARIANCE), whose score is known at any alpha and sigma_t."""


def exact(x, schedule, sigmas):
    """The probability flow's exact state at the last level from x at the first, in model coordinates."""
    (a, b), (first, last) = schedule.alpha(sigmas).tolist(), sigmas.tolist()
    ratio = math.sqrt((VARIANCE + last**2) / (VARIANCE + first**2))
    return b * (MEAN + (x / a - MEAN) * ratio)


def log_mean(t):
    """log alpha of score_sde's VPSDE(beta_min=0.1, beta_max=20)."""
    return -0.25 * t**2 * 19.9 - 0.05 * t


# score_sde's `marginal_prob`: t -> (alpha, sigma_t)
MARGINALS = {
    "vp": (fs.VPLinear(0.1, 20.0), lambda t: (log_mean(t).exp(), torch.sqrt(-torch.expm1(2 * log_mean(t))))),
    "subvp": (fs.SubVP(0.1, 20.0), lambda t: (log_mean(t).exp(), -torch.expm1(2 * log_mean(t)))),
    "ve": (fs.VE(0.01, 50.0), lambda t: (torch.ones_like(t), 0.01 * 5000**t)),
}


def score_fn(marginal):
    """A function like that of score_sde's get_score_fn: (x, t) -> score, t (batch,) in (0, 1]."""

    def score(x, t):
        alpha, std = (v[:, None] for v in marginal(t))
        return -(x - alpha * MEAN) / (alpha**2 * VARIANCE + std**2)

    return score


def of_closure(name):
    schedule, marginal = MARGINALS[name]
    return fs.from_score(score_fn(marginal), schedule)


def of_network(name):
    """The inner network: called with 999 t it predicts the noise, or (VE) with sigma_t."""
    schedule, marginal = MARGINALS[name]
    score = score_fn(marginal)
    if name == "ve":
        return fs.from_score(lambda x, t: told_sigma(x, schedule.sigma(t), schedule, score), schedule)
    return fs.from_epsilon(lambda x, t: told_999(x, 999 * t, marginal, score), schedule)


def told_sigma(x, labels, schedule, score):
    return score(x, schedule.time(labels))


def told_999(x, labels, marginal, score):
    t = labels / 999
    return -marginal(t)[1][:, None] * score(x, t)


@pytest.mark.parametrize("made", [of_closure, of_network], ids=["score_fn", "network"])
@pytest.mark.parametrize("name", MARGINALS)
def test_score_sde_model_samples_exactly(name, made):
    schedule, marginal = MARGINALS[name]
    t = torch.tensor([0.01, 0.3, 1.0], dtype=torch.float64)
    alpha, std = marginal(t)
    sigma = schedule.sigma(t)
    torch.testing.assert_close(schedule.alpha(sigma), alpha, rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma * alpha, std, rtol=1e-12, atol=0)
    sigmas = fs.sigma_grid(schedule, 60, final="sigma_min")
    x = torch.randn(16, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * float(std[-1])
    got = fs.sample(fs.DiffusionModel(made(name), schedule), fs.UniPC(3), noise=x, sigmas=sigmas)
    want = exact(x, schedule, sigmas[[0, -1]])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    coarse = fs.sample(fs.DiffusionModel(made(name), schedule), fs.UniPC(3), noise=x, sigmas=sigmas[::4])
    assert (coarse - want).abs().max() > 10 * (got - want).abs().max()


class NoiseSchedule:
    """A stand-in for DPM-Solver's NoiseScheduleVP: log alpha piecewise linear on t_i = (i + 1)/N."""

    T = 1.0

    def __init__(self, alphas_cumprod=None, dtype=torch.float32):
        self.schedule = "linear" if alphas_cumprod is None else "discrete"
        self.total_N = 1000 if alphas_cumprod is None else len(alphas_cumprod)
        if alphas_cumprod is not None:
            self.times = (torch.arange(1, self.total_N + 1, dtype=torch.float64) / self.total_N).to(dtype)
            self.logs = (0.5 * torch.log(alphas_cumprod)).to(dtype)

    @staticmethod
    def lines(x, xs, ys):
        i = torch.searchsorted(xs.to(x.dtype), x.contiguous()).clamp(1, len(xs) - 1)
        return ys[i - 1] + (x - xs[i - 1]) * (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])

    def marginal_log_mean_coeff(self, t):
        return log_mean(t) if self.schedule == "linear" else self.lines(t.reshape(-1), self.times, self.logs)

    def marginal_alpha(self, t):
        return self.marginal_log_mean_coeff(t).exp()

    def marginal_std(self, t):
        return torch.sqrt(1 - torch.exp(2 * self.marginal_log_mean_coeff(t)))

    def marginal_lambda(self, t):
        log_alpha = self.marginal_log_mean_coeff(t)
        return log_alpha - 0.5 * torch.log(1 - torch.exp(2 * log_alpha))

    def inverse_lambda(self, value):
        both = torch.logaddexp(torch.zeros(1), -2 * value)  # -2 log alpha
        if self.schedule == "linear":
            tmp = 2 * 19.9 * both
            return tmp / (torch.sqrt(0.01 + tmp) + 0.1) / 19.9
        return self.lines(-0.5 * both.reshape(-1), self.logs.flip(0), self.times.flip(0))


BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
TABLE = torch.cumprod(1 - BETAS, 0)
CLOCKS = {
    "discrete": NoiseSchedule(TABLE), "discrete float64": NoiseSchedule(TABLE, torch.float64),
    "linear": NoiseSchedule(),
}  # fmt: skip


def model_fn(ns):
    """(x, t_continuous) -> eps, exact, in the time of ns."""

    def eps(x, t):
        assert t.shape == (len(x),)
        alpha, std = ns.marginal_alpha(t)[:, None], ns.marginal_std(t)[:, None]
        return std * (x - alpha * MEAN) / (alpha**2 * VARIANCE + std**2)

    return eps


@pytest.mark.parametrize("name", CLOCKS)
@pytest.mark.parametrize(("spacing", "power"), [("uniform", 1), ("quadratic", 2)])
def test_ddim_equals_dpm_solver_1_in_its_own_time(name, spacing, power):
    ns, x = CLOCKS[name], torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    problem = from_model_fn(model_fn(ns), ns)
    got = fs.sample(problem, fs.DDIM(), noise=x, steps=8, spacing=spacing, final="sigma_min")
    ends = torch.tensor([1.0, 1 / 1000], dtype=torch.float64) ** (1 / power)
    nodes = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, 9, dtype=torch.float64)) ** power
    for s, t in zip(nodes[:-1], nodes[1:]):
        alpha_s, alpha_t = ns.marginal_alpha(s.reshape(1)), ns.marginal_alpha(t.reshape(1))
        h = ns.marginal_lambda(t.reshape(1)) - ns.marginal_lambda(s.reshape(1))
        eps = model_fn(ns)(x, s.expand(9))
        x = alpha_t / alpha_s * x - ns.marginal_std(t.reshape(1)) * torch.expm1(h) * eps
    torch.testing.assert_close(got, x, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", CLOCKS)
def test_noise_schedule_vp_is_a_schedule(name):
    schedule = DPMSolverSchedule(CLOCKS[name])
    t = torch.linspace(1e-3, 1, 200, dtype=torch.float64).reshape(20, 10)
    sigma = schedule.sigma(t)
    assert sigma.shape == (20, 10)
    assert sigma[0, 0] == schedule.sigma_min
    assert sigma[-1, -1] == schedule.sigma_max
    torch.testing.assert_close(schedule.time(sigma), t, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(schedule.alpha(sigma), CLOCKS[name].marginal_alpha(t.reshape(-1)).view(20, 10))
    assert schedule.time(sigma[3, 3]).shape == ()
    if name == "linear":
        torch.testing.assert_close(sigma, fs.VPLinear().sigma(t), rtol=1e-9, atol=0)
        return
    # label i is the time (i + 1)/N; a float32 table holds it to float32
    labels = torch.arange(0, 1000, 111, dtype=torch.float64)
    own = fs.DiscreteVP(TABLE).sigma(labels)
    torch.testing.assert_close(schedule.sigma((labels + 1) / 1000), own, rtol=1e-3, atol=0)
    if name == "discrete float64":
        torch.testing.assert_close(schedule.sigma((labels + 1) / 1000), own, rtol=1e-9, atol=0)


def test_range_of_times_is_checked():
    ns = NoiseSchedule()
    problem = from_model_fn(model_fn(ns), ns, t_start=0.9, t_end=0.01)
    schedule, x = problem.schedule, torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    assert (schedule.sigma_max, schedule.sigma_min) == pytest.approx(
        fs.VPLinear().sigma(torch.tensor([0.9, 0.01], dtype=torch.float64)).tolist()
    )
    sigmas = fs.sigma_grid(schedule, 60, final="sigma_min")
    got = fs.sample(problem, fs.UniPC(3), noise=x, sigmas=sigmas)
    torch.testing.assert_close(got, exact(x, schedule, sigmas[[0, -1]]), rtol=0, atol=1e-5)


class EDMNet(torch.nn.Module):
    """The interface of EDM's preconditioned networks; exact for data N(label . (0, 1, 2), VARIANCE)."""

    label_dim, sigma_min, sigma_max = 3, 0.0, float("inf")

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.arange(3.0)), []

    def forward(self, x, sigma, class_labels=None, force_fp32=False):
        self.seen.append((x.dtype, tuple(sigma.shape), force_fp32))
        rows = torch.zeros(1, 3) if class_labels is None else class_labels.to(torch.float32)
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1)
        mean = (rows.reshape(-1, 3) * self.weight).sum(1, keepdim=True)
        return mean + (x - mean) * VARIANCE / (VARIANCE + sigma**2)


def edm_ends(**options):
    net = EDMNet()
    schedule = fs.EDM(max(0.002, net.sigma_min), min(80.0, net.sigma_max))
    problem = fs.DiffusionModel(fs.from_edm(net, **options), schedule)
    noise = 80 * torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None]
    with torch.no_grad():
        x0 = fs.sample(problem, fs.EDMHeun(), noise=noise, steps=18, spacing="karras")
    return x0 - noise / 80 * VARIANCE**0.5, net


@pytest.mark.parametrize("labels", [None, torch.eye(3)[2], torch.eye(3)[[1]], torch.eye(3).long()[[0, 1, 2, 1]]])
def test_edm_networks_receive_class_labels(labels):
    """A float64 trajectory through a float32 network, at the mean of each label."""
    ends, net = edm_ends(class_labels=labels, force_fp32=True)
    want = torch.zeros(4) if labels is None else torch.atleast_2d(labels).argmax(1).expand(4).float()
    assert ends.dtype == torch.float64
    torch.testing.assert_close(ends[:, 0], want.double(), rtol=0, atol=0.05)
    assert set(net.seen) == {(torch.float64, (4,), True)}
    assert {seen[2] for seen in edm_ends()[1].seen} == {False}


def edm(labels, batch=4):
    with torch.no_grad():
        return fs.from_edm(EDMNet(), class_labels=labels)(torch.zeros(batch, 1), torch.tensor(1.0))


class NotVP(NoiseSchedule):
    def marginal_std(self, t):
        return 0.5 * t


BAD = {
    "net": (lambda: fs.from_edm(None), "net: got None,"),
    "label numbers": (lambda: edm(torch.tensor([0, 1, 2])), r"class_labels: got shape \(3,\).*one_hot"),
    "too wide": (lambda: edm(torch.eye(4)), "label_dim = 3"),
    "a number": (lambda: edm(2), "class_labels: got int"),
    "no row": (lambda: edm(torch.tensor(1.0)), r"class_labels: got shape \(\)"),
    "rows": (lambda: edm(torch.eye(3)), "class_labels: got 3 rows for a batch of 4"),
    "their SDE": (lambda: fs.from_score(lambda x, t: x, NoiseSchedule()), "schedule: got NoiseSchedule"),
    "model_fn": (lambda: from_model_fn(None, NoiseSchedule()), "model_fn: got None"),
    "noise_schedule": (lambda: from_model_fn(lambda x, t: x, TABLE), "noise_schedule: got Tensor without"),
    "not VP": (lambda: DPMSolverSchedule(NotVP()), r"alpha\^2 \+ std\^2 = 1"),
    "t_start": (lambda: DPMSolverSchedule(NoiseSchedule(), t_start=1.5), "t_start, t_end: got 1.5"),
    "t_end": (lambda: DPMSolverSchedule(NoiseSchedule(), t_end=0.0), "expected 0 < t_end"),
    "turned": (lambda: DPMSolverSchedule(NoiseSchedule(), 0.1, 0.9), "t_end < t_start"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_raises_a_clear_error(case):
    call, words = BAD[case]
    with pytest.raises(fs.InputError, match=words):
        call()
