"""Places that nothing can be written to are refused, and looking at one leaves nothing there."""

import os

import pytest

from tether.errors import ConfigError
from tether.store.place import check_file, check_free, check_place
from tether.store.publish import publish_file


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("a" * 240, "at most 230 bytes"),
        ("\u4e2d" * 80, "at most 230 bytes"),
        ("deep/" + "a" * 240 + "/file", "at most 230 bytes"),
        ("/".join(["folder"] * 600), "at most 4000 bytes"),
        ("zero\0", "without a zero"),
        ("file/below", "is not a folder"),
        ("file/far/below", "is not a folder"),
    ],
)
def test_an_impossible_place_is_refused(tmp_path, path, said):
    (tmp_path / "file").write_text("")
    for check in (check_place, check_file, check_free):
        with pytest.raises(ConfigError, match=said):
            check(tmp_path / path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_closed_folder_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="cannot be written to"):
        check_place(tmp_path / "closed" / "file")


def test_the_longest_name_that_is_taken_can_be_written(tmp_path):
    path = tmp_path / "new" / ("a" * 230)
    check_file(path)
    check_free(path)
    assert list(tmp_path.iterdir()) == []
    with publish_file(path) as target:
        target.write_text("fits")
    with pytest.raises(ConfigError, match="exists already"):
        check_file(path)
    with pytest.raises(ConfigError, match="is not empty"):
        check_free(path)
