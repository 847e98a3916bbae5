"""A second run says "done" of what was published and of nothing else; damaged records are told with file and field."""

import json
import random

import numpy as np
import pytest

from checkpoints import LLAMA, decoder, family, plan, save
from tether.errors import CheckpointError, ConfigError
from tether.merge.journal import Journal, Written
from tether.merge.run import merge

TOKENS = list("abcdefghij")


@pytest.fixture
def fields(tmp_path):
    made = family(tmp_path, LLAMA, TOKENS)
    for name in ("generation_config.json", "preprocessor_config.json"):
        (tmp_path / "c" / name).write_text('{"max_new_tokens": 9}')
    (tmp_path / "c" / "additional_chat_templates").mkdir()
    (tmp_path / "c" / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    return made | {"shard_bytes": 2000}


def test_a_second_run_over_any_damage_says_so(tmp_path, fields):
    out = tmp_path / "out"
    report = merge(plan(tmp_path, **fields), out, threads=1)
    made, draw = plan(tmp_path, **fields), random.Random(0)
    assert merge(made, out, threads=2) == report
    files = sorted(path for path in out.rglob("*") if path.is_file())
    assert len(files) >= 10
    tries = 0
    for file in files:
        content = file.read_bytes()
        places = [0, len(content) - 3, *(draw.randrange(len(content)) for _ in range(6))]
        flipped = [
            content[:at] + bytes([content[at] ^ 1 << draw.randrange(7)]) + content[at + 1 :] for at in places
        ]
        for damaged in (*flipped, content[:-4], content + b"x", b"", None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            # A manifest may be damaged so that it is that of another merge.
            with pytest.raises((CheckpointError, ConfigError)) as caught:
                merge(made, out, threads=1)
            assert str(out) in str(caught.value)
            if file.name != "tether.json":
                assert file.name in str(caught.value) or "tensor " in str(caught.value)
            tries += 1
        file.write_bytes(content)
    assert tries >= 120
    assert merge(made, out, threads=1) == report


def test_weights_that_would_be_read_first_do_not_pass(tmp_path, fields):
    merge(plan(tmp_path, **fields), tmp_path / "out", threads=1)
    save(tmp_path / "out", decoder())
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not belong to it"):
        merge(plan(tmp_path, **fields), tmp_path / "out", threads=1)


def test_a_manifest_that_names_other_versions_was_changed(tmp_path, fields):
    merge(plan(tmp_path, **fields), tmp_path / "out", threads=1)
    file = tmp_path / "out" / "tether.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"versions": content["versions"] | {"torch": "0.0"}}))
    with pytest.raises(CheckpointError, match=r"is damaged: tether\.json was changed"):
        merge(plan(tmp_path, **fields), tmp_path / "out", threads=1)


def test_another_config_is_another_merge(tmp_path, fields):
    merge(plan(tmp_path, **fields), tmp_path / "out", threads=1)
    for name in "abc":
        (tmp_path / name / "config.json").write_text(json.dumps(LLAMA | {"rope_theta": 5e5}))
    with pytest.raises(ConfigError, match="not empty"):
        merge(plan(tmp_path, **fields), tmp_path / "out", threads=1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rounding": {"share_of_change": -1.0, "worst": None}}, "rounding.share_of_change"),
        ({"rounding": {"share_of_change": "much", "worst": None}}, "rounding.share_of_change"),
        ({"tensors": {"w": "0"}}, "tensors.w"),
        ({"tensors": []}, "tensors"),
        ({"plan": {}}, "plan.operator: Field required"),
        ({"check": {"references": 3}}, "check.references"),
        ({"more": 1}, "more: Extra inputs are not permitted"),
    ],
)
def test_a_damaged_report_is_told_with_its_field(tmp_path, fields, change, said):
    merge(plan(tmp_path, **fields), tmp_path / "out", threads=1)
    file = tmp_path / "out" / "merge.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError) as caught:
        merge(plan(tmp_path, **fields), tmp_path / "out", threads=1)
    assert f"{file} is damaged" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b"[]", b"NaN"])
def test_a_report_that_is_no_report(tmp_path, fields, content):
    merge(plan(tmp_path, **fields), tmp_path / "out", threads=1)
    (tmp_path / "out" / "merge.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"merge\.json is damaged: .*Expected the report of a merge"):
        merge(plan(tmp_path, **fields), tmp_path / "out", threads=1)


def written(folder, *entries):
    journal = Journal(folder / "j")
    for entry in entries:
        journal.append(entry)
    journal.close()
    return folder / "j"


DAMAGED = {
    '[["a"], "1", 0.0, 0.0, "s"]': "name is \"['a']\", expected text",
    '["a", 1, 0.0, 0.0, "s"]': "sha256 is '1', expected text",
    '["a", "1", "x", 0.0, "s"]': "lost is 'x', expected a number",
    '["a", "1", NaN, 0.0, "s"]': "lost is 'nan'",
    '["a", "1", 0.0, -1.0, "s"]': "changed is '-1.0'",
    '["a", "1", 0.0, 0.5, "s"]': "seal: the other fields do not have it",
    '["a", "1", 0.0]': "expected a list of name, sha256, lost, changed, seal",
    '{"a": 1}': "expected a list",
}


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_of_a_journal_is_told_with_its_field(tmp_path, line):
    path = written(tmp_path, Written("w", "1", 0.25, 2.0))
    with path.open("a") as file:
        file.write(f"[torn\n{line}\n")
    with pytest.raises(CheckpointError) as caught:
        Journal(path).entries()
    assert f"{path}, line 3 is damaged: {DAMAGED[line]}" in str(caught.value)


def test_a_changed_figure_in_a_journal_does_not_reach_the_report(tmp_path):
    path = written(tmp_path, Written("w", "1", 0.25, 2.0))
    assert Journal(path).entries() == {"w": Written("w", "1", 0.25, 2.0)}
    path.write_text(path.read_text().replace("0.25", "0.75"))
    with pytest.raises(CheckpointError, match=r"line 1 is damaged: seal"):
        Journal(path).entries()


@pytest.mark.parametrize("file", ["journal.jsonl", "survey.json", "plan.json"])
def test_damaged_records_of_an_unfinished_merge(tmp_path, fields, monkeypatch, file):
    made = plan(tmp_path, **fields)
    merge(made, tmp_path / "whole", threads=1)
    append, seen = Journal.append, []

    def counting(self, entry):
        if len(seen) == 5:
            raise KeyboardInterrupt
        append(self, entry)
        seen.append(entry)

    for damage in (b"{}\n", b'["a", "b", "c", 1.0]\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n"):
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "append", counting)
            with pytest.raises(KeyboardInterrupt):
                merge(made, tmp_path / "out", threads=1)
        (tmp_path / ".out.merge" / file).write_bytes(damage)
        told = file == "survey.json" or (file == "journal.jsonl" and damage.startswith((b"{", b'["a')))
        if told:
            with pytest.raises(CheckpointError, match=rf"\.out\.merge/{file}.* is damaged"):
                merge(made, tmp_path / "out", threads=1)
        merge(made, tmp_path / "out", threads=1)
        for path in (tmp_path / "whole").glob("*.*"):
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
        (tmp_path / "out").rename(tmp_path / f"done{damage[:3].hex()}")


def test_a_survey_with_another_fingerprint_is_not_believed(tmp_path, fields, monkeypatch):
    made = plan(tmp_path, **fields)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge(made, tmp_path / "out", threads=1)
    file = tmp_path / ".out.merge" / "survey.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"fingerprints": content["fingerprints"] | {"a": "0" * 64}}))
    with pytest.raises(CheckpointError, match=r"survey\.json is damaged: seal: "):
        merge(made, tmp_path / "out", threads=1)
    assert not file.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"text_config": 3}, "text_config is no mapping"),
        ({"quantization_config": "gptq"}, "quantization_config is no mapping"),
        ([1], "config.json is damaged"),
    ],
)
def test_configs_that_are_no_configs(tmp_path, fields, content, said):
    (tmp_path / "a" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=said):
        plan(tmp_path, **fields)


def test_all_files_have_the_permissions_of_new_ones(tmp_path, fields):
    merge(plan(tmp_path, **fields), tmp_path / "out", threads=1)
    (tmp_path / "new").write_bytes(b"")
    wanted = (tmp_path / "new").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out").rglob("*") if path.is_file()} == {wanted}


def test_heads_that_are_no_numbers(tmp_path, fields):
    maps = {"model.embed_tokens.weight": np.zeros(3, np.int64)}
    save(tmp_path / "maps", maps)
    for heads in ("4", 0, True, [4]):
        (tmp_path / "a" / "config.json").write_text(json.dumps(LLAMA | {"num_attention_heads": heads}))
        fields["models"]["a"]["align"] = str(tmp_path / "maps" / "model.safetensors")
        with pytest.raises(ConfigError, match=r"num_attention_heads .*expected the positive whole numbers"):
            plan(tmp_path, **fields)
