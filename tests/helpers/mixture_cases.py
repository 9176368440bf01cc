"""A mixture of two Gaussians with its exact denoiser, for the tests of Sig-DEG."""

import torch

import fewstep as fs

EDM = fs.EDM(0.05, 10.0)


def mixture(x, sigma):
    """The exact denoiser of two Gaussians at -1 and 1, standard deviation 0.3."""
    s, v = sigma * sigma, 0.09
    return (x * v + torch.tanh(x / (v + s)) * s) / (v + s)


MIXTURE = fs.DiffusionModel(mixture, EDM)
GRID = fs.sigma_grid(EDM, 4, final="sigma_min")


def shifted(labels):
    """The mixture moved by the label of each sample."""
    m = labels.reshape(-1, 1).float()
    return fs.DiffusionModel(lambda x, s: mixture(x - m, s) + m, EDM)
