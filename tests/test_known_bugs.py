"""docs/known-bugs.md and the tests say the same: every row has its tests, every numbered test its row."""

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "known-bugs.md"
SECTION = re.compile(r"Tests in `tests/(\w+)/`\.\n\n(.*?)(?=\n## |\Z)", re.DOTALL)
FAMILIES = {family: text for family, text in SECTION.findall(PAGE.read_text())}


def rows(family):
    """Number of a row -> names of its tests."""
    cells = [re.split(r" ?\| ?", line)[1:-1] for line in FAMILIES[family].splitlines() if re.match(r"\| \d", line)]
    return {int(number): re.findall(r"`(test_\w+)`", tests) for number, _, _, tests in cells}


@functools.cache
def functions(folder):
    """Names of the test functions below a folder."""
    trees = [ast.parse(path.read_text()) for path in sorted(folder.rglob("test_*.py"))]
    return {n.name for tree in trees for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}


def numbers(name):
    leading = re.match(r"test_((?:\d+_)+)", name)
    return [int(n) for n in leading[1].split("_")[:-1]] if leading else []


def test_every_family_with_numbers_has_a_table():
    numbered = {path.name for path in TESTS.iterdir() if path.is_dir() and any(map(numbers, functions(path)))}
    assert numbered == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_lead_to_rows_and_rows_to_tests(family):
    found = rows(family)
    assert list(found) == list(range(1, len(found) + 1))
    own, every = functions(TESTS / family), functions(TESTS)
    for name in own:
        for number in numbers(name):
            assert name in found.get(number, ()), f"{name} is not in row {number} of {family} in docs/known-bugs.md"
    for number, names in found.items():
        assert names, f"row {number} of {family} names no test"
        for name in names:
            assert name in every, f"row {number} of {family} names {name}, which is no test"
            assert not numbers(name) or (number in numbers(name) and name in own), f"{name} in row {number}"


def test_every_link_is_a_public_issue():
    links = re.findall(r"\[([^\]]+)\]\(([^)]+)\)", PAGE.read_text())
    assert links
    for text, address in links:
        repository, number = re.fullmatch(r"https://github\.com/[\w-]+/([\w.-]+)/issues/(\d+)", address).groups()
        assert text == f"{repository} {number}"
