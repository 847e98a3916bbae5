"""Acting in three modes: the formulas, and the same individual whatever the batch, the padding and the cache."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

import tiny
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.noise import Noise
from tether.causal.numbers import NumericTokenizer
from tether.causal.streaming import NumericStreamer
from tether.causal.trail import Trail
from tether.causal.transforms import signed_log
from tether.errors import ConfigError, ShapeError

TEXTS = ["the model", "a", "state 12 of the token 3.5e3 gate", "7"]
NUM = 258


def writer(kind="qwen2", preset="calibrated", **fields):
    """A model that reads numbers, writes one now and then, and has values of some size."""
    fields = {"latent_scale": 0.1} | fields
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone(kind), preset, **fields)
    model.add_numbers(tiny.tokenizer())
    with torch.no_grad():
        model.action.bias[NUM] = 4.5
        model.action.value_weight.mul_(4)
    return model


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request):
    return writer(request.param)


@pytest.fixture(scope="module")
def tokenizer():
    return NumericTokenizer(tiny.tokenizer(), rows=259)


@pytest.fixture
def encoded(tokenizer):
    return tokenizer(TEXTS, padding=True, return_tensors="pt")


@torch.no_grad()
def by_hand(model, ids, values, mode, noise=None, position=None):
    """Scores of the next token and its value, from the backbone's state on, in float64; one text, no cache."""
    action = model.action
    size = values.sign() * torch.log1p(values.abs())
    embeds = model.get_input_embeddings()(ids) + size.float()[..., None] * model.numeric.direction
    z = model.backbone(inputs_embeds=embeds).last_hidden_state[:, -1].double()
    weight, value_weight = action.weight.double(), action.value_weight[0].double()
    bias = action.bias.double() if action.bias is not None else 0.0
    scale = torch.full_like(z, model.config.latent_scale)
    if mode == "causal":
        drawn = noise.at(torch.tensor([[position]]))[:, 0].double()
        u = z + scale * torch.tan(math.pi * (drawn - 0.5))
    else:
        u = z
    scores = u @ weight.T + bias
    if mode == "deterministic":
        level = {
            "constant": lambda: action.threshold.double(),
            "class": lambda: action.threshold.double(),
            "context": lambda: action.threshold.double() + scores.logsumexp(-1, keepdim=True),
        }[action.threshold_form]()
        spread = scale @ weight.abs().T + action.class_noise.double()
        scores = (torch.atan2(spread, level - scores) / math.pi).log()
    y = u @ value_weight + action.value_bias.double()
    if action.value_transform == "signed-log":
        y = y.sign() * torch.expm1(y.abs().clamp(max=100))
    return scores, y.clamp(-1e30, 1e30)


def write(model, encoded, noise=None, mode="causal", count=16, **options):
    return model.generate(
        **encoded,
        mode=mode,
        noise=noise,
        max_new_tokens=count,
        pad_token_id=257,
        eos_token_id=options.pop("eos_token_id", None),
        return_dict_in_generate=True,
        **options,
    )


def written(output, count=16):
    return output["sequences"][:, -count:], output["numeric_values"][:, -count:]


def assert_same(first, second):
    for (ids, values), (other_ids, other_values) in zip(first, second, strict=True):
        assert torch.equal(ids, other_ids)
        # A random model multiplies the rounding of the numbers that it reads again.
        assert_close(signed_log(values), signed_log(other_values), rtol=0, atol=2e-3)


# Formulas


@pytest.mark.parametrize("transform", ["raw", "signed-log"])
def test_causal_logits_are_the_scores_of_the_individual(transform, generator):
    model = writer(latent_scale=0.3, value_transform=transform)
    ids = torch.randint(256, (2, 5), generator=generator)
    noise = Noise.draw(2, 32, seed=4)
    with torch.no_grad():
        output = model(input_ids=ids, mode="causal", noise=noise)
    for row in range(2):
        for t in range(5):
            scores, value = by_hand(
                model, ids[row : row + 1, : t + 1], torch.zeros(1, t + 1), "causal", noise.rows([row]), t
            )
            rest = {"rtol": 2e-4, "atol": 2e-4 * float(scores[:, :NUM].abs().max())}
            assert_close(output.logits[row, t].double(), scores[0], **rest)
            assert_close(output.value[row, t], value[0], rtol=1e-3, atol=1e-3)
            spread = torch.tan(math.pi * (noise.at(torch.full((2, 1), t))[row, 0].double() - 0.5))
            assert_close(
                output.latent[row, t].double(), output.latent_loc[row, t] + 0.3 * spread, rtol=1e-5, atol=1e-6
            )


FORMS = {
    "constant": {
        "threshold_form": "constant",
        "threshold": 1.5,
        "noise_form": "constant",
        "class_noise": 0.7,
    },
    "class": {"threshold_form": "class", "threshold": 0.5, "noise_form": "constant", "class_noise": 0.2},
    "context": {"threshold_form": "context", "threshold": -2.0, "noise_form": "constant", "class_noise": 0.2},
    "fill": {"threshold_form": "context", "threshold": 30.0, "noise_form": "fill", "class_noise": 40.0},
}


@pytest.mark.parametrize("form", FORMS)
def test_deterministic_logits_are_the_tails_and_never_stale(form, generator):
    model = writer(**FORMS[form])
    ids = torch.randint(256, (1, 4), generator=generator)

    def check():
        with torch.no_grad():
            output = model(input_ids=ids, mode="deterministic")
        scores, value = by_hand(model, ids, torch.zeros(1, 4), "deterministic")
        assert_close(output.logits[:, -1].double(), scores, rtol=1e-4, atol=1e-4)
        assert_close(output.value[:, -1], value, rtol=1e-4, atol=1e-4)

    with torch.no_grad():
        if form == "class":
            model.action.threshold += torch.randn(259, generator=generator)
        check()
        kept = model.action._steady
        check()
        assert model.action._steady is kept
        model.action.weight *= 1.5
        check()
        model.abduction.log_scale.bias += 1.0
        model.config.latent_scale *= math.e
        check()
        model.action.class_noise += 0.25
        check()
        model.action.weight = torch.nn.Parameter(model.action.weight * 0.5)
        check()
        # Another weight at the address of the one before, as memory that was freed gives it.
        memory = model.action.weight.detach().clone()
        model.action.weight = torch.nn.Parameter(memory)
        check()
        memory.numpy()[:] *= 1.25
        model.action.weight = torch.nn.Parameter(memory)
        check()
        copied = copy.deepcopy(model)
        copied.action.weight *= 2.0
        check()
        model = copied
        check()
    with torch.inference_mode():
        model.action.weight = torch.nn.Parameter(model.action.weight * 0.5)
        check()
        model.action.weight *= 3.0
        check()


def test_scales_that_differ_between_positions_are_not_taken_for_one(generator):
    model = writer(**FORMS["constant"])
    with torch.no_grad():
        model.abduction.log_scale.weight.normal_(std=0.1, generator=generator)
        loc, log_scale = model.abduction(torch.randn(3, 32, generator=generator))
        got = model.action.log_prob(loc, log_scale.exp())
        each = [model.action.log_prob(loc[i : i + 1], log_scale[i : i + 1].exp()) for i in range(3)]
        assert_close(got, torch.cat(each))
        assert model.action.log_prob(loc[:0], log_scale[:0].exp()).shape == (0, 259)


def test_the_gradient_reaches_the_scale_while_a_constant_is_kept(generator):
    model = writer(**FORMS["constant"])
    ids = torch.randint(256, (1, 4), generator=generator)
    with torch.no_grad():
        model(input_ids=ids, mode="deterministic")
    model(input_ids=ids, mode="deterministic").logits.logsumexp(-1).sum().backward()
    for parameter in (model.abduction.log_scale.bias, model.action.weight, model.action.class_noise):
        assert parameter.grad is not None
        assert float(parameter.grad.abs().sum()) > 0


@pytest.mark.parametrize("mode", ["softmax", "deterministic", "causal"])
def test_a_small_mlp_changes_nothing_at_the_start(mode, generator):
    ids = torch.randint(256, (2, 6), generator=generator)
    noise = Noise.draw(2, 32, seed=1) if mode == "causal" else None
    outputs = []
    for size in (0, 8):
        model = CausalQwenForCausalLM.from_backbone(tiny.backbone(), abduction_size=size)
        with torch.no_grad():
            outputs.append(model(input_ids=ids, mode=mode, noise=noise))
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].value, outputs[1].value)
    model(input_ids=ids, labels=ids, mode="deterministic").loss.backward()
    assert float(model.abduction.mlp[2].weight.grad.abs().sum()) > 0


# The same individual


def test_numbers_feed_the_next_step(model, tokenizer, monkeypatch):
    for mode in ("softmax", "deterministic", "causal"):
        noise = Noise.draw(1, 32, seed=3) if mode == "causal" else None
        prompt = tokenizer("rate 12.5 of", return_tensors="pt")
        ids, values = prompt["input_ids"], prompt["numeric_values"]
        for _ in range(16):
            scores, value = by_hand(model, ids, values, mode, noise, ids.shape[1] - 1)
            chosen = scores.argmax(-1, keepdim=True)
            ids = torch.cat([ids, chosen], dim=1)
            values = torch.cat([values, torch.where(chosen == NUM, value[:, None], 0.0)], dim=1)
        output = write(model, prompt, noise, mode)
        assert torch.equal(output["sequences"], ids)
        assert_close(signed_log(output["numeric_values"]), signed_log(values), rtol=0, atol=5e-3)
        numbers = ids[0, prompt["input_ids"].shape[1] :] == NUM
        assert int(numbers.sum()) >= 1, f"{mode}: the test needs a number that was written"
        with monkeypatch.context() as patched:
            # Were they not fed back, another text would come out.
            patched.setattr(
                Trail, "expect", lambda trail, value: setattr(trail, "pending", 0.0 * value.double())
            )
            assert not torch.equal(write(model, prompt, noise, mode)["sequences"], ids)


@pytest.mark.parametrize("shared", [False, True])
def test_the_same_individual_acts_the_same_everywhere(model, tokenizer, encoded, shared, tmp_path):
    noise = Noise.draw(4, 32, seed=21, shared=shared)
    alone = [
        written(write(model, tokenizer(text, return_tensors="pt"), noise.rows([row])))
        for row, text in enumerate(TEXTS)
    ]
    assert any(bool((ids == NUM).any()) for ids, _ in alone)
    assert len({tuple(ids[0].tolist()) for ids, _ in alone}) == 4
    left = write(model, encoded, noise)
    assert_same(alone, [tuple(part[row : row + 1] for part in written(left)) for row in range(4)])

    tokenizer.padding_side = "right"
    right = tokenizer(TEXTS, padding=True, return_tensors="pt")
    tokenizer.padding_side = "left"
    assert not torch.equal(right["input_ids"], encoded["input_ids"])
    moved = write(model, right, noise)
    assert torch.equal(moved["sequences"], left["sequences"])
    assert torch.equal(moved["numeric_values"], left["numeric_values"])

    order = [3, 0, 1, 2, 2, 1, 0, 3]
    eight = {name: tensor[order] for name, tensor in encoded.items()}
    together = written(write(model, eight, noise.rows(order)))
    assert_same(
        [alone[row] for row in order], [tuple(part[i : i + 1] for part in together) for i in range(8)]
    )

    assert_same([written(left)], [written(write(model, encoded, noise, use_cache=False))])

    model.save_pretrained(tmp_path)
    noise.save(tmp_path / "noise")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same([written(left)], [written(write(again, encoded, Noise.load(tmp_path / "noise")))])


def test_given_noise_replays_what_drawn_noise_wrote(model, encoded):
    noise = Noise.draw(4, 32, seed=2)
    longest = encoded["input_ids"].shape[1] + 16
    given = noise.at(torch.arange(longest).expand(4, -1))
    assert_same(
        [written(write(model, encoded, noise))], [written(write(model, encoded, Noise.of(given.double())))]
    )
    shared = Noise.draw(4, 32, seed=2, shared=True)
    tensor = shared.at(torch.zeros(4, 1, dtype=torch.long))[:, 0]
    assert_same([written(write(model, encoded, shared))], [written(write(model, encoded, tensor))])
    one = written(write(model, encoded, tensor[0]))
    assert_same([one], [written(write(model, encoded, tensor[:1].expand(4, -1)))])


def test_forward_addresses_noise_by_position_with_padding_and_cache(model, encoded):
    noise = Noise.draw(4, 32, seed=9)
    with torch.no_grad():
        whole = model(**encoded, mode="causal", noise=noise)
        for row in range(4):
            kept = encoded["attention_mask"][row].bool()
            alone = model(
                input_ids=encoded["input_ids"][row : row + 1, kept],
                numeric_values=encoded["numeric_values"][row : row + 1, kept],
                mode="causal",
                noise=noise.rows([row]),
            )
            assert_close(whole.logits[row, kept], alone.logits[0], rtol=1e-4, atol=1e-2)
        ids = encoded["input_ids"][2:3]
        first = model(input_ids=ids[:, :9], mode="causal", noise=noise.rows([2]), use_cache=True)
        rest = model(
            input_ids=ids[:, 9:], past_key_values=first.past_key_values, mode="causal", noise=noise.rows([2])
        )
        once = model(input_ids=ids, mode="causal", noise=noise.rows([2]))
        last = model(input_ids=ids, mode="causal", noise=noise.rows([2]), logits_to_keep=2)
    assert_close(torch.cat([first.logits, rest.logits], 1), once.logits, rtol=1e-4, atol=1e-2)
    assert_close(last.logits, once.logits[:, -2:], rtol=1e-5, atol=1e-3)


# The stock loop


def test_several_individuals_go_on_from_each_prompt(model, encoded):
    noise = Noise.draw(8, 32, seed=5)
    several = written(write(model, encoded, noise, num_return_sequences=2))
    for row in range(4):
        for each in range(2):
            alone = {name: tensor[row : row + 1] for name, tensor in encoded.items()}
            one = written(write(model, alone, noise.rows([2 * row + each])))
            assert_same([one], [tuple(part[2 * row + each : 2 * row + each + 1] for part in several)])
    assert not torch.equal(several[0][0], several[0][1])
    sampled = write(model, encoded, mode="softmax", do_sample=True, num_return_sequences=3)
    assert sampled["numeric_values"].shape == sampled["sequences"].shape
    assert len(sampled["sequences"]) == 12
    prompt = encoded["numeric_values"].repeat_interleave(3, dim=0)
    assert torch.equal(sampled["numeric_values"][:, : prompt.shape[1]], prompt)


def test_truncation_brings_causal_text_to_the_median(model, encoded):
    noise = Noise.draw(4, 32, seed=6)
    greedy = written(write(model, encoded, mode="softmax"))
    assert_same([greedy], [written(write(model, encoded, noise, truncation=1.0))])
    free = write(model, encoded, noise)["sequences"]
    assert not torch.equal(free, write(model, encoded, noise, truncation=0.9)["sequences"])
    assert torch.equal(free, write(model, encoded, noise, truncation=0.0)["sequences"])


def test_streaming_prints_numbers(model, tokenizer, capsys):
    prompt = tokenizer("rate 12.50 of 3", return_tensors="pt")
    noise = Noise.draw(1, 32, seed=3)
    output = write(model, prompt, noise)
    ids, values = output["sequences"][0], output["numeric_values"][0]
    assert int((ids[prompt["input_ids"].shape[1] :] == NUM).sum()) >= 1
    streamer = NumericStreamer(tokenizer)
    streamer.prompt_surfaces = prompt.surfaces[0]
    write(model, prompt, noise, streamer=streamer)
    printed = capsys.readouterr().out
    assert printed == tokenizer.decode(ids, values, surfaces=prompt.surfaces[0]) + "\n"
    assert printed.startswith("rate 12.50 of 3")
    write(model, prompt, noise, streamer=NumericStreamer(tokenizer, skip_prompt=True))
    start = prompt["input_ids"].shape[1]
    assert capsys.readouterr().out == tokenizer.decode(ids[start:], values[start:]) + "\n"


def test_generation_stops_at_the_end_of_text(model, encoded):
    noise = Noise.draw(4, 32, seed=21)
    free = write(model, encoded, noise)
    start = encoded["input_ids"].shape[1]
    end = int(free["sequences"][0, start + 3])
    stopped = write(model, encoded, noise, eos_token_id=end)
    for row in range(4):
        ids, text = stopped["sequences"][row, start:], free["sequences"][row, start:].tolist()
        length = text.index(end) + 1 if end in text else 16
        assert ids[:length].tolist() == text[:length]
        assert bool((ids[length:] == 257).all())
        assert not bool(stopped["numeric_values"][row, start + length :].any())


def test_prompts_may_come_embedded_or_not_at_all(model, tokenizer):
    noise = Noise.draw(1, 32, seed=3)
    prompt = tokenizer("rate", return_tensors="pt")
    embeds = model.get_input_embeddings()(prompt["input_ids"])
    from_ids = written(write(model, prompt, noise))
    from_embeds = write(model, {"inputs_embeds": embeds}, noise)
    assert_same([from_ids], [(from_embeds["sequences"], from_embeds["numeric_values"])])
    start = {"input_ids": torch.tensor([[256]])}
    nothing = write(model, {"bos_token_id": 256}, noise)
    assert_same([written(write(model, start, noise))], [written(nothing)])


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 5},
        {"do_sample": True, "top_k": 0, "top_p": 0.8, "temperature": 1.3},
        {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
        {"repetition_penalty": 1.4},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_stock_options_do_what_they_do_to_the_base(options, generator):
    ids = torch.randint(256, (2, 7), generator=generator)
    base = tiny.backbone("qwen2")
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"))
    texts = []
    for each in (base, model):
        torch.random.manual_seed(3)
        texts.append(each.generate(ids, max_new_tokens=8, pad_token_id=257, **options))
    assert torch.equal(*texts)


def test_sampling_can_draw_every_token(generator):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"))
    ids = torch.randint(256, (1, 3), generator=generator)
    options = {"max_new_tokens": 1, "num_return_sequences": 400, "pad_token_id": 257, "temperature": 50.0}
    drawn = model.generate(ids, do_sample=True, **options)[:, -1]
    assert len(drawn.unique()) > 150
    configured = GenerationConfig(do_sample=True, **options)
    assert len(model.generate(ids, configured)[:, -1].unique()) > 150
    assert len(model.generate(ids, do_sample=True, top_k=7, **options)[:, -1].unique()) <= 7
    configured = GenerationConfig(do_sample=True, top_k=7, **options)
    assert len(model.generate(ids, generation_config=configured)[:, -1].unique()) <= 7
    model.generation_config.top_k = 7
    assert len(model.generate(ids, do_sample=True, **options)[:, -1].unique()) <= 7


def test_beams_search_among_texts_without_numbers(encoded):
    model = writer()
    output = write(
        model, encoded, mode="deterministic", num_beams=2, num_return_sequences=2, suppress_tokens=[NUM]
    )
    assert output["sequences"].shape == output["numeric_values"].shape
    assert len(output["sequences"]) == 8
    start = encoded["input_ids"].shape[1]
    assert torch.equal(
        output["numeric_values"][:, :start], encoded["numeric_values"].repeat_interleave(2, dim=0)
    )
    assert not bool(output["numeric_values"][:, start:].any())
    assert not bool((output["sequences"][:, start:] == NUM).any())


def test_a_stock_client_writes_the_bases_text(tmp_path):
    base = tiny.backbone()
    CausalQwenForCausalLM.from_backbone(tiny.backbone()).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    client = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert type(client.model) is CausalQwenForCausalLM
    prompt = "the model 12.5"
    options = {"max_new_tokens": 9, "do_sample": False}
    text = client(prompt, **options)[0]["generated_text"]
    tokenizer = tiny.tokenizer()
    encoded = tokenizer(prompt, return_tensors="pt")
    expected = base.generate(encoded["input_ids"], attention_mask=encoded["attention_mask"], **options)
    assert text == tokenizer.decode(expected[0], skip_special_tokens=True)


BAD = {
    "mode": ({"mode": "argmax"}, ConfigError, "softmax, deterministic, causal"),
    "noise in another mode": (
        {"mode": "softmax", "noise": Noise.draw(4, 32, seed=1)},
        ConfigError,
        "mode 'causal'",
    ),
    "truncation in another mode": (
        {"mode": "deterministic", "truncation": 0.1},
        ConfigError,
        "mode 'causal'",
    ),
    "negative truncation": ({"truncation": -0.5}, ConfigError, "truncation=-0.5"),
    "truncation above 1": ({"truncation": 2.0}, ConfigError, "truncation=2.0"),
    "noise of others": ({"noise": Noise.draw(3, 32, seed=1)}, ShapeError, "3 individuals.*expected 4"),
    "noise of another size": ({"noise": Noise.draw(4, 31, seed=1)}, ShapeError, "31 dimensions.*4 with 32"),
    "noise for too few": (
        {"noise": Noise.draw(4, 32, seed=1), "num_return_sequences": 2},
        ShapeError,
        "expected 8",
    ),
    "noise of two for four": ({"noise": torch.full((2, 32), 0.5)}, ShapeError, "2 individuals"),
    "noise as a list": ({"noise": [0.5] * 32}, ShapeError, "list"),
    "noise at the end": ({"noise": torch.ones(32)}, ConfigError, "open interval"),
    "beams": ({"num_beams": 2}, ConfigError, "num_beams=1"),
    "beams with numbers": ({"mode": "softmax", "num_beams": 2}, ConfigError, r"suppress_tokens=\[258\]"),
    "values of another shape": ({"numeric_values": torch.zeros(4, 2)}, ShapeError, "numeric_values"),
    "whole values": ({"numeric_values": torch.zeros(4, 39, dtype=torch.long)}, ShapeError, "float"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused(case):
    options, kind, message = BAD[case]
    model, ids = writer(), torch.full((4, 39), 7)
    options = {"mode": "causal"} | options
    with pytest.raises(kind, match=message):
        model.generate(ids, max_new_tokens=2, pad_token_id=257, **options)
    if not {"num_beams", "num_return_sequences"} & options.keys():
        with pytest.raises(kind, match=message):
            model(input_ids=ids, **options)


def test_numbers_are_refused_where_there_are_none():
    model = writer()
    plain = CausalQwenForCausalLM.from_backbone(tiny.backbone())
    ids, values = torch.full((1, 3), 7), torch.tensor([[0.0, 2.5, 0.0]])
    for each, message in ((model, "the token there is 7 and not <NUM>"), (plain, "a model without <NUM>")):
        with pytest.raises(ConfigError, match=message):
            each.generate(ids, numeric_values=values, max_new_tokens=2)
        with pytest.raises(ConfigError, match=message):
            each(input_ids=ids, numeric_values=values)
    for wrong in (torch.inf, torch.nan, 2e30):
        with pytest.raises(ConfigError, match="finite number"):
            model.generate(
                torch.full((1, 3), NUM), numeric_values=torch.full((1, 3), wrong), max_new_tokens=2
            )
    with pytest.raises(ConfigError, match="without an assistant"):
        model.generate(torch.full((1, 9), 7), prompt_lookup_num_tokens=3, max_new_tokens=12, pad_token_id=257)
