"""Lambda and the last step are found on the merged model: as the document writes them, and by held-out loss."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close
from typer.testing import CliRunner

import tiny
from checkpoints import plan, write_recipe
from merge import lape
from merge.test_lape_tefm import ENCODINGS, fields, keep, moved, tensors
from merge.test_lape_tefm import MODULES as BOTH_LAYERS
from tether.cli.app import app
from tether.delta.windows import window_text
from tether.errors import CheckpointError, ConfigError
from tether.merge.check import load_checkpoint
from tether.merge.encoding import encode
from tether.merge.flat import flat_step
from tether.merge.observation import observe
from tether.merge.paths import sample_paths
from tether.merge.probes import Probe, encode_probes
from tether.merge.run import merge
from tether.merge.staging import Staging
from tether.merge.tefm import refine
from tether.merge.tefm.refine import log_variance
from tether.store.documents import write_documents
from tether.store.manifest import read_manifest

TEXTS = ["Go on", "What colour is it?", "One, two", "The model and the leash"]
LAMBDAS = [0.2, 0.5, 0.8]
MODULES = [name for name in BOTH_LAYERS if ".layers.0." in name]
"""The models here have one layer."""


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    models = {"c": tiny.backbone("llama", layers=1)}
    models |= {name: moved(models["c"], seed) for seed, name in enumerate("ab", start=1)}
    for name, model in models.items():
        keep(model, folder / name)
        if name != "c":
            given = {"paths": 3, "shortest": 2, "longest": 6, "encodings": ENCODINGS}
            observe(model, lape.probes(4), folder / f"seen-{name}", **given)
    (folder / "probes.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    write_documents(folder / "words.jsonl", tiny.documents("words", 6))
    return folder, models


def refined(folder, options, **section):
    found = fields(folder, **options)
    own = {"probes": str(folder / "probes.jsonl"), "samples": 3, "paths": 3, "longest": 6}
    return found | {"refine": own | section}


def encoded(model, place, weighting):
    """phi* of a model by the pieces: its own paths, encoded."""
    bank = sample_paths(
        model, encode_probes([Probe(text=text) for text in TEXTS[:3]], tiny.tokenizer()), paths=3, longest=6
    )
    return encode(model, bank, place, weighting=weighting)


def variance(signatures, gradient):
    values = []
    for module in MODULES:
        phi = signatures.phi(module, gradient).double()
        mass = torch.exp(signatures.log_mass.double())
        values.append((mass[:, None] * phi[..., 1]).mean(0))
    return float(torch.cat(values).var())


@pytest.mark.parametrize(
    ("form", "gradient", "weighting"), [("literal", "paper", "paper"), ("corrected", "true", "position")]
)
def test_lambda_has_the_smallest_variance_of_the_merged_models_own_gradients(
    family, tmp_path, form, gradient, weighting
):
    folder, _ = family
    report = merge(
        plan(tmp_path, **refined(folder, {"form": form}, search=LAMBDAS)), tmp_path / "out", threads=1
    )
    tried = report["refine"]["tried"]
    assert [each["lambda"] for each in tried[:3]] == LAMBDAS
    for each in tried[::2]:
        options = {"form": form, "lambda": each["lambda"]}
        place = tmp_path / f"one-{each['lambda']}"
        merge(plan(tmp_path, **fields(folder, **options)), place, threads=1)
        found = encoded(load_checkpoint(place), tmp_path / f"signatures-{each['lambda']}", weighting)
        assert each["log_variance"] == pytest.approx(math.log(variance(found, gradient)), abs=1e-6)
        assert log_variance(found, gradient) == pytest.approx(each["log_variance"], abs=1e-12)
    best = min(tried, key=lambda each: each["log_variance"])["lambda"]
    assert report["refine"]["lambda"] == best
    merge(plan(tmp_path, **fields(folder, **{"form": form, "lambda": best})), tmp_path / "best", threads=1)
    one = tensors(tmp_path / "best")
    for name, values in tensors(tmp_path / "out").items():
        assert torch.equal(values, one[name])
    # Nothing stays but the result; a second run knows that it is done, and on which probes.
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]
    assert [each.path for each in read_manifest(tmp_path / "out").inputs if each.role == "refine"] == [
        str(folder / "probes.jsonl")
    ]
    again = plan(tmp_path, **refined(folder, {"form": form}, search=LAMBDAS))
    assert merge(again, tmp_path / "out", threads=1) == report


def mean_loss(model, text):
    windows = window_text(tiny.documents("words", 6), tiny.tokenizer(), length=64, tokens=256)
    total = count = 0
    for start, end in zip(windows.starts[:-1], windows.starts[1:], strict=True):
        ids = windows.input_ids[start:end]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum"))
        count += len(ids) - 1
    return total / count


def test_lambda_by_held_out_loss(family, tmp_path):
    folder, _ = family
    given = refined(
        folder, {}, search=LAMBDAS, criterion="loss", text={"words": str(folder / "words.jsonl")},
        tokens=256, window=64,
    )  # fmt: skip
    report = merge(plan(tmp_path, **given), tmp_path / "out", threads=1)
    for each in report["refine"]["tried"][:2]:
        place = tmp_path / f"one-{each['lambda']}"
        merge(plan(tmp_path, **fields(folder, **{"lambda": each["lambda"]})), place, threads=1)
        assert each["loss"] == pytest.approx(mean_loss(load_checkpoint(place), "words"), abs=1e-5)
    best = min(report["refine"]["tried"], key=lambda each: each["loss"])
    assert report["refine"]["lambda"] == best["lambda"]


def test_the_documents_last_step(family, tmp_path):
    folder, _ = family
    options = {"form": "literal", "weighting": "self-normalised", "eta": 0.03}
    for name in "ab":
        given = {"paths": 3, "shortest": 2, "longest": 6}
        model = load_checkpoint(folder / name)
        encodings = [refine_encoding("self-normalised")]
        observe(model, lape.probes(4), folder / f"seen-{name}", **given, encodings=encodings)
    merge(plan(tmp_path, **fields(folder, **options)), tmp_path / "before", threads=1)
    report = merge(plan(tmp_path, **refined(folder, options, step="paper")), tmp_path / "after", threads=1)
    found = encoded(load_checkpoint(tmp_path / "before"), tmp_path / "signatures", "self-normalised")
    before, after = tensors(tmp_path / "before"), tensors(tmp_path / "after")
    largest = 0.0
    for name in before:
        module = name.removesuffix(".weight")
        step = torch.zeros_like(before[name])
        if module in MODULES:
            g = found.phi(module, "paper").double().mean(0)[:, 1]
            rows = 0.03 * g / (g.abs() + 1e-8)
            largest = max(largest, float(rows.abs().max()))
            step = rows.float().unsqueeze(-1).expand_as(before[name])
        assert_close(before[name] - after[name], step, rtol=0, atol=1e-6)
    assert report["refine"]["step"]["eta"] == 0.03
    assert report["refine"]["step"]["largest"] == pytest.approx(largest, rel=1e-6)
    assert largest > 0.029


def refine_encoding(weighting):
    from tether.merge.tefm.observed import parse_encoding

    return parse_encoding(weighting)


def test_the_sharpness_aware_step(family, tmp_path):
    folder, _ = family
    text = {"words": str(folder / "words.jsonl")}
    section = {"step": "sam", "text": text, "tokens": 512, "window": 64}
    merge(plan(tmp_path, **fields(folder)), tmp_path / "before", threads=1)
    report = merge(plan(tmp_path, **refined(folder, {"eta": 0.01}, **section)), tmp_path / "after", threads=1)
    step = report["refine"]["step"]
    assert step["form"] == "sam"
    assert 0 < step["eta"] <= 0.01
    assert step["after"] < step["before"]
    # The same step by the piece, on the weights of linear layers and on single windows.
    model = load_checkpoint(tmp_path / "before")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.removesuffix(".weight") in MODULES)
    windows = window_text(tiny.documents("words", 6), tiny.tokenizer(), length=64, tokens=512)
    rows = [
        windows.batch(row) for row in windows.starts.diff().argsort(descending=True, stable=True).split(1)
    ]

    def loss(batches):
        def of(model):
            parts = [
                torch.nn.functional.cross_entropy(
                    model(input_ids=b.input_ids).logits[0, :-1], b.input_ids[0, 1:], reduction="sum"
                )
                for b in batches
            ]
            return sum(parts) / sum(b.input_ids.shape[1] - 1 for b in batches)

        return of

    held = loss(rows[1::2])
    found = flat_step(model, loss(rows[::2]), lambda m: float(held(m)), eta=0.01)
    assert found.before == pytest.approx(step["before"], rel=1e-5)
    after = tensors(tmp_path / "after")
    for name, values in model.state_dict().items():
        if name != "lm_head.weight":
            assert_close(after[name], values, rtol=1e-4, atol=1e-5)


def test_an_interrupted_search_goes_on(family, tmp_path, monkeypatch):
    folder, _ = family
    given = refined(folder, {"form": "literal"}, search=LAMBDAS, step="paper")
    whole = merge(plan(tmp_path, **given), tmp_path / "whole", threads=1)
    real, seen = refine.encode, []

    def counting(*arguments, **options):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(1)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(refine, "encode", counting)
        with pytest.raises(KeyboardInterrupt):
            merge(plan(tmp_path, **given), tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
    again = []
    with monkeypatch.context() as patch:
        patch.setattr(refine, "encode", lambda *a, **k: (again.append(1), real(*a, **k))[1])
        report = merge(plan(tmp_path, **given), tmp_path / "out", threads=1)
    # Two of the values were known, and all others and the step were not.
    assert len(again) == len(whole["refine"]["tried"]) - 2 + 1
    assert report == whole
    for name in ("model.safetensors", "merge.json", "tether.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_search_that_was_finished_is_not_done_again(family, tmp_path, monkeypatch):
    folder, _ = family
    given = refined(folder, {"form": "literal"}, search=LAMBDAS[:1])
    whole = merge(plan(tmp_path, **given), tmp_path / "whole", threads=1)
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "publish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge(plan(tmp_path, **given), tmp_path / "out", threads=1)
    monkeypatch.setattr(refine, "encode", lambda *a, **k: pytest.fail("measured again"))
    assert merge(plan(tmp_path, **given), tmp_path / "out", threads=1) == whole


def test_probes_that_change_meanwhile(family, tmp_path, monkeypatch):
    folder, _ = family
    given = refined(folder, {"form": "literal"}, search=LAMBDAS[:1])
    content = (folder / "probes.jsonl").read_text()
    real = refine.encode

    def writing(*arguments, **options):
        (folder / "probes.jsonl").write_text(content + '{"text": "more"}\n')
        return real(*arguments, **options)

    monkeypatch.setattr(refine, "encode", writing)
    with pytest.raises(CheckpointError, match=r"probes.jsonl: changed while the merge was refined"):
        merge(plan(tmp_path, **given), tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
    (folder / "probes.jsonl").write_text(content)


BAD = {
    "nothing": ({"probes": "p"}, "refine: changes nothing; give search or step"),
    "no order": ({"search": [0.5, 0.2], "probes": "p"}, r"refine.search: \[0.5, 0.2\] is not ascending"),
    "no probes": ({"step": "paper"}, "refine.probes: is missing"),
    "no probes for the variance": ({"search": [0.5]}, "refine.probes: is missing"),
    "no text": ({"step": "sam"}, "refine.text: is missing"),
    "no text for the loss": ({"search": [0.5], "criterion": "loss"}, "refine.text: is missing"),
    "a criterion that is none": ({"search": [0.5], "criterion": "nll"}, "refine.criterion: Input should be"),
    "an unknown key": ({"searches": [0.5]}, "refine.searches: unknown key; did you mean 'search'"),
    "a negative lambda": ({"search": [-0.5], "probes": "p"}, r"refine.search.0: Input should be greater"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sections_are_refused(family, tmp_path, case):
    section, said = BAD[case]
    with pytest.raises(ConfigError, match=said):
        plan(tmp_path, **fields(family[0]), refine=section)


def test_sections_that_cannot_be_done_are_refused_before_the_long_part(family, tmp_path):
    folder, _ = family
    given = refined(
        folder, {}, step="sam", text={"words": str(folder / "words.jsonl")}, tokens=256, window=256
    )
    one = copy.deepcopy(given)
    write_documents(tmp_path / "one.jsonl", [" ".join(tiny.documents("words", 3))[:256]])
    one["refine"]["text"] = {"one": str(tmp_path / "one.jsonl")}
    with pytest.raises(ConfigError, match="step sam needs two windows"):
        merge(plan(tmp_path, **one), tmp_path / "out", threads=1)
    averaged = given | {"operator": "linear", "models": {n: {"path": str(folder / n)} for n in "ab"}}
    with pytest.raises(
        ConfigError, match="refine: linear has nothing to refine; expected operator lape_tefm"
    ):
        plan(tmp_path, **averaged)
    with pytest.raises(ConfigError, match=r"refine: overrides.0 has a lambda of its own"):
        plan(tmp_path, **given, overrides=[{"match": "*mlp*", "options": {"lambda": 0.1}}])
    gone = refined(folder, {}, search=LAMBDAS)
    gone["refine"]["probes"] = str(tmp_path / "gone.jsonl")
    recipe = write_recipe(tmp_path / "recipe.yaml", **gone)
    ran = CliRunner().invoke(app, ["merge", str(recipe), "--dry-run"])
    assert isinstance(ran.exception, ConfigError)
    assert "gone.jsonl: no such probe file" in str(ran.exception)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_was_found(family, tmp_path):
    folder, _ = family
    given = refined(folder, {"form": "literal"}, search=LAMBDAS[:2], step="paper")
    recipe = write_recipe(tmp_path / "recipe.yaml", **given)
    ran = CliRunner().invoke(app, ["merge", str(recipe), "--out", str(tmp_path / "out")])
    assert ran.exit_code == 0, ran.output
    assert "by log variance (0.2: " in ran.stdout
    assert "last step: rows moved by" in ran.stdout
