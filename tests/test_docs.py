"""Everything that the pages and examples show is run: Python blocks, commands, and the examples.

The blocks of one page share a namespace and an empty folder, and run in order. A block of shell is
run line by line where a line starts with ``laminar``; other lines are for the reader. A block right
after the comment ``<!-- not run -->`` is shown only.
"""

import re
import runpy
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
_LONG = (
    "anomalies.md",
    "bijections.md",
    "check.md",
    "estimators.md",
    "inference.md",
    "own_bijections.md",
    "report.md",
    "tables.md",
    "training.md",
    "vae.md",
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARAMS = [
    pytest.param(path, id=path.name, marks=[pytest.mark.slow] * (path.name in _LONG))
    for path in PAGES
]
# The demo takes its time, and `make demo` is there to run it.
EXAMPLES = [
    pytest.param(
        path, id=path.name, marks=[pytest.mark.slow] * (path.name in ("demo.py", "path.py"))
    )
    for path in sorted((ROOT / "examples").glob("*.py"))
]

SKIP = "<!-- not run -->"
_FENCE = re.compile(
    r"^(?P<fence>`{3,})(?P<language>[\w{}-]*)[^\n]*\n(?P<text>.*?)^(?P=fence)\s*$", re.M | re.S
)


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """The blocks of a page that are to be run, with the line where each begins."""
    found = []
    for match in _FENCE.finditer(page):
        before = page[: match.start()]
        if not before.rstrip().endswith(SKIP):
            line = before.count("\n") + 2
            found.append(Block(match["language"], match["text"], line))
    return found


def commands(text: str) -> list[list[str]]:
    """The arguments of each ``laminar`` command in a block of shell."""
    joined = text.replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in joined.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("laminar ")]


def run_command(arguments: list[str]) -> None:
    from typer.testing import CliRunner

    from laminar.cli.main import app

    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, f"laminar {shlex.join(arguments)}\n{result.output}"


def run_page(path: Path) -> int:
    """Run the blocks of a page in the current folder; the number of blocks run."""
    namespace = {"__name__": "__main__"}
    count = 0
    for block in blocks(path.read_text()):
        if block.language == "python":
            # Blank lines in front make the line numbers of a traceback those of the page.
            code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
            exec(code, namespace)
            count += 1
        elif block.language in ("bash", "sh", "shell", "console"):
            for arguments in commands(block.text):
                run_command(arguments)
                count += 1
    return count


@pytest.mark.parametrize("page", PARAMS)
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAMINAR_CACHE_DIR", str(tmp_path / "cache"))
    run_page(page)


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAMINAR_EXAMPLE_STEPS", "20")
    runpy.run_path(str(example), run_name="__main__")


def test_a_wrong_block_is_caught(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nvalue = 1\n```\n\n```python\nassert value == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run_page(page)
    assert caught.traceback[-1].lineno == 7


def test_blocks_and_commands_are_found():
    page = (
        "```python\na\n```\n<!-- not run -->\n```python\nb\n```\n"
        "```console\n$ laminar data # all\n```"
    )
    assert [block.text for block in blocks(page)] == ["a\n", "$ laminar data # all\n"]
    assert commands("$ laminar a \\\n  --b 'c d'\npip install x\nlaminar e # f") == [
        ["a", "--b", "c d"],
        ["e"],
    ]


def test_pages_have_something_to_run():
    counts = {page.name: len(blocks(page.read_text())) for page in PAGES}
    assert counts["README.md"] >= 2
    assert counts["quickstart.md"] >= 2


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}."


def test_the_catalogue_is_complete_and_as_generated():
    import laminar
    from laminar.bijections.base import AbstractTransform

    made = runpy.run_path(str(ROOT / "docs" / "_catalogue.py"))
    assert (ROOT / "docs" / "catalogue.md").read_text() == made["page"]()
    rows = [row for section in made["ROWS"].values() for row in section]
    named = {name.split("(")[0] for _, names, _ in rows for name in names.split()}
    things = {name: getattr(laminar, name) for name in laminar._HOMES}
    transforms = {
        name
        for name, thing in things.items()
        if isinstance(thing, type)
        and issubclass(thing, AbstractTransform)
        and not name.startswith("Abstract")
    }
    assert transforms <= named
    assert {letter for _, _, found in rows for letter in found} <= set(made["LIBRARIES"])
