"""Atomic writes, also by concurrent writers."""

from __future__ import annotations

import pytest

from sandbox.contracts import ConfigError, StorageError
from sandbox.storage.atomic import (
    check_space,
    check_writable,
    has_right_hash,
    replacing,
    with_hash,
    write_atomic,
)


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


def test_a_disk_with_too_little_space_is_an_error(tmp_path):
    check_space(tmp_path, 1, "a checkpoint")
    with pytest.raises(StorageError, match=r"a checkpoint needs at least 1000000000000 MB"):
        check_space(tmp_path, 10**18, "a checkpoint")


def test_a_sealed_object_notices_every_change():
    content = with_hash({"caption": "a red 7", "at": [512, 8], "none": None})
    assert has_right_hash(content) and has_right_hash(with_hash(content))
    for changed in ({"caption": "a red 1"}, {"at": [512, 9]}, {"none": 0}, {"more": 1}):
        assert not has_right_hash(content | changed)


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/none", "/proc/self/below"])
def test_a_folder_that_cannot_be_written_is_named_before_any_work(tmp_path, place):
    (tmp_path / "file").touch()
    check_writable(tmp_path / "new" / "folder", "task.to")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ConfigError, match=r"task\.to=.*cannot be written; choose another folder"):
        check_writable(tmp_path / place, "task.to")
