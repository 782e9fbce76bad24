"""What README.md and docs/ tell a reader to type is run, page by page, or says why not."""

import os
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, python


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A comment in the line above a fence says why it is not run: <!-- not run: needs several GPUs -->
FENCE = re.compile(r"(?m)^(?:<!-- not run: (?P<reason>.+) -->\n)?```(?P<language>.*)\n(?P<code>(?s:.*?))^```$")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def steps(page: Path) -> str:
    """The page's commands and snippets as one program, whose tracebacks name the page's lines."""
    text = page.read_text()
    program = ["import subprocess", "names = {'__name__': '__main__'}"]
    for fence in FENCE.finditer(text):
        if fence["reason"]:
            continue
        if fence["language"] == "bash":
            program.append(f"subprocess.run(['bash', '-e', '-c', {fence['code']!r}], check=True)")
        else:
            code = "\n" * text.count("\n", 0, fence.start("code")) + fence["code"]
            program.append(f"exec(compile({code!r}, {str(page)!r}, 'exec'), names)")
    return "\n".join(program)


@each_page
def test_what_is_to_be_typed_runs(page, tmp_path):
    for path in ROOT.glob("[!.]*"):  # what is made is made elsewhere
        (tmp_path / path.name).symlink_to(path)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = python("-c", steps(page), cwd=tmp_path, PATH=path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert result.returncode == 0, result.stdout + result.stderr


@each_page
def test_every_fence_is_run_or_says_why_not(page):
    text = page.read_text()
    fences = list(FENCE.finditer(text))
    assert text.count("```") == 2 * len(fences) and {fence["language"] for fence in fences} <= {"bash", "python"}
    assert text.count("<!--") == sum(fence["reason"] is not None for fence in fences), "a comment above no fence"


@each_page
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!\w+:)([^)#]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.stem)
def test_a_page_begins_with_a_command(page):
    fence = FENCE.search(page.read_text().split("\n## ")[0])
    assert fence and fence["language"] == "bash"


def test_the_readme_is_short_and_names_the_two_commands():
    text = PAGES[0].read_text()
    assert len(text.splitlines()) <= 120
    assert re.findall(r"(?m)^bash scripts/\w+\.sh", text) == ["bash scripts/demo.sh", "bash scripts/test.sh"]
