import pytest
import torch
from scipy.stats import chisquare
from torch.testing import assert_close

import tiny
from merge import lape
from tether.errors import CheckpointError, ConfigError
from tether.merge.packing import pack_bank, pack_sample, spread
from tether.merge.paths import load_bank, nucleus_sample, sample_paths, save_bank
from tether.merge.probes import EncodedProbe


@pytest.fixture(scope="module")
def model():
    return tiny.backbone("llama")


@pytest.fixture(scope="module")
def bank(model):
    return lape.bank(model)


def alone(model, bank, sample, path):
    """Logits of the generated tokens of one path by a plain pass over the whole text."""
    length = int(bank.lengths[sample, path])
    prompt = bank.probes[sample].input_ids
    whole = torch.cat([prompt, bank.tokens[sample, path, :length]]).unsqueeze(0)
    with torch.no_grad():
        return model(input_ids=whole).logits[0, len(prompt) - 1 : -1], bank.tokens[sample, path, :length]


def test_recorded_log_probabilities_are_those_of_a_plain_pass(model, bank):
    for sample in range(3):
        for path in range(4):
            logits, tokens = alone(model, bank, sample, path)
            expected = torch.log_softmax(logits, -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
            assert_close(bank.log_prob[sample, path, : len(tokens)], expected, rtol=1e-4, atol=1e-4)
            assert not bool(bank.log_prob[sample, path, len(tokens) :].any())


def test_paths_do_not_depend_on_the_batch(model, bank):
    again = lape.bank(model, batch_size=1)
    assert torch.equal(bank.tokens, again.tokens)
    assert torch.equal(bank.lengths, again.lengths)
    other = lape.bank(model, seed=1)
    assert not torch.equal(bank.tokens, other.tokens)


def test_lengths_are_uniform_unless_the_model_stops(model):
    long = sample_paths(model, lape.probes(4), paths=100, shortest=2, longest=6, batch_size=4)
    ended = torch.zeros(4, 100, dtype=torch.bool)
    for stop in range(4):
        ended[stop] = (long.tokens[stop] == 256).any(-1)
    assert not bool(
        (ended & (long.tokens.gather(-1, long.lengths.unsqueeze(-1) - 1).squeeze(-1) != 256)).any()
    )
    counts = torch.bincount(long.lengths[~ended], minlength=7)[2:]
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_nucleus_draws_follow_the_truncated_law():
    law = torch.tensor([0.05, 0.5, 0.1, 0.3, 0.05])
    noise = (torch.arange(2000) + 0.5) / 2000
    drawn = nucleus_sample(law.log().expand(2000, 5), noise, 0.85)
    share = torch.bincount(drawn, minlength=5) / 2000
    assert_close(share, torch.tensor([0.0, 0.5, 0.1, 0.3, 0.0]) / 0.9, atol=1e-3, rtol=0)
    assert nucleus_sample(law.log().expand(3, 5), torch.tensor([0.0, 0.5, 0.999]), 0.01).tolist() == [1, 1, 1]


def test_a_flat_law_needs_more_than_the_first_candidates():
    law = torch.full((2, 4000), -torch.log(torch.tensor(4000.0)).item())
    drawn = nucleus_sample(law, torch.tensor([0.01, 0.99]), 1.0)
    assert int(drawn[1]) > 2000


def test_packed_logits_are_those_of_each_path_alone(model, bank):
    for pack in pack_bank(bank, model):
        with torch.no_grad():
            packed = model(**pack.inputs, use_cache=False).logits[0]
        for path in range(4):
            logits, tokens = alone(model, bank, pack.sample, path)
            mine = (pack.path == path).nonzero().squeeze(-1)
            assert_close(packed[mine], logits, rtol=1e-4, atol=1e-4)
            assert torch.equal(pack.targets[mine], tokens)


def test_spread_puts_values_on_positions(model, bank):
    pack = pack_sample(bank, 1, model)
    values = torch.arange(36.0).reshape(4, 9)
    found = spread(pack, values)
    assert not bool(found[pack.path < 0].any())
    time = torch.arange(9) < bank.lengths[1].unsqueeze(-1)
    assert_close(found[pack.path >= 0], values[time])


def test_images_are_read_once_and_reach_the_paths():
    model = lape.llava()
    mixed = [lape.image_probe(0), EncodedProbe(torch.tensor([3, 9, 8]), {}), lape.image_probe(1)]
    bank = sample_paths(model, mixed, paths=3, shortest=4, longest=4)
    other = sample_paths(model, [lape.image_probe(2), *mixed[1:]], paths=3, shortest=4, longest=4)
    assert not torch.equal(bank.tokens[0], other.tokens[0])
    assert torch.equal(bank.tokens[1:], other.tokens[1:])
    pack = pack_sample(bank, 0, model)
    with torch.no_grad():
        packed = model(**pack.inputs, use_cache=False, logits_to_keep=pack.blocks).logits[0]
        for path in range(3):
            whole = torch.cat([mixed[0].input_ids, bank.tokens[0, path]])
            plain = model(input_ids=whole[None], pixel_values=mixed[0].extras["pixel_values"]).logits[0, 6:-1]
            mine = pack.path[pack.blocks] == path
            length = int(mine.sum())
            assert_close(packed[mine], plain[:length], rtol=1e-4, atol=1e-4)


def test_a_model_that_would_write_image_tokens_does_not_get_to():
    model = lape.llava()
    with torch.no_grad():
        # Whatever the last norm gives, the image token is the likeliest, with more than the nucleus.
        model.model.language_model.norm.weight.zero_()
        model.lm_head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
        model.lm_head.bias.zero_()[lape.IMAGE_TOKEN] = 20.0
    bank = sample_paths(model, [lape.image_probe(), *lape.probes(1)], paths=3, shortest=4, longest=4)
    assert lape.IMAGE_TOKEN not in bank.tokens
    assert len(bank.tokens.unique()) > 4
    # What is recorded is the model's own law, image token and all.
    expected = torch.log_softmax(model.lm_head.bias, 0)[bank.tokens]
    assert_close(bank.log_prob, expected)
    assert len(list(pack_bank(bank, model))) == 2


def test_a_bank_is_read_as_it_was_written(tmp_path):
    model = lape.llava()
    bank = sample_paths(model, [lape.image_probe(), *lape.probes(2)], paths=2, shortest=2, longest=3)
    save_bank(tmp_path / "bank.safetensors", bank)
    again = load_bank(tmp_path / "bank.safetensors")
    for mine, theirs in zip(bank[1:], again[1:], strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(bank.probes, again.probes, strict=True):
        assert torch.equal(mine.input_ids, theirs.input_ids)
        assert mine.extras.keys() == theirs.extras.keys()
    with pytest.raises(CheckpointError, match="sample the paths again"):
        load_bank(tmp_path / "none.safetensors")


def test_bad_requests(model):
    with pytest.raises(ConfigError, match="no probes"):
        sample_paths(model, [])
    with pytest.raises(ConfigError, match="1 <= shortest <= longest"):
        sample_paths(model, lape.probes(), shortest=5, longest=4)
    with pytest.raises(ConfigError, match="top_p <= 1"):
        sample_paths(model, lape.probes(), top_p=1.5)


def test_image_probes_are_refused_where_positions_have_three_axes():
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    sizes = {key: value for key, value in tiny.SIZES.items() if key != "vocab_size"}
    config = Qwen2VLConfig(
        text_config={
            **sizes, "vocab_size": 258, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config).eval()
    with pytest.raises(ConfigError, match="give text probes for this model"):
        sample_paths(model, [lape.image_probe()])
    bank = sample_paths(model, lape.probes(1), paths=2, shortest=2, longest=3)
    logits, tokens = alone(model, bank, 0, 0)
    expected = torch.log_softmax(logits, -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert_close(bank.log_prob[0, 0, : len(tokens)], expected, rtol=1e-4, atol=1e-4)
