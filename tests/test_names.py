"""The rule for names, against an oracle written out letter by letter, and paths that lead out of a folder."""

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.errors import CheckpointError, ConfigError
from tether.names import check_name, inside

PLAIN = set(string.ascii_letters + string.digits + "._-")
DEVICES = {"con", "prn", "aux", "nul", *(f"{d}{n}" for d in ("com", "lpt") for n in range(10))}


def is_plain(name):
    if not 1 <= len(name) <= 64 or set(name) - PLAIN or name[0] == "." or name[-1] == ".":
        return False
    return name.split(".")[0].lower() not in DEVICES


@given(
    st.text(
        alphabet=st.sampled_from([*PLAIN, "/", "\\", " ", "\n", "\0", "é", "法", "\u202e", ":"]), max_size=70
    )
)
def test_names_are_plain_or_refused(name):
    if is_plain(name):
        assert check_name(name) == name
    else:
        with pytest.raises(ConfigError, match="no name for a domain"):
            check_name(name)


@pytest.mark.parametrize("name", ["law", "a", "x" * 64, "case-law_v1.2", "console", "-rf", "com", "LPT10"])
def test_plain_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x" * 65,
        ".hidden",
        "..",
        "law.",
        "../../x",
        "/etc",
        "C:",
        "a b",
        "law\n",
        "café",
        "con",
        "NUL.delta",
        "Com1",
    ],
)
def test_other_names(name):
    with pytest.raises(ConfigError) as refused:
        check_name(name)
    assert str(refused.value).isascii()
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", [None, 3, ["law"], b"law"])
def test_what_is_no_text_is_no_name(name):
    with pytest.raises(ConfigError):
        check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/../../x",
        "/etc/passwd",
        "C:\\x",
        "C:x",
        "\\\\host\\share\\x",
        "..\\x",
        "a\\..\\..\\x",
        "",
        "a\0b",
    ],
)
def test_no_path_leads_out_of_its_folder(name):
    with pytest.raises(CheckpointError, match="leads out"):
        inside(Path("folder"), name)


def test_paths_inside_are_joined():
    assert inside(Path("folder"), "gates/law.safetensors") == Path("folder", "gates", "law.safetensors")
