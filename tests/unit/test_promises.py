"""The table of promises in docs/reliability.md is what the tests of these promises said."""

from __future__ import annotations

import re
from pathlib import Path

import promises
import pytest
from promises import DRIFT, KILL, TARGETS, Kept

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/reliability.md"


def test_every_promise_stands_in_the_table_with_what_was_measured():
    assert {row.promise for row in promises.table(PAGE)} == set(TARGETS)
    assert all(row.measured for row in promises.table(PAGE))


@pytest.mark.parametrize("row", promises.table(PAGE), ids=lambda row: row.test)
def test_the_tests_that_the_table_names_exist_and_show_that_promise(row):
    file, _, name = row.test.partition("::")
    code = (ROOT / file).read_text()
    body = re.search(rf"^def {name}\((.*?)^(?:def |@|class |[A-Z])", code + "\nEND", flags=re.MULTILINE | re.DOTALL)
    assert body and "promise" in body[1], f"{row.test} does not take the fixture"


def test_the_table_is_written_between_its_marks_one_row_for_the_cases_of_a_test(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Above\n\n{promises._BEGIN}\nold\n{promises._END}\n\nbelow\n")
    kept = [
        Kept(promise=DRIFT, measured="found", test="tests/a.py::test_b[x]"),
        Kept(promise=KILL, measured="9 s | all", test="tests/a.py::test_c"),
        Kept(promise=DRIFT, measured="named", test="tests/a.py::test_b[y]"),
        Kept(promise=DRIFT, measured="named", test="tests/a.py::test_b[z]"),
    ]
    missing = promises.rewrite(page, kept)
    assert set(missing) == set(TARGETS) - {KILL, DRIFT}
    assert promises.table(page) == [
        Kept(promise=KILL, measured="9 s / all", test="tests/a.py::test_c"),
        Kept(promise=DRIFT, measured="found; named", test="tests/a.py::test_b"),
    ]
    assert page.read_text().startswith("# Above\n") and page.read_text().endswith("below\n") and "old" not in page.read_text()


def test_a_name_that_is_not_promised_is_refused(promise):
    with pytest.raises(AssertionError, match="is not promised"):
        promise("the moon")
