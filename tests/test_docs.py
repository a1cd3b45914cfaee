"""The code in README.md, docs/ and the docstrings runs.

The ``python`` blocks of a page run in order and in one namespace, as somebody would who reads from top to bottom, on
eight virtual devices. Write ``text`` over a block of output and ``bash`` over commands: those are not run.
"""

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = sorted(
    ".".join(path.relative_to(ROOT / "src").with_suffix("").parts) for path in (ROOT / "src").rglob("[!_]*.py")
)
BLOCK = re.compile(r"^(?P<fence>```+)python *\n(?P<code>.*?)^(?P=fence) *$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = page.read_text()
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        above = text.count("\n", 0, block.start("code"))
        exec(compile("\n" * above + block["code"], page, "exec"), namespace)


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_a_module_run(module: str) -> None:
    here = importlib.import_module(module)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in doctest.DocTestFinder(exclude_empty=True).find(here, module):
        runner.run(example, out=report.append)
    assert not runner.failures, "\n" + "".join(report)
