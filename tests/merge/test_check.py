"""What a merged model is measured by, against plain torch."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

import tiny
from tether.delta.windows import window_text
from tether.errors import CheckpointError, ConfigError
from tether.merge.check import compare, load_checkpoint, sample_paths


@pytest.fixture(scope="module")
def pair():
    one, two = tiny.backbone("llama", seed=0), tiny.backbone("llama", seed=0)
    with torch.no_grad():
        for parameter in two.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return one, two


@pytest.mark.parametrize("chunk", [1 << 24, 700])
def test_figures_are_those_of_one_window_at_a_time(pair, monkeypatch, chunk):
    monkeypatch.setattr("tether.merge.check._CHUNK", chunk)
    one, two = pair
    documents = tiny.documents("words", 7)
    windows = window_text(documents, tiny.tokenizer(), length=40)
    seen = []
    found = compare(one, two, windows, batch_size=3, on_step=lambda entry: seen.append(entry["done"]))
    assert seen[-1] == len(windows.input_ids)
    kl, nll = [], [[], []]
    for start, stop in zip(windows.starts[:-1].tolist(), windows.starts[1:].tolist(), strict=True):
        ids = windows.input_ids[start:stop]
        with torch.no_grad():
            logits = [model(input_ids=ids[None]).logits[0].double() for model in pair]
        laws = [each.log_softmax(-1) for each in logits]
        kl.append(kl_div(laws[1], laws[0], reduction="none", log_target=True).sum(-1))
        for each, values in zip(nll, logits, strict=True):
            each.append(cross_entropy(values[:-1], ids[1:], reduction="none"))
    torch.testing.assert_close(found.kl.double(), torch.cat(kl), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.nll_reference.double(), torch.cat(nll[0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.nll_merged.double(), torch.cat(nll[1]), rtol=1e-5, atol=1e-5)
    summary = found.summary()
    assert summary["kl"]["mean"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert summary["kl"]["max"] == pytest.approx(float(torch.cat(kl).max()), rel=1e-4)
    assert summary["kl"]["p99"] == pytest.approx(float(np.quantile(torch.cat(kl).numpy(), 0.99)), rel=1e-4)
    assert 0 < summary["kl"]["standard_error"] < summary["kl"]["mean"]


def test_paths_are_sampled_from_the_model_itself(pair):
    prompts = torch.randint(0, 256, (3, 5), generator=torch.Generator().manual_seed(0))
    found = sample_paths(pair[0], prompts, 6, torch.Generator().manual_seed(9))
    # The same without a cache.
    ids, generator = prompts, torch.Generator().manual_seed(9)
    for _ in range(6):
        with torch.no_grad():
            law = pair[0](input_ids=ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(law, 1, generator=generator)], 1)
    assert torch.equal(found.input_ids.reshape(3, 11), ids)
    assert found.starts.tolist() == [0, 11, 22, 33]
    assert (found.targets.reshape(3, 11)[:, -1] == -100).all()
    assert torch.equal(found.targets.reshape(3, 11)[:, :-1], ids[:, 1:])


def test_sampled_figures_leave_the_prompt_out(pair):
    from tether.merge.check import _sampled

    sampled = sample_paths(pair[0], torch.zeros(2, 4, dtype=torch.int64), 3, torch.Generator().manual_seed(0))
    whole = compare(*pair, sampled)
    found = _sampled(whole, sampled, 4, 7)
    assert torch.equal(found.kl, whole.kl.reshape(2, 7)[:, 3:6].reshape(-1))
    assert torch.equal(found.nll_merged, whole.nll_merged.reshape(2, 6)[:, 3:6].reshape(-1))


def test_other_vocabularies_are_refused(pair):
    from transformers import AutoModelForCausalLM, LlamaConfig

    other = AutoModelForCausalLM.from_config(LlamaConfig(**{**tiny.SIZES, "vocab_size": 300})).eval()
    windows = window_text(tiny.documents("words", 1), tiny.tokenizer(), length=40)
    with pytest.raises(ConfigError, match="258 and 300 logits"):
        compare(pair[0], other, windows)


def test_what_transformers_cannot_load(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        load_checkpoint(tmp_path)
