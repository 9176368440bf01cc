"""The command line: help, completion, results, errors, Ctrl-C and output files."""

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
import torch

import fewstep as fs
from fewstep.catalog import solver_named
from fewstep_analysis import convergence, diffusion_problems, distillation, problems
from fewstep_analysis.cli import app, common, completion, main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    str(page.relative_to(ROOT))
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    if page.name != "CHANGELOG.md" and "_build" not in page.parts
]
RUN = "from fewstep_analysis.cli import main; main()"
COMMANDS = {path: command for path, command, _ in app.helps()}
HELP = {path: text for path, _, text in app.helps()}


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Run a command in this process and an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(words):
        monkeypatch.setattr(sys, "argv", ["fewstep", *words.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


def examples(page):
    """The command lines of a page, or those of all help texts for None."""

    def joined(text):
        return re.sub(r"\\\n\s*", "", text)

    if page is None:
        return [line for text in HELP.values() for line in re.findall("Example: (fewstep .*)", joined(text))]
    text = re.sub(r"<!-- cli-.*?<!-- end -->", "", (ROOT / page).read_text(), flags=re.S)  # the help texts
    pattern = r"(?:^ *|&& |[A-Z_]+=\S+ |`)(fewstep [a-z][^`\n]*)"
    found = re.findall(pattern, joined(text), re.M)
    return [re.split("&&|[|]", line)[0] for line in found]


@pytest.mark.parametrize("page", [None, *(p for p in PAGES if examples(p))])
def test_examples_parse_and_name_what_exists(page):
    names = [*problems.PROBLEMS, *distillation.TASKS]
    for line in examples(page):
        words, command = app.repeat_nfe(shlex.split(line, comments=True)[1:]), COMMANDS["fewstep"]
        while words and words[0] in getattr(command, "commands", {}):
            command, words = command.commands[words[0]], words[1:]
        if not words or "NAME" in words:  # the name of a command, or a pattern
            continue
        assert not hasattr(command, "commands"), f"no command {words[0]}"
        params = command.make_context("fewstep", words).params
        given = params.get("solver") or []
        for name in [*given, *([params["base"]] if "base" in params else [])]:
            solver_named(name)
        assert params.get("problem", "sine") in names, line


@pytest.mark.parametrize("path", HELP)
def test_help_fits_a_terminal_and_has_examples(path):
    text = HELP[path]
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) <= 42
    if not hasattr(COMMANDS[path], "commands"):
        found = re.findall(r"Example: (.*)", text)
        assert found
        assert all(line.startswith(path) for line in found)
        assert "--json" in text
        for p in COMMANDS[path].params:
            assert p.help or p.name == "help", p.name


def test_help_and_completion_of_words_do_not_import_torch():
    code = """
import contextlib, io, os, sys
from fewstep_analysis.cli import main
printed = io.StringIO()
def run(*words, **env):
    sys.argv = ["fewstep", *words]
    os.environ.update(env)
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main()
for line in ("--help", "--version", "convergence --help", "fit-table --help", "distill dode --help"):
    run(*line.split())
for line in ("conv", "convergence --weak squ", "convergence --dtype float3", "demo --device cu"):
    words = ["fewstep", *line.split()]
    run(_FEWSTEP_COMPLETE="complete_bash", COMP_WORDS=" ".join(words), COMP_CWORD=str(len(words) - 1))
print(printed.getvalue())
print([m for m in ("torch", "numpy", "matplotlib", "scipy") if m in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *printed, heavy = out.stdout.splitlines()
    assert heavy == "[]"
    found = ["convergence", "square", "float32", "cuda"]
    assert [w for w in printed if w in found][-4:] == found


def test_completion_offers_names_that_the_library_accepts():
    sdes, samplers = completion.sde_solvers(), completion.samplers()
    assert {"milstein", "euler_maruyama", "shark"} <= set(sdes)
    assert {"ddim", "uni_pc-3", "dpm_solver_pp-2s", "edm_heun"} <= set(samplers)
    assert all(isinstance(solver_named(n), fs.StochasticSolver) for n in sdes)
    assert all(isinstance(solver_named(n), fs.DiffusionSolver) for n in samplers)
    assert completion.complete(completion.REFERENCES, completion.sde_solvers)("sri") == ["srid2"]
    for problem, start, expected in (("ring", "edm", "edm_heun"), ("sine", "mils", "milstein")):
        context = SimpleNamespace(params={"problem": problem})
        assert completion.complete_solver(context, start) == [expected]
    assert completion.sde_problems() == list(problems.PROBLEMS)
    assert completion.diffusion_problems() == list(diffusion_problems.PROBLEMS)
    assert completion.models() == list(distillation.TASKS)
    assert completion.REFERENCES == convergence.REFERENCES
    assert list(completion.TESTS) == list(convergence.TESTS)


def test_command_without_its_libraries_says_what_to_install():
    code = f"import sys; sys.modules['typer'] = None; {RUN}"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 2
    assert out.stderr.splitlines() == [out.stderr.strip()]
    assert "pip install scipy matplotlib torchsde typer rich" in out.stderr


RESULTS = {
    "convergence": (
        "convergence --solver euler_maruyama --solver milstein --problem sine --reference levels "
        "--levels 1 3 --paths 9",
        "EulerMaruyama: order",
        ["order.json", "order.svg"],
    ),
    "weak": (
        "convergence --solver milstein --problem sine --levels 1 3 --paths 9 --weak square "
        "--reference srid2 --dtype float32 --block 5 --out w.pdf",
        "Milstein: order",
        ["w.json", "w.pdf"],
    ),
    "samplers": (
        "work-precision --problem gaussian --solver ddim --nfe 3 5 --paths 20 --no-peers --out w.png",
        "DDIM",
        ["w.json", "w.png"],
    ),
    "sdes": (
        "work-precision --solver milstein --solver srid2 --levels 2 3 --paths 9",
        "torchsde",
        ["work.json", "work.svg"],
    ),
    "compare": (
        "compare --problem gaussian --nfe 3 --samples 4 --solver unipc:2 --solver ddim --spacing karras",
        "UniPC(2)",
        ["compare.json", "compare.svg"],
    ),
    "dode": (
        "distill dode --problem gaussian --steps 2 --samples 16 --teacher-substeps 2",
        "R^2 by row",
        ["dode.safetensors"],
    ),
    "table": (
        "fit-table --problem gaussian --steps 3 --samples 32 --starts 1 --iterations 3",
        "(untrained): rmse",
        ["table.safetensors"],
    ),
    "stochastic table": (
        "fit-table --problem gaussian --nfe 2 --samples 32 --levy H --starts 1 --iterations 2 --out k.safetensors",
        "teacher: EulerMaruyama",
        ["k.safetensors"],
    ),
}


@pytest.mark.parametrize("case", RESULTS)
def test_commands_write_files_and_print_one_json_document(case, cli, monkeypatch):
    words, text, wrote = RESULTS[case]
    lines = []
    tell = common.tell
    monkeypatch.setattr(common, "tell", lambda *result: (lines.extend(result[2]), tell(*result)))
    code, out, err = cli(f"{words} --json")
    assert code == 0, err
    assert text in "\n".join(lines)  # what is printed without --json
    assert "\x1b" not in out + err  # no colours in a pipe
    assert "%|" not in err  # no progress bar in a pipe
    document = json.loads(out)
    assert sorted(document["wrote"]) == wrote
    if wrote[0].endswith(".json"):
        kept = json.loads(Path(wrote[0]).read_text())
        assert {k: document[k] for k in kept} == kept
    if case == "weak":
        estimate = document["data"]["estimates"][0]
        facts = {k: estimate[k] for k in ("test", "reference", "dtype", "paths")}
        assert facts == {"test": "square", "reference": "SRID2", "dtype": "float32", "paths": 9}
    if case == "sdes":
        by = {(one["package"], one["name"]): one["error"] for one in document["data"]["series"]}
        for ours, theirs in (("Milstein", "milstein"), ("SRID2", "srk")):  # the same methods and path
            assert by["fewstep", ours] == pytest.approx(by["torchsde", theirs], rel=1e-9)


@pytest.mark.parametrize("levy", ["", " --levy K"])
def test_fit_table_saves_the_table_of_the_library(levy, cli, monkeypatch):
    made, fit = [], fs.fit_table
    monkeypatch.setattr(fs, "fit_table", lambda *args, **options: made.append(fit(*args, **options)) or made[-1])
    words = "fit-table --problem smooth --steps 3 --samples 32 --starts 1 --iterations 2 --seed 5"
    code, out, err = cli(words + levy + " --json")
    assert code == 0, err
    model = distillation.task("smooth")
    own, _ = fit(model.problem, nfe=3, noise=model.noise(32, 5), levy=levy[-1:] or None, starts=1, iterations=2, seed=5)
    (table, report), saved = made[0], fs.load("table.safetensors").tensors()
    for name, column in table.tensors().items():
        torch.testing.assert_close(saved[name], column, rtol=0, atol=0, equal_nan=True)
        # two fits of the library differ in their last digits, also on one thread
        torch.testing.assert_close(column, own.tensors()[name], rtol=1e-4, atol=1e-6, equal_nan=True)
    assert json.loads(out)["student_errors"]["rmse"] == report.student_errors.rmse


def test_results_are_text_without_json(cli):
    words, text, wrote = RESULTS["dode"]
    code, out, err = cli(words)
    assert code == 0, err
    assert text in out
    assert out.splitlines()[-1] == f"wrote {wrote[0]}"


def test_solvers_lists_cards_as_text_and_json(cli):
    code, text, _ = cli("solvers")
    rows = json.loads(cli("solvers --json")[1])
    assert code == 0
    assert all(row["solver"] in text for row in rows)
    assert {r["solver"] for r in rows} == set(fs.solvers())


def test_tables_are_drawn_on_a_terminal(monkeypatch):
    rows = [["Milstein", "1"]]
    assert common.table(["solver", "order"], rows) == "solver    order\nMilstein  1"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert "│ Milstein │ 1" in common.table(["solver", "order"], rows)


REMARKS = "1 thread, as tensors of 65,536 numbers are small; --threads N changes it\na remark\n"


@pytest.fixture
def demo(monkeypatch):
    """Replaces the work of `fewstep demo`."""

    def use(act):
        def run(out, *, seed, quick, train, device):
            print("a remark")
            act(out)
            return SimpleNamespace(body=lambda: {"kind": "demo"})

        monkeypatch.setattr("fewstep_analysis.demo.run", run)
        monkeypatch.setattr("fewstep_analysis.demo.lines", lambda record, out: [])

    return use


def test_output_during_the_work_goes_to_stderr(cli, demo):
    demo(lambda out: None)
    code, out, err = cli("demo --json")
    assert (code, json.loads(out), err) == (0, {"kind": "demo", "wrote": []}, REMARKS)


@pytest.mark.parametrize("file", [None, "student"])
def test_ctrl_c_reports_the_files_written(file, cli, demo):
    def act(out):
        if file:
            out.mkdir()
            (out / file).write_text("done")
        raise KeyboardInterrupt

    demo(act)
    code, out, err = cli("demo --out o")
    stopped = f"written so far: {Path('o') / file}" if file else "nothing was written"
    assert (code, out, err) == (130, "", f"{REMARKS}fewstep: stopped; {stopped}\n")


def test_non_finite_results_exit_with_code_1(cli, demo):
    def act(out):
        raise fs.NonFiniteError("inf at step 3.", step=3, paths=1)

    demo(act)
    assert cli("demo") == (1, "", f"{REMARKS}fewstep: inf at step 3.\n")


@pytest.mark.parametrize(
    ("words", "threads", "why"),
    [
        ("", 1, "as tensors of 65,536 numbers are small"),
        (" --threads 3", 3, "as asked"),
        (" --threads 1", 1, "as asked"),
    ],
)
def test_the_command_line_chooses_threads_and_prints_them(words, threads, why, cli, demo, monkeypatch):
    used = [2]  # of torch before
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    demo(lambda out: None)
    assert f"{threads} thread{'s' * (threads > 1)}, {why}; --threads" in cli("demo" + words)[2]
    assert used[-1] == threads


@pytest.mark.parametrize(
    ("name", "samples", "threads"),
    [("ring", 512, 1), ("digits", 512, 1), ("digits", 10**5, 2), ("mnist", 16, 1), ("mnist", 512, 2)],
)
def test_threads_follow_the_size_of_the_work(name, samples, threads, monkeypatch):
    used = [2]
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    if name == "mnist":
        pytest.importorskip("diffusers")
    common.use_threads(None, distillation.numbers(name, samples))
    assert used[-1] == threads


TORCHRUN = """
import sys, time, torch, torch.distributed as dist
from fewstep_analysis import convergence
from fewstep_analysis.cli import main

def strong_orders(*args, **options):
    dist.barrier()
    print("ready", file=sys.stderr, flush=True)
    if dist.get_rank():
        dist.all_reduce(torch.zeros(1))  # waits for the other process
    time.sleep(300)

convergence.strong_orders = strong_orders
sys.argv = ["fewstep", "convergence", "--solver", "milstein"]
main()
"""


@pytest.mark.slow
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
    "demo --out file": "file is a file, expected a folder",
    "convergence --solver milstein --out folder.svg": "is a folder, expected a file",
    "convergence --solver milstein --out taken.svg": "taken.json is a folder",
    "work-precision --out w.json": "expected a file that ends in .svg, .png, .pdf",
    "work-precision --out file/w.svg": "file is a file, expected a folder",
    "distill dode --problem ring --out folder.svg": "is a folder, expected a file",
    "fit-table --problem ring --out folder.svg": "is a folder, expected a file",
    "demo --out /proc/demo": "nothing can be written in /proc",
}


@pytest.mark.parametrize("words", PLACES)
def test_output_that_cannot_be_written_is_rejected_before_the_work(words, cli, monkeypatch):
    if "/proc" in words and not Path("/proc").is_dir():
        pytest.skip("no /proc here")
    Path("file").write_text("")
    Path("folder.svg").mkdir()
    Path("taken.json").mkdir()
    monkeypatch.setattr(common, "working", lambda *args: pytest.fail("the work began"))
    code, out, err = cli(words)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert PLACES[words] in err


BAD = {
    "convergence --solver milsten": "Did you mean 'milstein'",
    "convergence --solver ddim": "expected an object such as EulerMaruyama()",
    "convergence --solver milstein --problem gbm": "problem: got 'gbm'",
    "convergence --solver milstein --reference srid": "Did you mean 'srid2'",
    "convergence --solver milstein --reference euler_maruyama": "cannot judge",
    "convergence --solver milstein --weak squares --reference levels": "Did you mean 'square'",
    "convergence --solver milstein --dtype float16": "dtype: got 'float16'",
    "convergence --solver milstein --levels 4 5": "at least three",
    "convergence --solver milstein --device cuda:99": "device: got 'cuda:99'",
    "convergence --solver sh_ark": "'diagonal' noise",
    "work-precision --problem sin": "Did you mean 'sine'",
    "work-precision --problem ring --solver ddimm": "Did you mean 'ddim'",
    "work-precision --problem ring --solver ddpm": "expected ODE solvers",
    "compare --problem ring --solver ddpm": "draws noise",
    "compare --problem rung": "Did you mean 'ring'",
    "compare --problem ring --spacing karas": "Did you mean 'karras'",
    "fit-table --problem rings": "Did you mean 'ring'",
    "fit-table --problem ring --levy L": "levy: got 'L'",
    "fit-table --problem ring --samples 8": "at least 16",
    "fit-table --problem ring --nfe 0": "nfe: got 0",
    "distill dode --problem rings": "Did you mean 'ring'",
    "distill dode --problem ring --base unipc:9": "order: got 9",
    "demo --device cuda:99": "device: got 'cuda:99'",
    "solvers --device nonsense": "device: got 'nonsense'",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line_and_exit_code_2(words, cli):
    code, out, err = cli(words)
    lines = [line for line in err.splitlines() if not line.endswith("--threads N changes it")]
    assert (code, out, len(lines)) == (2, "", 1)
    assert BAD[words] in lines[0]
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("words", "message"), [("demo --seed -1", "expected 0 to 2^62"), ("demo --qiuck", "No such option")]
)
def test_bad_options_exit_with_code_2(words, message, cli):
    code, out, err = cli(words)
    assert (code, out) == (2, "")
    assert message in err


def test_version(cli):
    assert cli("--version")[:2] == (0, f"fewstep {fs.__version__}\n")


def test_closed_pipe_is_not_an_error():
    read, write = os.pipe()
    os.close(read)  # as by `| head`
    done = subprocess.run([sys.executable, "-c", RUN, "--help"], stdout=write, stderr=-1, text=True)
    os.close(write)
    assert done.stderr == ""


@pytest.mark.slow
def test_demo_student_is_near_its_teacher(tmp_path, cli):
    """The complete demo: table and student are near the teacher and far from its sampler in as few steps."""
    code, _, err = cli("demo --train --out d")
    assert code == 0, err
    table = json.loads((tmp_path / "d" / "report.json").read_text())["data"]["table"]
    teacher, plain, *fitted = (row["sliced_w2"] for row in table[:4])
    assert max(fitted) < 1.5 * teacher
    assert plain > 1.7 * max(fitted)
    assert table[0]["evaluations"] >= 50 * table[2]["evaluations"]


def test_quick_demo_writes_its_files(tmp_path, cli, monkeypatch):
    for name, value in {"TEACHER_STEPS": 20, "SAMPLES": 500, "QUICK_SHARE": 100, "LEVELS": range(2, 5)}.items():
        monkeypatch.setattr(f"fewstep_analysis.demo.{name}", value)
    code, out, err = cli("demo --quick --train --out d")
    assert code == 0, err
    for name in ("digits.png", "convergence.png", "report.json", "table.safetensors", "student.safetensors"):
        assert (tmp_path / "d" / name).stat().st_size > 1000
        assert name in out
    assert "Next:" in out
