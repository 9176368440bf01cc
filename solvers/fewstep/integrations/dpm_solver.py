"""The interface of the DPM-Solver and UniPC repositories: a NoiseScheduleVP and `model_fn(x, t) -> eps`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import DiffusionModel, InputError, _validation, from_epsilon
from ..schedule import TimedSchedule

WANTED = ("marginal_lambda", "inverse_lambda", "marginal_alpha", "marginal_std", "total_N")


class DPMSolverSchedule(TimedSchedule):
    """A `NoiseScheduleVP` as a schedule; model time is its continuous time, with label i at (i + 1)/N.

    Its marginal_lambda and inverse_lambda are called in float64. The spacings "uniform", "quadratic" and "logsnr" are
    its "time_uniform", "time_quadratic" and "logSNR".

    Args:
        noise_schedule: the object, "discrete" or "linear" (or with the same interface).
        t_start, t_end: the largest and the smallest time; by default T and 1/total_N as in `DPM_Solver.sample`.

    Raises:
        InputError: missing methods, a process that does not preserve variance, an empty range of times.
    """

    def __init__(self, noise_schedule: Any, t_start: float | None = None, t_end: float | None = None) -> None:
        missing = [name for name in WANTED if not hasattr(noise_schedule, name)]
        if missing:
            raise InputError(
                f"noise_schedule: got {type(noise_schedule).__name__} without {', '.join(missing)}; expected "
                "DPM-Solver's NoiseScheduleVP. For a table of alphas_cumprod, use fewstep.DiscreteVP."
            )
        self.noise_schedule = noise_schedule
        self.t_max: float = _validation.check_float("t_start", noise_schedule.T if t_start is None else t_start)
        self.t_min: float = _validation.check_float("t_end", 1 / noise_schedule.total_N if t_end is None else t_end)
        if not 0 < self.t_min < self.t_max <= noise_schedule.T:
            raise InputError(
                f"t_start, t_end: got {self.t_max}, {self.t_min}; expected 0 < t_end < t_start <= {noise_schedule.T}."
            )
        ends = torch.tensor([self.t_min, self.t_max], dtype=torch.float64)
        alpha, std = (self._call(name, ends) for name in ("marginal_alpha", "marginal_std"))
        if not torch.allclose(alpha.square() + std.square(), torch.ones_like(ends), atol=1e-4):
            raise InputError(
                f"noise_schedule: got alpha = {alpha.tolist()}, std = {std.tolist()} at the ends; expected "
                "alpha^2 + std^2 = 1, as NoiseScheduleVP has. Write a fewstep.Schedule for another process."
            )

    def sigma(self, t: Tensor) -> Tensor:
        return torch.exp(-self._call("marginal_lambda", t))

    def time(self, sigma: Tensor) -> Tensor:
        return self._call("inverse_lambda", -torch.log(sigma))

    def _call(self, name: str, at: Tensor) -> Tensor:
        """Call a method of the noise schedule and keep the shape of `at`, which some methods flatten."""
        value: Tensor = getattr(self.noise_schedule, name)(at.double().reshape(-1))
        return value.reshape(at.shape)


def from_model_fn(
    model_fn: Callable[[Tensor, Tensor], Tensor], noise_schedule: Any, *, t_start: float | None = None,
    t_end: float | None = None, dtype: torch.dtype | None = None,
) -> DiffusionModel:  # fmt: skip
    """A function that `model_wrapper` made, with its NoiseScheduleVP, as a problem for `fewstep.sample`.

    `sample(from_model_fn(model_fn, noise_schedule), DPMSolverPP(2), noise=x_T, steps=...)` replaces
    `DPM_Solver(model_fn, noise_schedule).sample(x_T, steps=...)`: final="x0" is denoise_to_zero=True there, "sigma_min"
    the default there. Guidance stays in their wrapper; thresholding is `dynamic_thresholding`.

    Args:
        model_fn: `(x_t, t) -> eps` with t of shape (batch,) in the time of noise_schedule.
        noise_schedule, t_start, t_end: as in `DPMSolverSchedule`.
        dtype: what the network computes in.
    """
    _validation.check_callable("model_fn", model_fn, "a function (x, t) -> eps, as model_wrapper(...) makes it")
    schedule = DPMSolverSchedule(noise_schedule, t_start, t_end)
    return DiffusionModel(from_epsilon(model_fn, schedule, dtype=dtype), schedule)
