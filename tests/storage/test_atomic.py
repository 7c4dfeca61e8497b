"""Atomic writes, also by concurrent writers."""

from __future__ import annotations

import pytest

from sandbox.storage.atomic import replacing, write_atomic


def test_concurrent_writers_each_write_a_complete_file(tmp_path):
    path = tmp_path / "plan.json"
    with replacing(path) as first:
        first.write_text("the first")
        write_atomic(path, "another")
        assert path.read_text() == "another"
    assert path.read_text() == "the first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "plan.json"
    write_atomic(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as draft:
        draft.write_text("half of the n")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
