"""The shell's side of the command line: help, completion, JSON, Ctrl-C, and places to write."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fewstep_analysis import solver_table as cards, convergence, diffusion_problems, parallel, problems, teachers
from  import experiments as studies
from fewstep_analysis.sampler_work import SOLVERS, letters
from experiments import dode_tools
from fewstep_analysis.cli import app as shown
from fewstep_analysis.cli import completion as names, common as shell

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
MAIN = "from fewstep_analysis.cli.app import main; main()"


EVERY = {path: command for path, command, _ in shown.helps()}
HELP = {path: text for path, _, text in shown.helps()}


def joined(text):
    return re.sub(r"\\\n\s*", "", text)


def examples():
    for path, text in HELP.items():
        for line in re.findall(r"Example: (fewstep .*)", joined(text)):
            yield path, line
    for page in PAGES:
        if "_generated" not in page.parts and "_build" not in page.parts:
            for line in re.findall(
                r"(?:^ *|&& |[A-Z_]+=\S+ |`)(fewstep [a-z][^`\n]*)", joined(page.read_text()), re.M
            ):
                yield page.name, re.split("&&|[|]", line)[0]


WORDS = {
    "solver": lambda: [*names.sde_solvers(), *SOLVERS], "base": names.bases,
    "budget": lambda: ("smoke", "paper"),
    "problem": lambda: [*names.sde_problems(), *names.models()], "weak": lambda: ("", *names.weak_tests()),
    "reference": lambda: [*names.REFERENCES, *names.sde_solvers()], "dtype": lambda: ("float32", "float64"),
    "name": lambda: ("", *names.studies(), *names.TEACHERS),
}  # fmt: skip


@pytest.mark.parametrize(("where", "line"), list(examples()))
def test_every_example_parses_and_names_what_there_is(where, line):
    words, command = shown.spread(shlex.split(line, comments=True)[1:]), EVERY["fewstep"]
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    if not words or "NAME" in words:  # a command called by its name, or a pattern
        return
    assert not hasattr(command, "commands"), f"no command {words[0]}"
    params = command.make_context("fewstep", words).params
    for option, known in WORDS.items():
        given = params.get(option) or []
        for value in [given] if isinstance(given, str) else given:
            assert "$" in value or letters(value) in map(letters, known()), option


@pytest.mark.parametrize("path", HELP)
def test_help_fits_a_terminal_and_has_examples(path):
    text = HELP[path]
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) <= 42
    if not hasattr(EVERY[path], "commands"):
        found = re.findall(r"Example: (.*)", text)
        assert found, path
        assert all(line.startswith(path) for line in found)
        assert "--json" in text
        for p in EVERY[path].params:
            assert p.help or p.name == "help", p.name


def test_help_and_completion_do_without_torch():
    code = """
import contextlib, io, os, sys
from fewstep_analysis.cli.app import main
said = io.StringIO()
def run(*words, **env):
    sys.argv = ["fewstep", *words]
    os.environ.update(env)
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main()
for line in ("--help", "--version", "convergence --help", "study", "study --json", "study nosuch"):
    run(*line.split())
for line in ("study head", "convergence --solver milst", "distill dode --base uni", "train-teacher mnist-",
             "work-precision --problem ring --solver edm", "convergence --weak squ", "study x --budget sm"):
    words = ["fewstep", *line.split()]
    run(_FEWSTEP_COMPLETE="complete_bash", COMP_WORDS=" ".join(words), COMP_CWORD=str(len(words) - 1))
print(said.getvalue())
print([m for m in ("torch", "numpy", "fewstep", "rich") if m in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *said, heavy = out.stdout.splitlines()
    assert heavy == "[]"
    found = ["headline-orders", "milstein", "uni_pc-2", "uni_pc-3", "mnist-features", "edm_heun", "square",
             "smoke"]  # fmt: skip
    assert [w for w in said if w in found] == found
    assert "Did you mean" not in out.stdout
    assert "'nosuch'" in out.stderr


def test_the_names_that_complete_are_the_library_s():
    import fewstep

    able = [n for n, c in fewstep.solvers().items() if c.card.strong_order and cards.plain(c)]
    assert sorted(names.sde_solvers()) == sorted(map(names.snake, able))
    assert names.sde_problems() == list(problems.PROBLEMS)
    assert names.diffusion_problems() == list(diffusion_problems.PROBLEMS)
    assert names.models() == list(dode_tools.TASKS)
    assert [letters(n) for n in names.samplers()] == [letters(n) for n in SOLVERS]
    assert [letters(n) for n in names.bases()] == [letters(n) for n in (*SOLVERS, *dode_tools.MORE)]
    assert names.weak_tests() == list(convergence.TESTS)
    assert names.REFERENCES == convergence.REFERENCES
    assert names.studies() == studies.names()
    with pytest.raises(fewstep.InputError) as error:
        teachers.train("", "")
    assert all(n in str(error.value) for n in names.TEACHERS)


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """The command line in this process, in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["fewstep", *words])
        with pytest.raises(SystemExit) as ended:
            shown.main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def fake(monkeypatch):
    """A study that does what it is told; a teacher's training and a demo's run as well."""

    def use(act):
        def run(out, *, budget="", seed=0, device=""):
            print("a remark")
            act(out)
            return ["a line"]

        def demo(out, *, seed, quick, device):
            run(out)
            return SimpleNamespace(body=lambda: {"kind": "demo"})

        def train(name, path, *, seed, **options):
            run(path)
            return path

        monkeypatch.setattr(studies, "load", lambda name: SimpleNamespace(run=run))
        monkeypatch.setattr(teachers, "train", train)
        monkeypatch.setattr("fewstep_analysis.demo.run", demo)
        monkeypatch.setattr("fewstep_analysis.demo.words", lambda record, out: [])

    return use


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("done")


JSON = {
    "convergence": ("convergence --solver milstein --problem sine --reference levels --levels 1 3 --paths 9",
                    ["order.json", "order.svg"]),
    "samplers": ("work-precision --problem gaussian --solver ddim --nfe 3 --paths 20 --out w.png",
                 ["w.json", "w.png"]),
    "sde": ("work-precision --solver milstein --no-peers --levels 1 2 --paths 9", ["work.json", "work.svg"]),
    "dode": ("distill dode --problem gaussian --steps 2 --samples 16 --teacher-substeps 2",
             ["dode.safetensors"]),
    "solvers": ("solvers", None), "studies": ("study", None),
    "study": ("study dode-ring --out o", ["o/records/r.json"]),
    "demo": ("demo --out o/records", ["o/records/r.json"]),
    "teacher": ("train-teacher --out t", ["t"]),
}  # fmt: skip


@pytest.mark.parametrize("case", JSON)
def test_json_is_one_document_and_all_else_is_on_stderr(case, cli, fake):
    fake(lambda out: put({"study": out / "records" / "r.json", "demo": out / "r.json"}.get(case, out)))
    words, wrote = JSON[case]
    code, out, err = cli(*words.split(), "--json")
    assert code == 0, err
    document = json.loads(out)
    if wrote is not None:
        assert sorted(document["wrote"]) == wrote
        assert all(Path(w).is_file() for w in wrote)
    if case in ("study", "demo", "teacher"):
        assert err == "a remark\n"


def test_what_json_holds_is_the_record(cli):
    words = JSON["convergence"][0].split()
    document = json.loads(cli(*words, "--json")[1])
    kept = json.loads(Path("order.json").read_text())
    assert {k: document[k] for k in kept} == kept


def stop(path=None):
    def act(out):
        if path:
            put(out / path if out.name == "o" else Path(path))
        raise KeyboardInterrupt

    return act


STOPPED = {
    "nothing": ("study dode-ring --out o", None, "nothing was written"),
    "a record": ("study dode-ring --out o", "records/r.json",
                 "written so far: o/records/r.json; the same command begins again"),
    "work": ("study sfddm-digits --budget smoke --out o", "work/sfddm-digits-smoke-0/a.training",
             "finished parts are in o/work/sfddm-digits-smoke-0; the same command goes on from there"),
    "others' work": ("study sfddm-digits --out o", "work/sfddm-digits-smoke-0/a", "nothing was written"),
    "demo": ("demo --out o", "student", "written so far: o/student; the same command begins again"),
    "mnist": ("train-teacher mnist --out t", "t.training",
              "finished iterations are in t.training; add --resume to go on from there"),
    "digits": ("train-teacher digits --out t", None, "nothing was written"),
}  # fmt: skip


@pytest.mark.parametrize("case", STOPPED)
def test_ctrl_c_says_what_is_kept(case, cli, fake):
    words, path, said = STOPPED[case]
    fake(stop(path))
    code, out, err = cli(*words.split())
    assert (code, out) == (130, "")
    assert err == f"a remark\nfewstep: stopped; {said}\n"


def test_studies_that_keep_work_keep_it_where_ctrl_c_looks():
    """OUT/work/NAME-BUDGET...: a study that keeps parts under another name would be said to keep nothing."""
    for name in studies.names():
        text = (ROOT / "analysis" / "studies" / f"{name.replace('-', '_')}.py").read_text()
        for kept in re.findall(r'out / "work" / f?"([^"]*)"', text):
            assert kept.startswith(name + "-{budget}")


def test_sigint_to_the_real_demo(tmp_path):
    words = [sys.executable, "-c", MAIN, "demo", "--out", "d"]
    # a shell lets its background jobs ignore SIGINT, and children inherit that
    heard = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    with subprocess.Popen(words, cwd=tmp_path, stdout=-1, stderr=-1, text=True, **heard) as process:
        assert process.stderr.readline().startswith("[1/4]")  # the work has begun
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "fewstep: stopped; nothing was written\n")


TORCHRUN = """
import sys, time, torch, torch.distributed as dist
from fewstep_analysis import convergence
from fewstep_analysis.cli.app import main

def strong_orders(*args, **options):
    dist.barrier()
    print("ready", file=sys.stderr, flush=True)
    if dist.get_rank():
        dist.all_reduce(torch.zeros(1))  # waits for one that will not come
    time.sleep(300)

convergence.strong_orders = strong_orders
sys.argv = ["fewstep", "convergence", "--solver", "milstein"]
main()
"""


def test_sigint_under_torchrun_does_not_hang(tmp_path):
    (tmp_path / "code.py").write_text(TORCHRUN)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "code.py"]
    with subprocess.Popen(words, cwd=tmp_path, stderr=-1, text=True, start_new_session=True) as process:
        seen = 0
        while seen < 2:
            seen += process.stderr.readline().count("ready")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        begun = time.monotonic()
        _, err = process.communicate(timeout=100)
    assert time.monotonic() - begun < 60
    assert err.count("fewstep: stopped; nothing was written") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["code.py"]


PLACES = {
    "a file for the demo": ("demo --out file", "file is a file, expected a folder"),
    "a file for a study": ("study dode-ring --out file", "file is a file, expected a folder"),
    "a folder for a figure": ("convergence --solver milstein --out folder.svg", "is a folder, expected a file"),
    "a folder for a record": ("convergence --solver milstein --out taken.svg", "taken.json is a folder"),
    "no figure": ("work-precision --out w.json", "expected a file that ends in .svg, .png, .pdf"),
    "below a file": ("work-precision --out file/w.svg", "file is a file, expected a folder"),
    "no folder": ("train-teacher --out no/t", "does not exist; make it first"),
    "a folder for weights": ("train-teacher --out folder.svg", "is a folder, expected a file"),
    "a folder for a table": ("distill dode --problem ring --out folder.svg", "is a folder, expected a file"),
    "not writable": ("demo --out /proc/demo", "nothing can be written in /proc"),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(case, cli, monkeypatch):
    if case == "not writable" and not Path("/proc").is_dir():
        pytest.skip("no /proc here")
    Path("file").write_text("")
    Path("folder.svg").mkdir()
    Path("taken.json").mkdir()
    monkeypatch.setattr(shell, "working", lambda *args: pytest.fail("the work began"))
    words, said = PLACES[case]
    code, out, err = cli(*words.split())
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1
    assert Path("file").read_text() == ""
    assert not list(Path("folder.svg").iterdir())


BAD = {
    "paths": ("study dode-ring --paths 3", "paths: dode-ring takes none", 1),
    "device": ("convergence --solver milstein --device cuda:99", "device: got 'cuda:99'", 1),
    "demo's device": ("demo --device cuda:99", "device: got 'cuda:99'", 1),
    "a training's device": ("train-teacher digits --device cuda:99", "device: got 'cuda:99'", 1),
    "option": ("study --pahts 3", "No such option", None),
    "seed": ("demo --seed -1", "expected 0 to 2^62", None),
    "sampler": ("work-precision --problem ring --solver ddimm", "expected one of 'DDIM'", 1),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, cli):
    words, said, lines = BAD[case]
    code, out, err = cli(*words.split())
    assert (code, out) == (2, "")
    assert said in err
    assert lines is None or len(err.splitlines()) == lines
    assert not list(Path().iterdir())


def test_numbers_that_run_away_are_one_line(cli, fake):
    from fewstep import NonFiniteError

    def act(out):
        raise NonFiniteError("inf at step 3.", step=3, paths=1)

    fake(act)
    assert cli("study", "dode-ring") == (1, "", "a remark\nfewstep: inf at step 3.\n")


def test_version(cli):
    import fewstep

    assert cli("--version")[:2] == (0, f"fewstep {fewstep.__version__}\n")


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)  # as `| head` has when it has seen enough
    words = [sys.executable, "-c", MAIN, "study"]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_a_bar_on_a_terminal_and_none_in_a_pipe(kind, monkeypatch):
    monkeypatch.setattr(sys, "stderr", kind())
    assert list(parallel.progress([1, 2], "solver")) == [1, 2]
    assert ("0/2" in sys.stderr.getvalue()) == (kind is Terminal)
