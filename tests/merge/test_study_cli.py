import json

import typer
from typer.testing import CliRunner

import tiny
from tether.cli.study import study_length

app = typer.Typer()
app.command()(study_length)


def test_command_prints_table_and_verdicts(tmp_path):
    tiny.backbone("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "probes.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ("one two", "three"))
    )
    arguments = [str(tmp_path / "model"), "--probes", str(tmp_path / "probes.jsonl"), "--paths", "4"]
    text = CliRunner().invoke(app, arguments)
    assert text.exit_code == 0, text.output
    assert "| position | activation |" in text.output
    assert "document's sums: bias O(gamma^len_max)" in text.output
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["lengths"] == [8, 16, 32, 64]
    assert len(found["rows"]) == 15
    assert {claim["verdict"] for claim in found["claims"]} <= {"holds", "violated", "undecided"}
