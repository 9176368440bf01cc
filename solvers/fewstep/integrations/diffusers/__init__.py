"""This library's solvers as schedulers of diffusers pipelines, and pipelines as problems of this library."""

from .pipeline import Idle as Idle
from .pipeline import denoising as denoising
from .pipeline import distill_dode as distill_dode
from .scheduler import FewStepScheduler as FewStepScheduler
