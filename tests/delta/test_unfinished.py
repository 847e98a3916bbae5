"""A fit that is stopped goes on where it stood, and ends as if it had not been stopped."""

import json
import logging
import os
import signal
from dataclasses import replace

import pytest
import torch

import tiny
from tether.cli.asked import ASKED
from tether.delta import unfinished
from tether.delta.adapter import Adapter
from tether.delta.adapter_learning import fit_adapter, learn_adapter
from tether.delta.adapter_training import AdapterFit
from tether.delta.budget import Budget
from tether.delta.unfinished import Unfinished
from tether.errors import CheckpointError
from tether.store.documents import write_documents

FIT = AdapterFit(budget=Budget(value=0.05), epochs=2, batch=6, lr=5e-3, probe=500, gate=False)


class StoppedError(Exception):
    """Somebody pulled the plug."""


@pytest.fixture(autouse=True)
def kept_at_every_step(monkeypatch):
    monkeypatch.setattr(unfinished, "SECONDS", 0.0)
    monkeypatch.setattr(unfinished, "SHARE", 1e9)


def fit(model, caches, folder=None, *, stop=None, options=FIT, name="digits", domain="digits"):
    steps = []

    def on_step(entry):
        steps.append(int(entry["step"]))
        if entry["step"] == stop:
            raise StoppedError

    kept = None if folder is None else Unfinished(folder)
    own = [caches[part] for part in (domain, "words", "words-held-out")]
    try:
        made = fit_adapter(model, *own, name, options, on_step, unfinished=kept)
    except StoppedError:
        made = None
    return made, steps


@pytest.fixture(scope="module")
def whole(model, caches):
    return fit(model, caches)


def same(one, other):
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(values, other.tensors[name]) for name, values in one.tensors.items())
    left, right = ({**each.record, "cpu_seconds": 0} for each in (one, other))
    assert left == right


@pytest.mark.parametrize(
    "at", ["the first step", "the first epoch", "its end", "the second epoch", "the last step"]
)
def test_a_fit_that_was_stopped_ends_as_one_that_was_not(model, caches, tmp_path, whole, at):
    made, steps = whole
    half = len(steps) // 2
    stop = {
        "the first step": 1,
        "the first epoch": half - 2,
        "its end": half,
        "the second epoch": half + 2,
    }.get(at, len(steps))
    assert fit(model, caches, tmp_path, stop=stop) == (None, list(range(1, stop + 1)))
    again, left = fit(model, caches, tmp_path)
    assert left == list(range(stop + 1, len(steps) + 1))
    same(again, made)


def test_what_was_done_since_it_was_kept_is_done_again(model, caches, tmp_path, whole, monkeypatch):
    taken = iter([False, False, True])
    monkeypatch.setattr(Unfinished, "is_due", lambda kept: next(taken, False))
    fit(model, caches, tmp_path, stop=5)
    again, left = fit(model, caches, tmp_path, stop=7)
    assert (again, left) == (None, [4, 5, 6, 7])
    again, left = fit(model, caches, tmp_path)
    assert left[0] == 4
    same(again, whole[0])
    assert again.record["cpu_seconds"] > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_a_process_that_was_killed_leaves_what_another_goes_on_from(model, caches, tmp_path, whole):
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)
            parts = [caches[part] for part in ("digits", "words", "words-held-out")]
            fit_adapter(
                model, *parts, "digits", FIT,
                lambda entry: os.kill(os.getpid(), signal.SIGKILL) if entry["step"] == 4 else None,
                unfinished=Unfinished(tmp_path),
            )  # fmt: skip
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    again, left = fit(model, caches, tmp_path)
    assert left[0] == 5
    same(again, whole[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": replace(FIT, rank=4)}, "rank 8, now 4"),
        ({"options": replace(FIT, seed=3, lr=1e-3)}, "lr 0.005, now 0.001; seed 0, now 3"),
        ({"options": replace(FIT, budget=Budget(value=0.1))}, "budget value 0.05, now 0.1"),
        ({"domain": "words-held-out"}, "domain text"),
    ],
)
def test_one_of_other_settings_is_not_used_and_said_so(model, caches, tmp_path, caplog, change, said):
    fit(model, caches, tmp_path, stop=3)
    (before,) = tmp_path.glob("fit-*")
    content = before.read_bytes()
    with caplog.at_level(logging.WARNING):
        _, steps = fit(model, caches, tmp_path, stop=2, **change)
    assert steps == [1, 2]
    assert (
        f"{before}: a fit of digits that was stopped had other settings: {said}; it is not used"
        in caplog.text
    )
    assert before.read_bytes() == content
    assert len(list(tmp_path.glob("fit-*"))) == 2


def test_another_base_is_another_fit(model, caches, tmp_path, caplog):
    from tether.causal.modeling import CausalQwenForCausalLM
    from tether.delta.cache import backbone_print

    fit(model, caches, tmp_path, stop=3)
    other = CausalQwenForCausalLM.from_backbone(tiny.backbone(seed=1))
    theirs = {name: cache._replace(base=backbone_print(other)) for name, cache in caches.items()}
    assert fit(other, theirs, tmp_path, stop=2)[1] == [1, 2]
    assert "had other settings: base; heads; it is not used" in caplog.text


def test_memory_is_no_setting(model, caches, tmp_path, whole):
    fit(model, caches, tmp_path, stop=3)
    again, left = fit(model, caches, tmp_path, options=replace(FIT, gradient_checkpointing=True))
    assert left[0] == 4
    assert all(torch.equal(values, again.tensors[name]) for name, values in whole[0].tensors.items())


@pytest.mark.parametrize("harm", ["cut", "changed", "other numbers"])
def test_a_damaged_file_is_said_and_the_fit_begins_anew(model, caches, tmp_path, caplog, whole, harm):
    fit(model, caches, tmp_path, stop=3)
    (path,) = tmp_path.glob("fit-*")
    content = bytearray(path.read_bytes())
    if harm == "cut":
        del content[-100:]
    elif harm == "changed":
        content[-1] ^= 1
    else:
        at = content.index(b'\\"multiplier\\": ') + 16
        content[at : at + 1] = b"9" if content[at : at + 1] != b"9" else b"8"
    path.write_bytes(content)
    again, steps = fit(model, caches, tmp_path)
    assert steps[0] == 1
    assert "begins anew" in caplog.text
    same(again, whole[0])


def test_a_full_disk_does_not_end_the_fit(model, caches, tmp_path, caplog, whole, monkeypatch):
    def full(*args, **options):
        raise CheckpointError("no room")

    monkeypatch.setattr(unfinished, "write_safetensors", full)
    again, _ = fit(model, caches, tmp_path)
    same(again, whole[0])
    assert "is not kept meanwhile: no room" in caplog.text


def test_a_call_with_a_cache_keeps_its_fit_there_until_it_is_learnt(model, tokenizer, tmp_path):
    texts = {"texts": tiny.documents("digits", 24, 1), "base_texts": tiny.documents("words", 24, 2)}

    def stop(entry):
        if entry.get("step") == 3:
            raise StoppedError

    given = {**texts, "name": "a", "window": 64, "cache_folder": tmp_path, "fit": FIT}
    with pytest.raises(StoppedError):
        learn_adapter(model, tokenizer, on_step=stop, **given)
    assert len(list(tmp_path.glob("fit-*"))) == 1
    seen = []
    made = learn_adapter(model, tokenizer, on_step=lambda entry: seen.append(entry.get("step")), **given)
    assert 3 not in seen
    assert 4 in seen
    assert list(tmp_path.glob("fit-*")) == []
    same(made, learn_adapter(model, tokenizer, **{**given, "cache_folder": None}))


@pytest.mark.parametrize("cache", [(), ("--cache", "cache")])
def test_the_command_says_what_to_type_and_goes_on(tmp_path, monkeypatch, capsys, cache):
    from tether.cli import app
    from tether.delta import adapter_training

    for part in (tiny.backbone(), tiny.tokenizer()):
        part.save_pretrained(tmp_path / "base")
    write_documents(tmp_path / "digits.jsonl", tiny.documents("digits", 30, 1))
    write_documents(tmp_path / "words.jsonl", tiny.documents("words", 30, 2))
    monkeypatch.chdir(tmp_path)
    line = "tether learn base --text digits.jsonl --base-text words.jsonl --window 64 --adapter lora --no-gate --json"
    monkeypatch.setattr("sys.argv", [*line.split(), *cache, "--out", "my laws/law"])
    take, counts = adapter_training.AdapterTraining.domain_loss, []

    def interrupted(loop, batch):
        counts.append(1)
        if len(counts) == 4:
            ASKED.set()
            raise KeyboardInterrupt
        return take(loop, batch)

    monkeypatch.setattr(adapter_training.AdapterTraining, "domain_loss", interrupted)
    monkeypatch.setattr(app, "listen", ASKED.clear)
    with pytest.raises(SystemExit) as left:
        app.main()
    assert left.value.code == 130
    said = capsys.readouterr().err
    assert (
        f"up to step 3; to go on from there, type: {line} {' '.join([*cache, '--out'])} 'my laws/law'" in said
    )
    folder = tmp_path / ("cache" if cache else "my laws/law.unfinished")
    assert len(list(folder.glob("fit-*"))) == 1
    with pytest.raises(SystemExit) as left:
        app.main()
    assert left.value.code == 0
    record = json.loads(capsys.readouterr().out)
    made = Adapter.load(tmp_path / "my laws/law")
    assert made.record["multiplier"] == record["multiplier"]
    total = made.record["tokens"]
    assert total > 0
    assert list(folder.glob("fit-*")) == []
    assert folder.exists() == bool(cache)
    steps = int(made.record["curve"][-1]["steps"])
    assert len(counts) == 4 + steps - 3


def test_how_far_a_fit_is_kept_is_known_without_reading_it(model, caches, tmp_path, monkeypatch):
    kept = Unfinished(tmp_path)
    assert kept.step() == 0

    def stopped(entry):
        if entry["step"] == 3:
            raise StoppedError

    own = [caches[part] for part in ("digits", "words", "words-held-out")]
    with pytest.raises(StoppedError):
        fit_adapter(model, *own, "digits", FIT, stopped, unfinished=kept)
    again = Unfinished(tmp_path)
    state = again.begin("digits", json.loads(kept._about["settings"]))
    assert state is not None
    monkeypatch.setattr(Unfinished, "_read", None)
    assert kept.step() == again.step() == state.step > 0
    kept.remove()
    assert again.step() == 0


def test_passes_over_a_text_are_no_tokens_of_it(model, caches):
    once, twice = (
        fit(model, caches, options=replace(FIT, epochs=epochs))[0].record["tokens"] for epochs in (1, 2)
    )
    assert once == twice > 0
