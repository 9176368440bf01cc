"""Damaged and hostile files, and missing extras: one clear error each."""

import json
import os
import pickle
import struct
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import fewstep as fs
from fewstep.learned.sfddm.process import StudentProcess
from fewstep.learned.sigdeg.networks import DenoisingMLP
from fewstep.learned.unet_denoiser import unet_class
from fewstep_analysis import Record, figures, teachers

NET = DenoisingMLP((3,), 8, 1).eval().requires_grad_(False)
PROBLEM = fs.DiffusionModel(NET, fs.EDM(0.1, 10.0))
SIGMAS = torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64)
EASY = settings(max_examples=12, deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck))  # fmt: skip


def trajectories(folder):
    return fs.make_trajectories(PROBLEM, SIGMAS, count=8, event_shape=(3,), substeps=2, folder=folder)


def training(folder):
    """Three iterations with a checkpoint after each, or those that are not done yet."""
    data = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    options = fs.TrainingOptions(iterations=3, batch_size=4, checkpoint_every=1)
    schedule = fs.DiscreteVP.named(steps=20)
    fs.distill_sfddm(teacher=NET, schedule=schedule, steps=3, data=data, training=options, folder=folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file of every kind that the library writes, keyed by name, and their readers."""
    home = tmp_path_factory.mktemp("files")
    process = StudentProcess(fs.DiscreteVP.named(steps=20), torch.tensor([3, 9, 19]))
    noise = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    table, _ = fs.distill_dode(PROBLEM, fs.DDIM(), noise=noise, steps=2, teacher_substeps=2)
    from fewstep.learned.sigdeg.networks import Coefficients

    made = {
        "plan.safetensors": fs.DDIM().plan(SIGMAS), "table.safetensors": table, "table.json": table,
        "sampler.safetensors": fs.SigSampler(fs.EulerMaruyama().plan(SIGMAS), NET.with_signature(2)),
        "step.safetensors": fs.SigStep(Coefficients(2, 5)), "sfddm.safetensors": fs.SFDDM(NET, process),
        "record.json": Record("k", {"a": [1.0]}, 0, {}),
    }  # fmt: skip
    for name, value in made.items():
        value.save(home / name)
    teachers.save(NET, home / "teacher.safetensors")
    trajectories(home / "folder")
    training(home / "training")
    readers = dict.fromkeys(made, fs.load) | {
        "record.json": Record.load, "teacher.safetensors": teachers.load,
        "folder/block-00000.safetensors": lambda path: trajectories(path.parent),
        "folder/trajectories.json": lambda path: trajectories(path.parent),
        "training/sfddm-3.training": lambda path: training(path.parent),
    }  # fmt: skip
    return home, readers


KINDS = [
    "plan.safetensors", "table.safetensors", "table.json", "sampler.safetensors", "step.safetensors",
    "sfddm.safetensors", "record.json", "teacher.safetensors", "folder/block-00000.safetensors",
    "folder/trajectories.json", "training/sfddm-3.training",
]  # fmt: skip
TENSORS = [k for k in KINDS if not k.endswith(".json")]
LEFT_OUT = "block-00000"  # memory-mapped, not read: training refuses what is not finite


def refused(files, name, content):
    """Replace the file by this content, read it, restore the file."""
    home, readers = files
    path = home / name
    good = path.read_bytes()
    try:
        path.write_bytes(content)
        with pytest.raises(fs.InputError):
            readers[name](path)
        assert path.read_bytes() == content  # a file that was refused is left alone
    finally:
        path.write_bytes(good)


def test_good_files_are_read(files):
    home, readers = files
    assert sorted(readers) == sorted(KINDS)
    for name, reader in readers.items():
        reader(home / name)


@pytest.mark.parametrize("name", KINDS)
def test_truncated_files_are_refused(files, name):
    good = (files[0] / name).read_bytes()

    @EASY
    @given(st.integers(0, len(good) - 3))  # a text's last brace and its newline
    def run(length):
        refused(files, name, good[:length])

    run()


@pytest.mark.parametrize("name", KINDS)
def test_flipped_bytes_are_refused_or_harmless(files, name):
    home, readers = files
    good = (home / name).read_bytes()
    head = len(good) if name.endswith(".json") else 8 + struct.unpack("<Q", good[:8])[0]

    @EASY
    @given(st.integers(0, head - 1), st.integers(1, 255))
    def run(place, mask):
        path = home / name
        try:
            path.write_bytes(good[:place] + bytes([good[place] ^ mask]) + good[place + 1 :])
            readers[name](path)
        except fs.InputError:
            pass
        finally:
            path.write_bytes(good)

    run()


class Bomb:
    def __reduce__(self):
        return (sys.exit, ("the file ran code",))


@pytest.mark.parametrize("name", KINDS)
def test_hostile_files_are_refused_and_run_no_code(files, name, tmp_path):
    torch.save({"a": 1}, tmp_path / "x.pt")
    deep = b"[" * 100_000
    long = struct.pack("<Q", 2**62) + b"{}"
    header = b'{"__metadata__":{"fewstep":"' + b"[" * 20_000 + b'"}}'
    for content in (
        b"", b"{}", b"null", b"[]", deep, long, struct.pack("<Q", len(deep)) + deep, pickle.dumps(Bomb()),
        struct.pack("<Q", len(header)) + header, (tmp_path / "x.pt").read_bytes(), b"\xff" * 64,
    ):  # fmt: skip
        refused(files, name, content)


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_tensors_are_refused(files, name, tmp_path):
    with safe_open(files[0] / name, framework="pt") as file:
        meta = file.metadata()
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
    # nan is a value of two columns of a plan
    candidates = {k: v for k, v in tensors.items() if v.is_floating_point() and k not in ("noise", "kappa")}
    first = next(k for k, v in candidates.items() if v.dim() > 1)
    value = tensors[first]
    bad = {
        "missing": None, "shape": value[:-1], "flat": value.flatten(), "complex": value.to(torch.complex64),
        "wide": torch.cat([value, value], -1),
    } | ({} if LEFT_OUT in name else {"nan": value * float("nan")})  # fmt: skip
    for other in bad.values():
        changed = {k: v for k, v in tensors.items() if k != first}
        changed |= {} if other is None else {first: other.contiguous()}
        save_file(changed, tmp_path / "x", meta)
        refused(files, name, (tmp_path / "x").read_bytes())


@pytest.mark.parametrize("name", [k for k in KINDS if "block" not in k])
def test_metadata_of_another_type_is_refused_or_harmless(files, name, tmp_path):
    """Each entry of the metadata in turn gets another type: InputError, or a valid object."""
    home, readers = files
    path, good = home / name, (home / name).read_bytes()
    if name.endswith(".json"):
        meta, write = json.loads(good), lambda m: path.write_text(json.dumps(m))
    else:
        with safe_open(path, framework="pt") as file:
            meta = json.loads(file.metadata()["fewstep"])
            tensors = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
        write = lambda m: save_file(tensors, path, {"fewstep": json.dumps(m)})  # noqa: E731
    for key in meta:
        for value in (None, 7, -1, "x", [], {}, [[1]], {"a": None}, 1e400, True):
            try:
                write(meta | {key: value})
                readers[name](path)
            except fs.InputError:
                assert path.exists()
            finally:
                path.unlink(missing_ok=True)
                path.write_bytes(good)


MISSING = {
    "diffusers": (unet_class, "pip install diffusers"),
    "diffusers integration": (lambda: __import__("fewstep.integrations.diffusers"), "pip install diffusers"),
    "comfy": (lambda: __import__("fewstep.integrations.k_diffusion", fromlist=["x"]).register("x", fs.DDIM()),
              "ComfyUI cannot be imported"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSING)
def test_missing_extra_is_named(name, monkeypatch):
    call, words = MISSING[name]
    for module in [m for m in sys.modules if m.split(".")[0] == name.split()[0]]:
        monkeypatch.delitem(sys.modules, module)
    for module in [m for m in sys.modules if m.startswith("fewstep.integrations.diffusers")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name.split()[0], None)
    with pytest.raises((fs.InputError, ImportError), match=words):
        call()


# how each file writer is called: all of them go through one place
WRITERS = {
    "plan.safetensors": lambda path: fs.DDIM().plan(SIGMAS).save(path),
    "plan.json": lambda path: fs.DDIM().plan(SIGMAS).save(path),
    "student.safetensors": lambda path: fs.SigStep(NET).save(path),
    "record.json": lambda path: Record("k", {"a": [1.0]}, 0, {}).save(path),
    "teacher.safetensors": lambda path: teachers.save(NET, path),
    "figure.svg": lambda path: figures.write(figures.canvas()[0], path),
}
HOLDS_A_FILE_OPEN = """
import sys, time
from fewstep._serialization import atomic_write
with atomic_write(sys.argv[1]) as file:
    print("open", flush=True)
    time.sleep(60)
"""


def saved(name, path):
    """Write a file, read it if there is a reader, and return the names in its folder."""
    WRITERS[name](path)
    if name.startswith(("plan", "student")):
        fs.load(path)
    return sorted(p.name for p in path.parent.iterdir())


@pytest.mark.parametrize("name", WRITERS)
def test_links_are_written_through(name, tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / f"target-{name}", tmp_path / name
    for to in (target, os.path.relpath(target, tmp_path)):  # at first dangling
        link.symlink_to(to)
        assert saved(name, link) == sorted([name, "real"])
        assert link.is_symlink()
        assert link.resolve() == target
        assert target.stat().st_size > 50
        link.unlink()


@pytest.mark.parametrize("name", WRITERS)
def test_places_that_cannot_be_written_are_refused(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / f"pipe-{name}")
    long = {"a" * 300 + name, "\N{LATIN SMALL LETTER E WITH ACUTE}" * 130 + name}
    for bad in ("folder", "loop/x-" + name, "file/" + name, f"pipe-{name}", *long):
        with pytest.raises(fs.InputError) as error:
            WRITERS[name](tmp_path / bad)
        assert len(str(error.value)) < 400
    assert saved(name, tmp_path / ("b" * 230 + name))
    assert not list(tmp_path.glob("*.part"))


def test_threads_and_processes_that_save_to_one_path_do_not_fail(tmp_path):
    path, failed = tmp_path / "plan.safetensors", []
    plans = [solver.plan(SIGMAS) for solver in (fs.DDIM(), fs.DEIS(), fs.UniPC(), fs.EulerMaruyama())]

    def save(plan):
        try:
            for _ in range(15):
                plan.save(path)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=save, args=(plan,)) for plan in plans]
    for act in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            act(thread)
    assert failed == []
    assert fs.load(path).name in [plan.name for plan in plans]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_files_of_killed_processes_are_removed_and_those_in_use_are_not(tmp_path):
    command = [sys.executable, "-c", HOLDS_A_FILE_OPEN, str(tmp_path / "killed.json")]
    (tmp_path / "mine.part").touch()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"open\n"
        assert len(saved("plan.json", tmp_path / "plan.json")) == 3
        process.kill()
    assert saved("record.json", tmp_path / "record.json") == ["mine.part", "plan.json", "record.json"]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "record.json"
    Record("k", {"a": 1.0}, 0, {}).save(path)
    before = path.read_bytes()
    for value in (float("nan"), float("inf"), object(), {1, 2}, {(1, 2): 3}):
        with pytest.raises(fs.InputError):
            Record("k", {"a": value}, 0, {}).save(path)
    with pytest.raises(fs.InputError):
        fs.SigStep(NET).save(tmp_path / "no" / "such" / "folder.safetensors")
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


def test_networks_that_share_memory_or_have_a_strange_config_can_be_saved(tmp_path):
    network = DenoisingMLP((3,), 8, 1)
    network.tied = torch.nn.ParameterList([next(network.parameters())])
    network.config = {"dtype": torch.float32}
    network.eval().requires_grad_(False)
    fs.SigStep(network).save(tmp_path / "x.safetensors")
    assert fs.load(tmp_path / "x.safetensors", network).network is network


@pytest.mark.parametrize("text", ['{"format": "a", "format": "b"}', '{"a": NaN}', '{"a": [-Infinity]}'])
@pytest.mark.parametrize("name", ["table.json", "record.json", "sfddm.safetensors"])
def test_json_outside_the_standard_is_refused(files, name, text, tmp_path):
    good = (files[0] / name).read_bytes()
    if name.endswith(".json"):
        refused(files, name, good.rstrip()[:-1] + b"," + text[1:].encode())
        return
    with safe_open(files[0] / name, framework="pt") as file:
        meta, tensors = file.metadata()["fewstep"], {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "x", {"fewstep": meta[:-1] + "," + text[1:]})
    refused(files, name, (tmp_path / "x").read_bytes())


def test_files_keep_their_permissions_and_read_only_ones_their_content(tmp_path):
    path = tmp_path / "plan.json"
    path.touch(mode=0o600)
    saved("plan.json", path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o400)
    if not os.access(path, os.W_OK):  # root may write
        with pytest.raises(fs.InputError, match="read-only"):
            saved("plan.json", path)


def test_files_have_the_permissions_of_others_in_their_folder(tmp_path):
    (tmp_path / "plain").touch()
    fs.DDIM().plan(torch.tensor([2.0, 1.0])).save(tmp_path / "plan.safetensors")
    assert (tmp_path / "plan.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
