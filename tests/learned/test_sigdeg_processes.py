"""Sig-DEG on several processes gives the student of a single process."""

import pytest
import torch

import fewstep as fs

EDM = fs.EDM(0.05, 10.0)


def denoiser(x, sigma):
    return x / (1 + sigma * sigma)


def distil(folder):
    student, report = fs.distill_sigdeg(
        fs.DiffusionModel(denoiser, EDM), steps=3, teacher_steps=6, event_shape=(2,), folder=folder,
        teacher_options=fs.TeacherOptions(trajectories=600),
        training=fs.TrainingOptions(12, 33, checkpoint_every=6),
    )  # fmt: skip
    return student.network.state_dict(), report.student_rmse


def worker(rank, world, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(distil(folder / "work"), folder / f"student.{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12; the workers have one thread
@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_processes_give_the_student_of_one(world, tmp_path):
    """Unrolled: only the summation order of a minibatch differs, which changes rounding."""
    want, rmse = distil(None)
    # forked: a spawned process imports torch first
    torch.multiprocessing.start_processes(worker, (world, tmp_path), nprocs=world, start_method="fork")
    for rank in range(world):
        got, mine = torch.load(tmp_path / f"student.{rank}", weights_only=True)
        assert abs(mine - rmse) < 1e-4 * rmse
        for k, v in want.items():
            torch.testing.assert_close(got[k], v, rtol=1e-3, atol=1e-4)
