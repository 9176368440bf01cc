"""Malformed and extreme input to every public callable: a result or one clear error, in seconds."""

import inspect
import itertools
import resource
import signal
import warnings

import pytest

pytest.importorskip("diffusers")  # the table calls all integrations
from extreme_values import VALUES
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from public_calls import CALLS, ROWS, name_of

import fewstep as fs

SECONDS, MEMORY = 8, 12 << 30  # of processor time; more is a hang, or memory taken before the input was checked
TABLE = [(call, good) for call, good, *_ in [*ROWS, *CALLS]]
# bases of users' own classes, and exceptions
NOT_CALLED = {"DiffusionSolver", "Solver", "StochasticSolver", "Schedule", "InputError", "StepSizeError"}


def arguments(call, good):
    """The names of all arguments, and those that must be given and are not in `good`."""
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    found = [p for p in inspect.signature(call).parameters.values() if p.kind in kinds and p.name != "progress"]
    needed = [p.name for p in found if p.default is p.empty and p.name not in good]
    return list(dict.fromkeys([*(p.name for p in found), *good])), needed


CASES = [(call, good) for call, good in TABLE if arguments(call, good)[0]]
IDS = [f"{i} {name_of(case)}" for i, case in enumerate(CASES)]


class Hang(BaseException):
    """A call that takes too long."""


def hang(*_):
    raise Hang


@pytest.fixture
def limits(tmp_path, monkeypatch):
    """An empty folder, and limits of time and memory."""
    monkeypatch.chdir(tmp_path)
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGPROF, hang)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    signal.signal(signal.SIGPROF, handler)


def fuzz(case, examples):
    call, good = case
    names, needed = arguments(call, good)

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, print_blob=False,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True), st.data())
    def run(chosen, data):
        values = {name: data.draw(st.sampled_from(sorted(VALUES)), name) for name in {*chosen, *needed}}
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with warnings.catch_warnings(action="ignore"):
                out = call(**(good | {name: VALUES[value]() for name, value in values.items()}))
                if inspect.isgenerator(out):
                    list(itertools.islice(out, 3))
        except (fs.InputError, fs.NonFiniteError) as error:
            assert 0 < len(str(error)) < 2500  # noqa: PT017
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    run()


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_wrong_arguments_give_a_result_or_one_clear_error(case, limits):
    fuzz(case, 5)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_hundred_wrong_arguments_give_a_result_or_one_clear_error(case, limits):
    fuzz(case, 100)


def test_every_public_name_is_in_the_table():
    called = {getattr(call, "__name__", "") for call, _ in TABLE} | {type(call).__name__ for call, _ in TABLE}
    called |= {getattr(getattr(call, "__self__", None), "__name__", "") for call, _ in TABLE}  # class methods
    assert {*fs.__all__} - called - NOT_CALLED == set()
