"""Every example of the README and of the docs runs and prints the output shown; pictures and tables exist."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.append(str(DOCS))  # its modules import one another
PAGES = [
    ROOT / "README.md",
    *sorted(DOCS.glob("*.md")),
    *sorted(DOCS.glob("families/*.md")),
    *sorted(DOCS.glob("experiments/*.md")),
    *sorted(DOCS.glob("tutorials/*.md")),
]


def module(name):
    """docs/<name>.py: the docs are no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


run_blocks = module("run_blocks")


EXAMPLES = [p if p.name == "README.md" else pytest.param(p, marks=pytest.mark.slow) for p in PAGES]


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda p: p.name)
def test_examples_run(page):
    if run_blocks.missing(page):
        pytest.skip(f"{run_blocks.missing(page)} is not installed")
    run_blocks.run(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in target or (page.parent / target).exists(), target


def test_wrong_output_or_raising_block_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n")
    with pytest.raises(ValueError, match="line 1"):
        run_blocks.run(page)
    page.write_text("words\n\n```python\nx = 1\n\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as error:
        run_blocks.run(page)
    assert error.traceback[-1].lineno + 1 == 6


def test_tables_of_the_pages_equal_cards_and_records():
    front = module("front")
    known = front.made()
    assert [page.name for page in front.PAGES if front.filled(page.read_text(), known) != page.read_text()] == []


def test_reproduce_page_lists_every_experiment():
    page = (DOCS / "reproduce.md").read_text()
    scripts = (p for p in (ROOT / "analysis" / "experiments").glob("*.py") if "Budget" in p.read_text())
    assert [p.name for p in scripts if f"experiments/{p.name}" not in page and p.name != "base.py"] == []


def test_every_figure_is_explained_on_the_reproduce_page():
    page = (ROOT / "docs" / "reproduce.md").read_text()
    figures = [p.name for p in (ROOT / "docs" / "figures").iterdir() if p.suffix in (".svg", ".png")]
    assert [n for n in figures if n not in page] == []
