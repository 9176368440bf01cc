"""Malformed and extreme options of every command: a result, or one clear error with exit code 2 or 1."""

import contextlib
import io
import signal
import sys

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fewstep_analysis import teachers
from fewstep_analysis.cli import app

SECONDS = 20  # of processor time
COMMANDS = {path: command for path, command, _ in app.helps() if not hasattr(command, "commands")}
# valid options with which a command takes less than a second
SHORT = {
    "convergence": "--solver euler_maruyama --problem sine --reference levels --levels 2 4 --paths 16",
    "work-precision": "--problem sine --solver milstein --levels 2 3 --paths 8 --no-peers",
    "compare": "--problem ring --nfe 2 --solver ddim --spacing karras --samples 4",
    "fit-table": "--problem ring --nfe 2 --samples 64 --starts 1 --iterations 1",
    "distill dode": "--problem ring --steps 2 --samples 16 --teacher-substeps 2 --iterations 1",
}
NOT_DRAWN = {"--help", "--measure"}  # the second writes to the package
# no plain count above 4, which could be a valid order for hours of work
VALUES = [
    "", " ", "x", "-1", "0", "1", "2", "3", "0.5", "-0.0", "1e3", "nan", "inf", "-inf", "1e400", "1e-320", "9" * 30,
    "9" * 5000, "2147483648000", "-9223372036854775809", "1_0", "0x10", "\u0663", "True", "None", "a" * 300, "a" * 5000,
    "é", "\udcff", "a\0b", "a\nb", "%s", "{x}", "[red]x[/red]", "--", "-", "-x", "--seed", "cpu", "cpu:7", "cuda",
    "cuda:99", "meta", "mps", "x.svg", "x.txt", "x.json", "x.safetensors", ".", "..", "/", "~", "/dev/null",
    "/proc/x.svg", "new/x.svg", "/dev/null/x.svg", "*", "ddim", "unipc:3", "unipc:99", "unipc:x", "unipc-2",
    "DDIM(", "DDIM()", "ddim:eta=x", "milstein", "milstein:3", "euler_maruyama", "object", "__init__", "os.system",
    "sine", "ring", "digits?", "karras", "ays-sdxl", "float16", "float64", "W", "K", "A", "square", "levels", "exact",
]  # fmt: skip


class Hang(BaseException):
    """A command that takes too long."""


def hang(*_):
    raise Hang


def ended(words):
    """The exit code of a command and what it wrote to stderr."""
    before, errors = sys.argv, io.StringIO()
    sys.argv = ["fewstep", *words]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            app.run()
    except SystemExit as stop:
        return stop.code or 0, errors.getvalue()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.argv = before
    return 0, errors.getvalue()


def fuzz(path, examples):
    command, words = COMMANDS[path], path.split()[1:]
    options = [p for p in command.params if not NOT_DRAWN & {*p.opts}]
    valid = SHORT.get(" ".join(words), "").split()

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, print_blob=False,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.lists(st.sampled_from(range(len(options))), min_size=1, max_size=2, unique=True), st.data())
    def run(chosen, data):
        given = [*valid]
        for option in (options[i] for i in chosen):
            given.append(data.draw(st.sampled_from([*option.opts, *option.secondary_opts])))
            if not option.is_flag:
                given += [data.draw(st.sampled_from(VALUES)) for _ in range(option.nargs)]
        code, errors = ended([*words, *given])
        assert code in (0, 1, 2), (given, code, errors)
        assert "Traceback" not in errors, given
        assert code == 0 or 0 < len(errors.splitlines()[-1]) < 2500, (given, errors)

    run()


def stop(device):
    raise OSError("the training of the demo is not run here")


@pytest.fixture
def limits(tmp_path, monkeypatch):
    """An empty folder, a limit of time, and a demo without its training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teachers, "digits", stop)
    handler = signal.signal(signal.SIGPROF, hang)
    yield
    signal.signal(signal.SIGPROF, handler)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", COMMANDS)
def test_wrong_options_give_a_result_or_one_clear_error(path, limits):
    fuzz(path, 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", COMMANDS)
def test_hundred_wrong_options_give_a_result_or_one_clear_error(path, limits):
    fuzz(path, 100)
