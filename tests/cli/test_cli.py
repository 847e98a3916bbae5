"""The command line as a user meets it: one message, the right exit code, earlier results untouched."""

import json
import shutil
import subprocess
import sys

import pytest

import tiny
from said import complaints
from tether.cli.output import emit
from tether.store.documents import write_documents


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a base, two domains' text and base text."""
    folder = tmp_path_factory.mktemp("work")
    tiny.backbone().save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    tiny.backbone(seed=7).save_pretrained(folder / "other")
    tiny.tokenizer().save_pretrained(folder / "other")
    for name, kind, seed in (("digits", "digits", 1), ("words", "words", 2), ("general", "words", 3)):
        write_documents(folder / f"{name}.jsonl", tiny.documents(kind, 24, seed))
    return folder


@pytest.fixture(scope="module")
def learnt(work):
    """The same folder with a learnt delta and a fused, certified checkpoint, made by the real commands."""
    commands = [
        ["convert", "base", "--out", "model"],
        ["learn", "model", "--text", "digits.jsonl", "--base-text", "general.jsonl", "--out", "digits.delta"],
        ["fuse", "model", "digits.delta=0.8", "--out", "fused"],
        [
            "certify",
            "model",
            "fused",
            "--text",
            "general.jsonl",
            "--text",
            "digits.jsonl",
            "--out",
            "cert.json",
        ],
    ]
    for command in commands:
        run = subprocess.run(
            [sys.executable, "-m", "tether.cli.app", *command], cwd=work, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
    return work


def test_the_commands_in_a_row(learnt, tether, monkeypatch):
    monkeypatch.chdir(learnt)
    certificate = json.loads((learnt / "cert.json").read_text())
    assert set(certificate["figures"]) == {"general", "digits"}
    assert certificate["fusion"]["by"] == "evidence"
    assert certificate["fusion"]["weights"] == [0.8]
    assert certificate["fusion"]["strengths"] == [[1.0]]
    code, out, _ = tether("verify", "cert.json", "--json")
    said = json.loads(out)
    assert (code, said["holds"], said["differences"]) == (0, True, [])
    assert len(said["not_checked"]) == 2
    code, out, _ = tether("generate", "fused", "1.2 3.4", "--new-tokens", 5)
    assert code == 0
    assert out.startswith("1.2 3.4")
    code, deterministic, _ = tether(
        "generate", "fused", "1.2 3.4", "--mode", "deterministic", "--new-tokens", 5
    )
    assert code == 0
    assert deterministic.startswith("1.2 3.4")


def test_sampling_repeats_by_seed(learnt, tether, monkeypatch):
    monkeypatch.chdir(learnt)
    drawn = [tether("generate", "model", "ab", "--temperature", 1.0, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_changed_byte_fails_the_check_with_exit_1(learnt, tether, monkeypatch):
    monkeypatch.chdir(learnt)
    content = (learnt / "general.jsonl").read_bytes()
    try:
        (learnt / "general.jsonl").write_bytes(content.replace(b"the", b"thE", 1))
        code, out, _ = tether("verify", "cert.json")
    finally:
        (learnt / "general.jsonl").write_bytes(content)
    assert code == 1
    assert "general.jsonl has changed" in out


def test_an_unreadable_certificate_is_exit_2(learnt, tether, tmp_path):
    (tmp_path / "cert.json").write_text("not JSON")
    code, _, err = tether("verify", tmp_path / "cert.json")
    assert code == 2
    assert "not a certificate" in err
    assert tether("verify", tmp_path / "absent.json")[0] == 2


LEARN = ["learn", "base", "--text", "digits.jsonl", "--base-text", "general.jsonl"]
BAD = {
    "missing text": ([*LEARN[:3], "absent.jsonl", *LEARN[4:]], "no such text file"),
    "empty text": ([*LEARN[:3], "empty.jsonl", *LEARN[4:]], "holds no text"),
    "short text": ([*LEARN[:3], "short.txt", *LEARN[4:]], "at least one context of 256"),
    "budget zero": ([*LEARN, "--budget", "0"], "> 0"),
    "budget negative": ([*LEARN, "--budget=-1"], "> 0"),
    "unknown metric": ([*LEARN, "--metric", "kl"], "softmax, fisher, latent"),
    "unknown chart": ([*LEARN, "--chart", "flat"], "linear, symmetric"),
    "no such base": (["learn", "absent/base", *LEARN[2:]], "absent/base"),
    "fuse: unknown chart": (["fuse", "model", "digits.delta", "--chart", "flat"], "linear, symmetric"),
    "fuse: weight nan": (["fuse", "model", "digits.delta=nan"], "finite"),
    "fuse: weight inf": (["fuse", "model", "digits.delta=inf"], "finite"),
    "fuse: weight no number": (["fuse", "model", "digits.delta=much"], "finite"),
    "fuse: missing delta": (["fuse", "model", "absent.delta"], "absent.delta"),
    "fuse: other base": (["fuse", "other", "digits.delta"], "was learnt on base"),
    "fuse: damaged delta": (["fuse", "model", "damaged.delta"], "damaged.delta"),
    "convert: unknown preset": (["convert", "base", "--preset", "papre"], "calibrated"),
    "convert: damaged base": (["convert", "damaged"], "damaged"),
    "convert: no tokenizer": (["convert", "wordless"], "tokenizer"),
    "certify: missing text": (["certify", "model", "fused", "--text", "absent.jsonl"], "no such text file"),
    "certify: short text": (
        ["certify", "model", "fused", "--text", "general.jsonl", "--text", "short.txt"],
        "text short gives",
    ),
    "certify: not fused": (["certify", "model", "model", "--text", "general.jsonl"], "no fused deltas"),
}


@pytest.fixture(scope="module")
def damaged(learnt):
    (learnt / "empty.jsonl").write_text("")
    (learnt / "short.txt").write_text("a few words")
    delta = (learnt / "digits.delta").read_bytes()
    (learnt / "damaged.delta").write_bytes(delta[: len(delta) // 2])
    for name in ("damaged", "wordless"):
        tiny.backbone().save_pretrained(learnt / name)
    tiny.tokenizer().save_pretrained(learnt / "damaged")
    weights = (learnt / "damaged" / "model.safetensors").read_bytes()
    (learnt / "damaged" / "model.safetensors").write_bytes(weights[:-1000])
    return learnt


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_with_exit_2_and_nothing_written(damaged, tether, monkeypatch, case):
    monkeypatch.chdir(damaged)
    arguments, message = BAD[case]
    before = sorted(damaged.iterdir())
    code, out, err = tether(*arguments, "--out", "result")
    assert code == 2
    assert message in err
    assert complaints(err) == 1
    assert "Traceback" not in err
    assert out == ""
    assert sorted(damaged.iterdir()) == before


@pytest.mark.parametrize(
    "command",
    [
        ["convert", "base"],
        ["fuse", "model", "digits.delta"],
        ["learn", "base", "--text", "digits.jsonl", "--base-text", "general.jsonl"],
    ],
    ids=lambda command: command[0],
)
def test_an_output_with_content_is_refused_and_kept(learnt, tether, monkeypatch, tmp_path, command):
    monkeypatch.chdir(learnt)
    (tmp_path / "precious").write_text("keep")
    code, _, err = tether(*command, "--out", tmp_path)
    assert code == 2
    assert str(tmp_path.name) in err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_unknown_options_and_modes_are_exit_2(learnt, tether, monkeypatch):
    monkeypatch.chdir(learnt)
    assert tether("fuse", "model", "digits.delta", "--out", "x", "--chrat", "linear")[0] == 2
    assert tether("generate", "model", "ab", "--mode", "argmax")[0] == 2
    assert tether("generate", "model", "")[0] == 2
    assert tether("generate", "model", "ab", "--mode", "deterministic", "--temperature", 1.0)[0] == 2


def test_help_and_version_need_no_heavy_import():
    script = (
        "import sys; sys.argv = ['tether', '--version']\n"
        "from tether.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip()


def test_json_has_no_infinity(capsys):
    emit({"a": [float("inf"), 1.5], "b": {"c": float("nan")}, "d": (2, "x")}, True, "")
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": {"c": None}, "d": [2, "x"]}


def test_certify_writes_over_certificates_only(learnt, tether, monkeypatch, tmp_path):
    shutil.copytree(learnt, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    command = ("certify", "base", "fused", "--text", "general.jsonl", "--continuations", 0, "--out")
    for victim in ("general.jsonl", "digits.delta"):
        before = (tmp_path / "copy" / victim).read_bytes()
        code, _, err = tether(*command, victim)
        assert code == 2
        assert "exists already" in err
        assert (tmp_path / "copy" / victim).read_bytes() == before
    assert tether(*command, "again.json")[0] == 0
    assert tether(*command, "again.json")[0] == 0


def test_what_the_system_refuses_is_one_message(learnt, tether, monkeypatch):
    monkeypatch.chdir(learnt)
    code, _, err = tether("fuse", "base", "digits.delta", "--out", "x" * 300)
    assert code == 2
    assert "choose another" in err
    code, _, err = tether("generate", "fused", "hi", "--temperature", 1, "--seed", 10**22)
    assert code == 2
    assert "seed=1" in err


def test_numbers_are_read_only_when_asked(work, tether, tmp_path):
    """A base with spare rows could take numbers in; that would change what it reads."""
    backbone = tiny.backbone("qwen2")
    backbone.resize_token_embeddings(264)
    backbone.save_pretrained(tmp_path / "spare")
    tiny.tokenizer().save_pretrained(tmp_path / "spare")
    for numbers in (False, True):
        out = tmp_path / f"converted-{numbers}"
        code, said, err = tether(
            "convert", tmp_path / "spare", "--out", out, "--json", *["--numbers"] * numbers
        )
        assert code == 0, err
        assert (json.loads(said)["num_token_id"] is not None) == numbers
    prompt = ("Q: 12 + 30 = 42. 5 + 7 =", "--new-tokens", 6)
    plain, same = (tether("generate", tmp_path / name, *prompt)[1] for name in ("spare", "converted-False"))
    assert plain == same


def test_documents_that_are_left_out_are_named(work, tether, monkeypatch, tmp_path, caplog):
    monkeypatch.chdir(work)
    write_documents(tmp_path / "mixed.jsonl", [*tiny.documents("digits", 24, 1), *["short one"] * 50])
    command = (
        "learn",
        "base",
        "--base-text",
        "general.jsonl",
        "--text",
        tmp_path / "mixed.jsonl",
        "--budget",
        0.05,
    )
    code, _, err = tether(*command, "--out", tmp_path / "mixed.delta")
    assert code == 0, err
    assert "50 of 74 documents are shorter than 32 tokens and left out" in caplog.text
