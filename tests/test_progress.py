"""Progress: a bar on a terminal, a line now and then in a pipe, nothing on processes but rank 0."""

import io
import re

import pytest

from fewstep import _progress


@pytest.fixture
def run(monkeypatch):
    """Runs `count` items of 10 seconds each, and returns what was written to standard error."""

    def run(count, terminal, **options):
        now = [0.0]
        monkeypatch.setattr("tqdm.std.time", lambda: now[0])
        stderr = io.StringIO()
        stderr.isatty = lambda: terminal
        monkeypatch.setattr("sys.stderr", stderr)
        bar = _progress.progress(range(count), "step", **options)
        bar.set_postfix(refresh=False, loss="0.5")
        for _ in bar:
            now[0] += 10.0
        return stderr.getvalue()

    return run


def test_pipe_gets_a_plain_line_at_most_every_thirty_seconds(run):
    lines = run(20, terminal=False).splitlines()
    assert lines[0] == "step 3/20, 00:30 elapsed, 02:50 left, loss=0.5"
    assert 2 <= len(lines) <= 6
    assert all(re.fullmatch(r"step \d+/20, \d\d:\d\d elapsed, \d\d:\d\d left, loss=0\.5", line) for line in lines)


@pytest.mark.parametrize(("count", "options"), [(2, {}), (20, {"show": False})], ids=["short", "not shown"])
def test_pipe_gets_nothing(run, count, options):
    assert run(count, terminal=False, **options) == ""


def test_terminal_gets_a_bar_that_is_removed_at_the_end(run):
    written = run(20, terminal=True)
    assert "\r" in written
    assert "20/20" in written
    assert written.endswith("\r")  # erased
    assert "\n" not in written


@pytest.mark.parametrize("terminal", [False, True])
def test_processes_other_than_rank_zero_write_nothing(run, monkeypatch, terminal):
    monkeypatch.setattr(_progress, "is_first", lambda: False)
    assert run(20, terminal) == ""
