"""`tether push` against a hub on this machine: what arrives, what its card says, and what is refused."""

import json
import os
import subprocess
import sys

import pytest
import yaml

import said
import tiny
from hub import TOKEN, hub
from tether.causal.card import CARD, CERTIFICATE, MARK, learnt_card
from tether.causal.checkpoint import save_checkpoint
from tether.causal.loading import load
from tether.delta.adapter_learning import learn_adapter
from tether.delta.adapter_serving import save_adapted, serve
from tether.delta.adapter_training import AdapterFit
from tether.delta.budget import Budget
from tether.delta.certificate import certify
from tether.delta.fusion import fuse
from tether.delta.learning import learn_delta
from tether.delta.parcel import pack
from tether.delta.verification import verify
from tether.store.documents import write_documents


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, a delta, a fusion of it, and its certificate."""
    folder = tmp_path_factory.mktemp("push")
    write_documents(folder / "general.jsonl", tiny.documents("words", 12, 3))
    write_documents(folder / "digits.jsonl", tiny.documents("digits", 24, 1))
    tiny.backbone("llama").save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    model, tokenizer = load(str(folder / "base"))
    delta = learn_delta(
        model, tokenizer, folder / "digits.jsonl", base_texts=folder / "general.jsonl", budget=0.05, name="digits",
        window=48, gate=False,
    ).save(folder / "digits.delta")  # fmt: skip
    save_checkpoint(fuse(model, {delta: 1.0}, gated=False), tokenizer, folder / "fused")
    fused, _ = load(str(folder / "fused"))
    certificate = certify(model, fused, tokenizer, {"general | text": folder / "general.jsonl"}, window=48)
    certificate.save(folder / "fused" / CERTIFICATE)
    return folder


def push(made, endpoint, *args, token=TOKEN):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(made / "home"), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-m", "tether.cli.app", "push", *map(str, args)], cwd=made, capture_output=True, text=True,
        check=False, timeout=300, env=environment | ({"HF_TOKEN": token} if token else {}),
    )  # fmt: skip


def header(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_a_checkpoint_arrives_whole_with_a_card_of_its_certificate(made):
    with hub() as (endpoint, kept):
        ended = push(made, endpoint, "fused", "me/law", "--base", "someone/base", "--message", "first")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip().endswith(f"are at {endpoint}/me/law.")
    repository = kept["me/law"]
    assert repository["private"] is True
    assert repository["commits"] == ["first"]
    sent = {name: content for name, content in repository["files"].items() if name != CARD}
    here = [path for path in (made / "fused").iterdir() if path.name != CARD]
    assert sent == {path.name: path.read_bytes() for path in here}
    card = repository["files"][CARD].decode()
    assert header(card) == {
        "base_model": "someone/base", "library_name": "tether", "pipeline_tag": "text-generation",
        "tags": ["tether", "fusion"],
    }  # fmt: skip
    figures = json.loads((made / "fused" / CERTIFICATE).read_text())["figures"]["general | text"]
    cells = next(line for line in card.splitlines() if line.startswith("| general")).strip("| ").split(" | ")
    assert cells == [
        "general _ text", f"{figures['tokens']:,}", f"{figures['nll_base']:.3f}", f"{figures['nll']:.3f}",
        f"{figures['softmax_kl']['mean']:.2g}", f"{figures['softmax_kl']['p99']:.2g}",
    ]  # fmt: skip
    assert str(made) not in card
    # What came down from there holds as it did, with the card of the certificate in place of the first one.
    (made / "fused" / CARD).write_bytes(repository["files"][CARD])
    (made / "fused" / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    assert verify(made / "fused" / CERTIFICATE, base=str(made / "base")) == []


def test_a_delta_arrives_with_its_record_and_says_that_it_carries_text(made):
    with hub() as (endpoint, kept):
        ended = push(made, endpoint, "digits.delta", "me/digits", "--public", "--json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["url"] == f"{endpoint}/me/digits"
    assert kept["me/digits"]["private"] is False
    files = kept["me/digits"]["files"]
    assert files.keys() == {"digits.delta", CARD}
    assert files["digits.delta"] == (made / "digits.delta").read_bytes()
    card = files[CARD].decode()
    assert "0.05 nats a token in the mean (softmax)" in card
    assert "pieces of the domain's text" in card
    assert "tether fuse BASE digits.delta" in card


def test_a_fusion_of_adapters_says_what_text_its_folders_carry(made, tmp_path):
    model, tokenizer = load(str(made / "base"))
    fit = AdapterFit(budget=Budget(value=0.05), probe=200)
    adapter = learn_adapter(
        model,
        tokenizer,
        made / "digits.jsonl",
        base_texts=made / "general.jsonl",
        name="digits",
        window=48,
        fit=fit,
    )
    assert adapter.sample
    save_adapted(
        serve(model, {adapter: 1.0}), {adapter: 1.0}, tokenizer, tmp_path / "F", base=str(made / "base")
    )
    parcel = pack(tmp_path / "F", name="me/law")
    assert parcel.sample == len(adapter.sample)
    assert f"It carries {len(adapter.sample)} pieces of its domains' texts" in parcel.card
    # Whoever loads it needs the base, which is not in it, and PEFT.
    card = pack(tmp_path / "F", name="me/law", base="some/base").card
    assert 'os.environ["TETHER_BASE"] = "some/base"' in card
    assert "pip install 'tether[adapters]'" in card
    assert 'os.environ["TETHER_BASE"] = "BASE"' in parcel.card
    assert "TETHER_BASE" not in pack(made / "fused").card


def test_the_card_of_an_adapter_names_the_packing_it_needs():
    packing = {"bits": 4, "kind": "nf4", "double": True, "compute": "float32"}
    card = learnt_card("adapter", "law", {"quantised": packing}, file="law.lora", base="some/base")
    assert "on `some/base` in 4 bits (nf4), learnt as an adapter" in card
    assert "tether fuse some/base law.lora --out fused --quantise 4bit" in card


def test_the_card_of_a_user_stays(made, tmp_path):
    model, tokenizer = load(str(made / "base"))
    folder = save_checkpoint(model, tokenizer, tmp_path / "plain")
    assert MARK in (folder / CARD).read_text()
    assert pack(folder, name="a/b").card.count("a/b") == 3
    (folder / CARD).write_text("# Mine\n")
    assert pack(folder, name="a/b").card == "# Mine\n"


def test_nothing_is_sent_by_a_dry_run(made):
    ended = push(made, "http://127.0.0.1:9", "digits.delta", "me/digits", "--dry-run", token=None)
    assert ended.returncode == 0, ended.stderr
    assert "Nothing was sent" in ended.stdout


@pytest.mark.parametrize(
    ("path", "name", "token", "message"),
    [
        ("fused", "no good name", TOKEN, "expected OWNER/NAME"),
        ("general.jsonl", "me/x", TOKEN, "general.jsonl"),
        ("base", "me/x", TOKEN, "a folder of an adapter or a checkpoint that tether wrote"),
        ("nowhere", "me/x", TOKEN, "nowhere"),
        ("digits.delta", "me/x", None, "nobody is logged in"),
        ("digits.delta", "me/x", "hf_other", "the hub did not take it"),
    ],
)
def test_what_cannot_be_sent_is_one_message(made, path, name, token, message):
    with hub() as (endpoint, kept):
        ended = push(made, endpoint, path, name, token=token)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert said.complaints(ended.stderr) == 1
    assert kept == {}


def test_a_hub_that_does_not_answer(made):
    ended = push(made, "http://127.0.0.1:9", "digits.delta", "me/x")
    assert ended.returncode == 2
    assert "http://127.0.0.1:9 cannot be reached" in ended.stderr


def test_a_hub_that_hangs_up(made):
    with hub(broken=True) as (endpoint, kept):
        ended = push(made, endpoint, "digits.delta", "me/x")
    assert ended.returncode == 2
    assert "me/x: the hub did not take it" in ended.stderr
    assert kept["me/x"]["files"] == {}


def test_a_link_is_not_followed(made, tmp_path):
    model, tokenizer = load(str(made / "base"))
    folder = save_checkpoint(model, tokenizer, tmp_path / "plain")
    (tmp_path / "secret").write_text("secret")
    (folder / "more.txt").symlink_to(tmp_path / "secret")
    with hub() as (endpoint, kept):
        ended = push(made, endpoint, folder, "me/x")
    assert ended.returncode == 2
    assert "expected a plain file" in ended.stderr
    assert kept == {}
