"""D-ODE over several processes: one, two and three give the same table, refined and labelled ones too."""

import pytest
import torch

import fewstep as fs

EDM = fs.EDM(0.02, 40.0)
STDS = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)


def family(labels):
    held = STDS[labels][:, None] ** 2

    def denoiser(x, s):
        v, side = held.to(x), torch.tanh(x / (held.to(x) + s.to(x) ** 2))
        return side + v / (v + s.to(x) ** 2) * (x - side)

    return fs.DiffusionModel(denoiser, EDM)


REFINED = dict(refine="global", iterations=30, minibatch=20)
FITS = {
    "greedy": {},
    "three terms, guarded": dict(terms=3, guard=True),
    "global": dict(REFINED, terms=2),
    "grid and weights": dict(REFINED, learn_grid=True, rate=0.03),
    "a minibatch of two": dict(
        REFINED, minibatch=2, learn_grid=True, rate=0.02
    ),  # the third of three processes has none of it
}


def fits():
    noise = 40 * torch.randn(96, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.randint(3, (96,), generator=torch.Generator().manual_seed(1))
    out = {}
    for name, options in FITS.items():
        options = dict(guard=False, batch=8, steps=5) | options
        student, report = fs.distill_dode(family, fs.DPMSolverPP(2), noise=noise, labels=labels, **options)
        out[name] = (student.plan.tensors(), report.student_rmse)
    return out


def worker(rank, world, file, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    torch.save(fits(), f"{out}.{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def alone():
    return fits()


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_processes_give_the_same_table(world, alone, tmp_path):
    torch.multiprocessing.spawn(worker, (world, tmp_path / "store", tmp_path / "fits"), nprocs=world)
    shared = [torch.load(tmp_path / f"fits.{rank}", weights_only=True) for rank in range(world)]
    for name in FITS:
        columns, student = alone[name]
        assert "refine" not in FITS[name] or student < 0.98 * alone["greedy"][1]  # it did move
        for one in shared:
            for k, column in columns.items():
                if not column.isnan().any():
                    torch.testing.assert_close(one[name][0][k], column, rtol=1e-7, atol=1e-9)
            assert abs(one[name][1] - student) < 1e-8 * student
        for one in shared[1:]:  # among themselves to the bit
            assert all(torch.equal(v, one[name][0][k]) for k, v in shared[0][name][0].items()
                       if not v.isnan().any())  # fmt: skip
