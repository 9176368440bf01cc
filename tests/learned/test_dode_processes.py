"""D-ODE over several processes: one, two and three give the same table, with labels."""

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


FITS = {"greedy": {}, "three terms, guarded": dict(terms=3, guard=True)}


def fits():
    noise = 40 * torch.randn(96, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.randint(3, (96,), generator=torch.Generator().manual_seed(1))
    out = {}
    for name, options in FITS.items():
        options = dict(guard=False, batch=8, steps=5) | options
        table, report = fs.distill_dode(family, fs.DPMSolverPP(2), noise=noise, labels=labels, **options)
        out[name] = (table.tensors(), report.student_rmse, report.evaluations)
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


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12; the workers have one thread
@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_processes_return_the_same_table(world, alone, tmp_path):
    files = tmp_path / "store", tmp_path / "fits"
    # forked: a spawned process imports torch first
    torch.multiprocessing.start_processes(worker, (world, *files), nprocs=world, start_method="fork")
    shared = [torch.load(tmp_path / f"fits.{rank}", weights_only=True) for rank in range(world)]
    for name, (columns, rmse, evaluations) in alone.items():
        for one in shared:
            torch.testing.assert_close(one[name][0], columns, rtol=1e-7, atol=1e-9, equal_nan=True)
            assert abs(one[name][1] - rmse) < 1e-8 * rmse
            assert one[name][2] == evaluations
            # bitwise equal among the processes
            torch.testing.assert_close(one[name][0], shared[0][name][0], rtol=0, atol=0, equal_nan=True)
