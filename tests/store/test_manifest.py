import json
import platform
from importlib.metadata import version

import pytest
from pydantic import ValidationError

import tether
from tether.errors import CheckpointError, ConfigError
from tether.store.manifest import SCHEMA_VERSION, Input, Manifest, read_manifest, versions, write_manifest


@pytest.fixture
def manifest():
    return Manifest(
        kind="delta",
        inputs=(
            Input(role="base", path="hub/model", sha256="0" * 64),
            Input(role="text", path="a", sha256="f" * 64),
        ),
        recipe={"chart": "symmetric", "budget": 0.5, "texts": ["a", "é"]},
    )


def test_round_trip(tmp_path, manifest):
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["tether.json"]
    first = (tmp_path / "tether.json").read_bytes()
    write_manifest(tmp_path, manifest)
    assert (tmp_path / "tether.json").read_bytes() == first


def test_versions_are_those_installed():
    expected = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    assert versions() == {"tether": tether.__version__, "python": platform.python_version(), **expected}
    assert Manifest(kind="run").versions == versions()


def test_package_that_is_not_installed(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("tether.store.manifest.version", absent)
    assert versions()["torch"] == "not installed"


def test_is_frozen_and_knows_its_fields(manifest):
    with pytest.raises(ValidationError, match="frozen"):
        manifest.kind = "other"
    for wrong in (
        {"kind": "run", "color": 1},
        {"kind": ""},
        {"kind": "run", "schema_version": SCHEMA_VERSION + 1},
    ):
        with pytest.raises(ValidationError):
            Manifest(**wrong)
    with pytest.raises(ValidationError, match="pattern"):
        Input(role="base", path="a", sha256="F" * 64)


def test_recipe_must_be_json(tmp_path):
    with pytest.raises(ConfigError, match="cannot be JSON"):
        write_manifest(tmp_path, Manifest(kind="run", recipe={"x": float("inf")}))
    assert not list(tmp_path.iterdir())


def test_newer_schema_says_upgrade(tmp_path, manifest):
    content = manifest.model_dump(mode="json") | {"schema_version": SCHEMA_VERSION + 1, "unheard_of": 1}
    (tmp_path / "tether.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"schema version 2; .* reads up to 1\. Upgrade tether"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "expected JSON"),
        (b'{"schema_version": 1, "kind": "ru', "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b'{"schema_version": 1, "kind": "run", "kind": "merge"}', "a field is there twice"),
        (b'{"schema_version": "1", "kind": "run"}', "schema_version: Input should be a valid integer"),
        (b"[]", "Expected the fields kind, schema_version, versions, inputs, recipe"),
        (b'{"kind": "run"}', "schema_version: Field required"),
        (b'{"schema_version": 0, "kind": "run"}', "schema_version: Input should be greater"),
        (b'{"schema_version": 1, "kind": "run", "color": 1}', "color: Extra inputs are not permitted"),
        (
            b'{"schema_version": 1, "kind": "run", "inputs": [{"role": "a"}]}',
            r"inputs\.0\.path: Field required; inputs\.0",
        ),
    ],
)
def test_damaged(tmp_path, text, message):
    (tmp_path / "tether.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path)


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no tether\.json; expected a folder that tether wrote"):
        read_manifest(tmp_path)


def test_outputs_are_sealed_with_the_rest(tmp_path):
    manifest = Manifest(kind="merge", recipe={"x": 1.5}, outputs={"merge.json": "0" * 64})
    write_manifest(tmp_path, manifest)
    found = read_manifest(tmp_path)
    assert found.model_copy(update={"seal": ""}) == manifest
    assert not found.changed
    content = json.loads((tmp_path / "tether.json").read_text())
    for change in (
        {"outputs": {"merge.json": "1" * 64}},
        {"outputs": {}},
        {"recipe": {"x": 2.5}},
        {"versions": {}},
        {"seal": ""},
        {"seal": "0"},
    ):
        (tmp_path / "tether.json").write_text(json.dumps(content | change))
        assert read_manifest(tmp_path).changed


def test_without_outputs_there_is_no_seal(tmp_path):
    write_manifest(tmp_path, Manifest(kind="run"))
    assert json.loads((tmp_path / "tether.json").read_text()).keys() == Manifest.model_fields.keys() - {
        "outputs",
        "seal",
    }
    assert not read_manifest(tmp_path).changed
