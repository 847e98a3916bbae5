import json
import shutil
from pathlib import Path

import pytest
import torch

import tiny
from tether.causal.checkpoint import save_checkpoint
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.certificate import Certificate, Settings, certify, read
from tether.delta.delta import Delta
from tether.delta.fusion import fuse, unfuse
from tether.delta.gate import Gate
from tether.delta.verification import verify
from tether.errors import CertificateError, CheckpointError, ConfigError
from tether.store.documents import write_documents


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a fused checkpoint, two texts and their certificate."""
    folder = tmp_path_factory.mktemp("certified")
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    generator = torch.Generator().manual_seed(0)
    delta = Delta(
        name="a",
        chart="symmetric",
        first=torch.randn(32, 32, generator=generator) / 64,
        second=torch.randn(32, 32, generator=generator) / 32,
        gate=Gate(torch.zeros(32), torch.randn(4, 32, generator=generator), torch.full((6,), 120.0)),
        base=model.config.base_fingerprint,
        record={"budget": 0.1, "metric": "softmax", "latent_base": 0.4},
    )
    fused = fuse(model, {delta: 1.0}, by="sum")
    save_checkpoint(fused, tiny.tokenizer(), folder / "fused")
    texts = {"words": folder / "words.jsonl", "digits": folder / "digits.jsonl"}
    for kind, path in texts.items():
        write_documents(path, tiny.documents(kind, 6))
    certify(model, fused, tiny.tokenizer(), texts, window=48).save(folder / "cert.json")
    return folder


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_certificate_holds_also_after_its_folder_has_moved(copy):
    assert verify(copy / "cert.json") == []
    certificate = read(copy / "cert.json")
    assert certificate.model["path"] == "fused"
    assert certificate.texts["words"]["path"] == "words.jsonl"
    assert certificate.figures["words"]["softmax_kl"]["mean"] > 0
    assert certificate.figures["words"]["bound"]["violations"] == 0
    planned = certificate.figures["words"]["budgets"]
    assert planned["allowed"] == pytest.approx(0.4)
    assert planned["ratio"] == pytest.approx(certificate.figures["words"]["latent_drift"]["mean"] / 0.4)


def files(folder):
    # The card tells of a certificate, and is no part of what one describes.
    return sorted(
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in ("cert.json", "README.md")
    )


def test_any_byte_of_any_referenced_file_counts(copy, generator):
    names = files(copy)
    assert len(names) >= 7
    for name in names:
        path = copy / name
        content = path.read_bytes()
        at = int(torch.randint(len(content), (), generator=generator))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        wrong = verify(copy / "cert.json")
        assert any(name.rsplit("/", 1)[-1] in line for line in wrong), name
        path.write_bytes(content)
    (copy / "words.jsonl").unlink()
    assert any("missing" in line for line in verify(copy / "cert.json"))


def numbers(value, path=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, (*path, key))
    elif isinstance(value, list):
        for key, inner in enumerate(value):
            yield from numbers(inner, (*path, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def change(content, path, value):
    *outer, last = path
    for key in outer:
        content = content[key]
    content[last] = value


def test_any_edited_figure_breaks_the_seal(copy):
    text = (copy / "cert.json").read_text()
    found = list(numbers(json.loads(text)))
    assert len(found) > 40
    for path, value in found:
        content = json.loads(text)
        change(content, path, value + 1 if isinstance(value, int) else value * (1 + 1e-9) + 1e-12)
        (copy / "cert.json").write_text(json.dumps(content))
        try:
            assert verify(copy / "cert.json") != [], path
        except CertificateError:
            assert path == ("schema_version",)


def test_a_forged_seal_is_found_by_recomputing(copy):
    content = json.loads((copy / "cert.json").read_text())
    content["figures"]["words"]["softmax_kl"]["mean"] *= 0.9
    content["figures"]["digits"]["bound"]["contexts"] += 1
    forged = Certificate(**content).sealed()
    (copy / "cert.json").write_text(json.dumps(forged.model_dump(mode="json")))
    wrong = verify(copy / "cert.json")
    assert len(wrong) == 2
    assert "words.softmax_kl.mean" in wrong[0]
    assert "digits.bound.contexts" in wrong[1]


@pytest.mark.parametrize("change", ["text", "claims", "no texts", "files", "more files"])
def test_what_recomputing_would_pass_over_is_found_too(copy, change):
    content = json.loads((copy / "cert.json").read_text())
    if change == "text":
        content["figures"]["wikipedia"] = content["figures"]["words"]
    elif change == "claims":
        content["claims"] = ["softmax KL is at most 0.001 on any text whatever"]
    elif change == "no texts":
        content["texts"], content["figures"] = {}, {}
    elif change == "files":
        content["model"]["files"].pop("config.json")
    else:
        (copy / "fused" / "more.safetensors").write_bytes(b"more")
    (copy / "cert.json").write_text(json.dumps(Certificate(**content).sealed().model_dump(mode="json")))
    if change == "no texts":
        with pytest.raises(CertificateError, match="at least one"):
            verify(copy / "cert.json")
    else:
        assert verify(copy / "cert.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["model"].clear(),
        lambda c: c["model"].update(path=None),
        lambda c: c["settings"].update(foo=1),
        lambda c: c["texts"]["words"].clear(),
    ],
)
def test_malformed_parts_cannot_be_read(copy, change):
    content = json.loads((copy / "cert.json").read_text())
    change(content)
    (copy / "cert.json").write_text(json.dumps(Certificate(**content).sealed().model_dump(mode="json")))
    with pytest.raises(CertificateError):
        verify(copy / "cert.json")


def test_a_certificate_beside_its_model_is_no_part_of_it(made, copy):
    from tether.causal.loading import load

    fused, tokenizer = load(str(copy / "fused"))
    base, _ = unfuse(fused)
    for name in ("one.json", "two.json"):
        certify(base, fused, tokenizer, copy / "words.jsonl", window=48).save(copy / "fused" / name)
    assert verify(copy / "fused" / "one.json") == verify(copy / "fused" / "two.json") == []


def test_another_backbone_under_the_deltas_is_no_fusion_of_the_base(copy):
    from tether.causal.loading import load

    fused, tokenizer = load(str(copy / "fused"))
    base = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    certify(base, fused, tokenizer, copy / "words.jsonl", window=48)
    with torch.no_grad():
        fused.backbone.layers[0].mlp.up_proj.weight += 0.1
    with pytest.raises(CheckpointError, match="backbone"):
        certify(base, fused, tokenizer, copy / "words.jsonl", window=48)


@pytest.fixture(scope="module")
def leashed(made, tmp_path_factory):
    """A certificate of a leashed model that wrote texts itself."""
    folder = tmp_path_factory.mktemp("leashed")
    base, deltas = unfuse(CausalQwenForCausalLM.from_pretrained(made / "fused"))
    fused = fuse(base, dict.fromkeys(deltas, 30.0), gated=False, leash=0.05)
    save_checkpoint(fused, tiny.tokenizer(), folder / "fused")
    write_documents(folder / "words.jsonl", tiny.documents("words", 6))
    options = {"window": 48, "continuations": 2, "continuation_tokens": 20}
    certify(base, fused, tiny.tokenizer(), folder / "words.jsonl", **options).save(folder / "cert.json")
    return folder


def test_a_leash_and_what_the_model_wrote_are_certified(leashed):
    assert verify(leashed / "cert.json") == []
    figures = read(leashed / "cert.json").figures["words"]
    for part in (figures, figures["continuations"]):
        assert part["softmax_kl"]["max"] <= 0.05 * (1 + 1e-3)
        assert part["leash_pulled"] > 0
        assert part["token_law"]["kl_at_most"]["max"] == pytest.approx(part["latent_drift"]["max"])
    assert figures["continuations"]["tokens"] == 40


@pytest.mark.parametrize("change", ["token", "prompt", "length", "vocabulary"])
def test_texts_that_the_model_did_not_write_are_found(leashed, tmp_path, change):
    content = json.loads((leashed / "cert.json").read_text())
    ids = content["figures"]["words"]["continuations"]["ids"]
    if change == "length":
        ids[0].pop()
        ids[1].pop()
    else:
        place = {"token": -3, "prompt": 4, "vocabulary": -1}[change]
        ids[1][place] = 5000 if change == "vocabulary" else (ids[1][place] + 1) % 256
    shutil.copytree(leashed, tmp_path / "copy")
    forged = Certificate(**content).sealed()
    (tmp_path / "copy" / "cert.json").write_text(json.dumps(forged.model_dump(mode="json")))
    assert any("words.continuations" in line for line in verify(tmp_path / "copy" / "cert.json"))


@pytest.mark.parametrize("version", [1, 2, 3, 4, 6, 7, 8])
def test_a_certificate_of_an_older_schema_still_holds(copy, version):
    content = json.loads((copy / "cert.json").read_text())
    content["schema_version"] = version
    content["claims"] = json.loads((Path(__file__).parent / "older_claims.json").read_text())[str(version)]
    if version < 5:
        del content["model"]["dtype"]
    for figures in content["figures"].values():
        if version < 8:
            del figures["values"]
        if version < 7:
            del figures["alone"]
        if version < 3:
            del figures["budgets"]
    if version == 1:
        for name in ("continuations", "continuation_tokens", "seed"):
            del content["settings"][name]
        for figures in content["figures"].values():
            del figures["token_law"], figures["leash_pulled"]
    older = Certificate(**content).sealed()
    (copy / "cert.json").write_text(json.dumps(older.model_dump(mode="json")))
    assert verify(copy / "cert.json") == []
    boasting = older.model_copy(update={"claims": ("It never drifts.",)}).sealed()
    (copy / "cert.json").write_text(json.dumps(boasting.model_dump(mode="json")))
    assert verify(copy / "cert.json") == ["the claims are not those of this kind of certificate"]
    older.figures["words"]["nll"] *= 1.1
    (copy / "cert.json").write_text(json.dumps(older.sealed().model_dump(mode="json")))
    assert len(verify(copy / "cert.json")) == 1


def test_a_certificate_with_fields_of_its_own_is_refused(copy):
    content = json.loads((copy / "cert.json").read_text())
    content["model"]["extra"] = "trusted by all"
    (copy / "cert.json").write_text(json.dumps(Certificate(**content).sealed().model_dump(mode="json")))
    with pytest.raises(CertificateError, match=r"model: unknown fields \['extra'\]"):
        verify(copy / "cert.json")
    content["model"] = {key: value for key, value in content["model"].items() if key != "extra"} | {
        "dtype": "nn"
    }
    (copy / "cert.json").write_text(json.dumps(Certificate(**content).sealed().model_dump(mode="json")))
    with pytest.raises(CertificateError, match=r"model\.dtype: 'nn', expected one of float32"):
        verify(copy / "cert.json")


def test_a_certificate_in_half_precision_is_verified_in_it(copy):
    fused = CausalQwenForCausalLM.from_pretrained(copy / "fused", dtype=torch.bfloat16)
    base = unfuse(fused)[0]
    certificate = certify(base, fused, tiny.tokenizer(), copy / "words.jsonl", window=48)
    path = certificate.save(copy / "half.json")
    assert read(path).model["dtype"] == "bfloat16"
    assert verify(path) == []


@pytest.mark.parametrize("content", [None, "", "{}", "[1]", '{"schema_version": 99}', "\x00\x01"])
def test_what_is_no_certificate_cannot_be_read(tmp_path, content):
    if content is not None:
        (tmp_path / "cert.json").write_text(content)
    with pytest.raises(CertificateError, match=r"cert\.json"):
        verify(tmp_path / "cert.json")


def test_what_cannot_be_certified(made, tmp_path):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    other = CausalQwenForCausalLM.from_backbone(tiny.backbone(seed=1))
    fused = CausalQwenForCausalLM.from_pretrained(made / "fused")
    with pytest.raises(CertificateError, match="no fused deltas"):
        certify(model, model, tiny.tokenizer(), tiny.documents("words", 6))
    with pytest.raises(CertificateError, match="different backbones"):
        certify(other, fused, tiny.tokenizer(), tiny.documents("words", 6))
    with pytest.raises(ConfigError, match="shares between 0 and 1"):
        Settings(confidence=1.0)
    loose = certify(model, fused, tiny.tokenizer(), tiny.documents("words", 6), window=48)
    with pytest.raises(CertificateError, match="refers to files"):
        loose.save(tmp_path / "cert.json")
    assert not (tmp_path / "cert.json").exists()
