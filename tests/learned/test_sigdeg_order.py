"""The strong order of the learned SDE step; units, seeds, files and resuming of its fit."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fewstep as fs
from fewstep.learned.sigdeg import distill_step
from fewstep.learned.sigdeg.networks import Coefficients
from fewstep.learned.sigdeg.student import TERMS
from fewstep_analysis import problems, strong_orders

F64 = torch.float64
GRID = torch.linspace(0, 1, 9, dtype=F64)
SINE = fs.SDE(lambda t, y: -2 * torch.sin(y), lambda t, y: 0.8 + 0.6 * torch.cos(y))


def test_learned_step_has_order_above_one_on_sine():
    """On 95 % bounds; the slopes are near 1.5 and the errors about 0.2 of Milstein's."""
    problem = problems.sine()
    y0 = torch.linspace(-2.5, 2.5, 256, dtype=F64).unsqueeze(1)
    step, _ = fs.distill_sigdeg_step(
        problem.sde, steps=16, y0=y0, seed=1,
        teacher_options=fs.TeacherOptions(trajectories=1024), training=fs.TrainingOptions(20),
    )  # fmt: skip
    solvers = [fs.EulerMaruyama(), fs.Milstein(), step]
    euler, milstein, learned = strong_orders(solvers, problem, levels=range(3, 8), paths=512, reference="levels")
    assert euler.local_high[-1] < 0.9 < learned.local_low[-1]
    assert all(b < 0.6 * a for a, b in zip(milstein.rmse, learned.rmse, strict=True))


def fitted(sde=None, y0=None, **options):
    """A quick fit."""
    sde = sde or SINE
    y0 = torch.linspace(-1, 1, 16, dtype=F64).unsqueeze(1) if y0 is None else y0
    given = {"steps": 4, "trajectories": 64, "folder": None, "seed": 0} | options
    return fs.distill_sigdeg_step(
        sde, y0=y0, steps=given["steps"], folder=given["folder"], seed=given["seed"],
        teacher_options=fs.TeacherOptions(trajectories=given["trajectories"]),
        training=fs.TrainingOptions(6, 32, checkpoint_every=2),
    )[0]  # fmt: skip


def weights(step):
    return list(step.network.state_dict().values())


def test_fit_is_a_function_of_its_seed_also_when_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(distill_step, "ROUNDS", 2)
    want = weights(fitted())
    loss = distill_step._Task.loss

    def killed(self, batch):
        if batch.iteration == 5:
            raise KeyboardInterrupt
        return loss(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(distill_step._Task, "loss", killed)
        with pytest.raises(KeyboardInterrupt):
            fitted(folder=tmp_path)
    again = weights(fitted(folder=tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(want, again, strict=True))
    other = weights(fitted(seed=1))
    assert not all(torch.equal(a, b) for a, b in zip(want, other, strict=True))


def test_fit_is_equivariant_to_units(monkeypatch):
    monkeypatch.setattr(distill_step, "ROUNDS", 2)
    sde, much = SINE, 1024.0  # a power of two: rounding is the same
    big = replace(
        sde, drift=lambda t, y: much * sde.drift(t, y / much),
        diffusion=lambda t, y: much * sde.diffusion(t, y / much),
    )  # fmt: skip
    y0 = torch.linspace(-1, 1, 16, dtype=F64).unsqueeze(1)
    a, b = fitted(sde, y0).network(GRID[1], y0), fitted(big, much * y0).network(GRID[1], much * y0)
    torch.testing.assert_close(much * a, b)


def test_constant_component_and_single_precision(monkeypatch):
    monkeypatch.setattr(distill_step, "ROUNDS", 4)
    move = torch.tensor([1.0, 0.0])
    sde = fs.SDE(lambda t, y: -y * move, lambda t, y: (0.8 + 0.6 * torch.cos(y)) * move)
    y0 = torch.stack([torch.linspace(-1, 1, 16), torch.full((16,), 0.1)], 1)
    step = fitted(sde, y0, steps=8, trajectories=256)
    c = step.network(torch.tensor(0.5), y0)
    assert c.dtype == torch.float32
    assert bool(c.isfinite().all())
    exact = (0.8 + 0.6 * torch.cos(y0[:, 0])) * -0.6 * torch.sin(y0[:, 0])
    assert (c[:, 0, 0] - exact).abs().mean() < 0.02
    assert c[:, 1].abs().max() < 1e-3


def test_file_without_units_loads(tmp_path):
    network = Coefficients(2, TERMS).to(F64)
    torch.nn.init.normal_(network.head.weight, generator=torch.Generator().manual_seed(0))
    fs.SigStep(network).save(tmp_path / "step.safetensors")
    with safe_open(tmp_path / "step.safetensors", framework="pt") as f:
        meta = json.loads(f.metadata()["fewstep"])
    del meta["config"]["scaled"]
    held = load_file(tmp_path / "step.safetensors")
    assert {k.split(".")[1] for k in held} == {"body", "head"}
    save_file(held, tmp_path / "old.safetensors", {"fewstep": json.dumps(meta)})
    old, y = fs.load(tmp_path / "old.safetensors"), torch.linspace(-1, 1, 8, dtype=F64).reshape(4, 2)
    assert torch.equal(old.network(GRID[1], y), network(GRID[1], y))


def test_resume_rejects_checkpoint_of_other_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(distill_step, "ROUNDS", 2)
    y0 = torch.linspace(0.5, 1.5, 64)[:, None]
    one, other = (fs.SDE(lambda t, y, a=a: a * y, lambda t, y: 0.2 * y) for a in (-1.0, 1.0))
    fitted(one, y0, folder=tmp_path)
    for sde, steps in ((other, 4), (one, 8)):
        with pytest.raises(fs.InputError, match="checkpoint"):
            fitted(sde, y0, steps=steps, folder=tmp_path)
