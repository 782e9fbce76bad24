"""Tests that show that a defect in docs/defects.md is impossible bear the mark `defect` with its number."""

import re

from conftest import ROOT


def test_every_defect_has_a_test():
    rows = [int(number) for number in re.findall(r"(?m)^\| (\d+) \|", (ROOT / "docs" / "defects.md").read_text())]
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    marked = re.findall(r"(?<=mark\.defect\()[\d, ]+(?=\))", sources)
    assert rows == list(range(1, 31)) == sorted({int(number) for numbers in marked for number in numbers.split(",")})
