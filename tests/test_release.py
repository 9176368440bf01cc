"""Facts about a release are the same wherever they are stated."""

import re
from importlib import metadata
from pathlib import Path

import fewstep as fs

ROOT = Path(__file__).resolve().parents[1]
VERSION = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]


def text(name):
    return (ROOT / name).read_text()


def names(requirements):
    """The packages of requirement lines, in lower case, without this one."""
    found = {re.match(r"[\w-]+", r)[0].lower() for r in requirements}
    return found - {"fewstep"}


def test_version_citation_and_changelog_agree():
    assert fs.__version__ == VERSION
    cited = dict(re.findall(r'^([\w-]+): "?([^"\n]+)"?$', text("CITATION.cff"), re.M))
    assert cited["version"] == VERSION
    assert cited["license"] == metadata.metadata("fewstep")["License-Expression"]
    newest = re.search(r"^## (\S+) \((\S+)\)$", text("docs/CHANGELOG.md"), re.M)
    assert newest.groups() == (VERSION, cited["date-released"])


def test_every_reimplemented_paper_is_cited():
    cited = set(re.findall(r"arXiv:(\S+)\"", text("CITATION.cff")))
    assert cited == {"2508.16939", "2309.16421", "2405.14961"}


def test_install_page_lists_the_licence_of_every_direct_dependency():
    section = text("docs/install.md").partition("## Licences")[2]
    rows = {r.replace("_", "-") for r in re.findall(r"^\| ([\w-]+) \|", section, re.M)} - {"package"}
    assert rows - {"---"} == names(metadata.requires("fewstep"))


def test_install_page_explains_every_extra():
    section = text("docs/install.md").partition("## Extras")[2].partition("## What")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.M)) == set(
        metadata.metadata("fewstep").get_all("Provides-Extra")
    )


def test_contributing_page_lists_the_commands_that_ci_runs():
    page = text("docs/CONTRIBUTING.md")
    check = re.search(r"## Check\n\n```console\n(.*?)```", page, re.S)[1]
    steps = [part.strip() for line in check.splitlines() for part in line.partition("#")[0].split("&&")]
    run = text(".ci/run").splitlines()
    assert steps[-1] == "bash .ci/run"
    for command in steps[:-1]:
        assert command in run, command
    workflow, hooks = text(".github/workflows/ci.yml"), text(".pre-commit-config.yaml")
    assert "run: bash .ci/run" in workflow
    supported = re.findall(r"3\.\d+", re.search(r"python: \[(.*)\]", workflow)[1])
    assert supported == re.findall(r"Python :: (3\.\d+)", text("pyproject.toml"))
    for entry in re.findall(r"entry: (\w+)", hooks):
        assert entry in check, entry
