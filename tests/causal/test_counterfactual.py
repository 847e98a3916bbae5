"""Abduction of what a model wrote, replay without intervention, and action in another context."""

import pytest
import torch

import tiny
from tether.causal.counterfactual import abduct, replay
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.noise import Noise
from tether.errors import ConfigError, ShapeError


@pytest.fixture(scope="module")
def model():
    return CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"), latent_scale=0.1)


def written(model, *, shared, seed=0, new=6):
    context = torch.tensor([[72, 101, 108, 108, 111]])
    return model.generate(
        context,
        attention_mask=torch.ones_like(context),
        mode="causal",
        noise=Noise.draw(1, 32, seed=seed, shared=shared),
        max_new_tokens=new,
        min_new_tokens=new,
        pad_token_id=257,
    ), context


@pytest.mark.parametrize("shared", [False, True])
def test_every_individual_replays_what_was_written(model, shared):
    text, context = written(model, shared=shared)
    generator = torch.Generator().manual_seed(1)
    people = abduct(model, text, context.shape[1], shared=shared, samples=12, generator=generator)
    again = replay(model, people, context, pad_token_id=257)["sequences"]
    assert torch.equal(again, text.expand(12, -1))
    # They are different individuals, not twelve copies.
    noise = people.posterior.noise
    assert noise.shape == (12, 1 if shared else 6, 32)
    assert float(noise.std(0).mean()) > 0.05


def test_the_noise_is_that_of_the_steps_whatever_the_length_of_the_context(model):
    text, context = written(model, shared=False)
    people = abduct(model, text, context.shape[1], samples=3)
    for length in (1, 5, 9):
        noise = people.noise(length)
        positions = torch.arange(length - 1, length + 5).expand(3, -1)
        assert torch.equal(noise.at(positions), people.posterior.noise)


def test_an_intervention_changes_the_text_of_some_and_is_the_manual_forward(model):
    text, context = written(model, shared=False)
    people = abduct(model, text, context.shape[1], samples=8)
    other = torch.tensor([[90, 40, 33]])
    what_if = replay(model, people, other, pad_token_id=257)["sequences"][:, 3:]
    assert not torch.equal(what_if, text[:, context.shape[1] :].expand(8, -1))
    with torch.no_grad():
        output = model(input_ids=other.expand(8, -1))
        t = torch.tan(torch.pi * (people.posterior.noise[:, 0] - 0.5))
        u = output.latent_loc[:, -1] + output.latent_log_scale[:, -1].exp() * t
        first = (u.float() @ model.action.weight.T).argmax(-1)
    assert torch.equal(what_if[:, 0], first)


def test_written_numbers_are_replayed_with_their_values():
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"), latent_scale=0.1)
    numeric = model.add_numbers(tiny.tokenizer())
    number = numeric.num_token_id
    with torch.no_grad():
        model.action.bias[number] = 6.0
        model.action.value_weight.mul_(5)
    context = numeric("from 3 to ", return_tensors="pt")
    text = model.generate(
        **context,
        mode="causal",
        noise=Noise.draw(1, 32, seed=3),
        max_new_tokens=8,
        pad_token_id=257,
        return_dict_in_generate=True,
    )
    length = context["input_ids"].shape[1]
    assert bool((text["sequences"][0, length:] == number).any())
    people = abduct(
        model, text["sequences"], length, numeric_values=text["numeric_values"], samples=6, burn_in=10
    )
    again = replay(
        model, people, context["input_ids"], numeric_values=context["numeric_values"], pad_token_id=257
    )
    assert torch.equal(again["sequences"], text["sequences"].expand(6, -1))
    torch.testing.assert_close(
        again["numeric_values"], text["numeric_values"].expand(6, -1), rtol=1e-4, atol=1e-5
    )


def test_bad_requests(model):
    text = torch.tensor([[1, 2, 3]])
    with pytest.raises(ConfigError, match="at least one token of context"):
        abduct(model, text, 3)
    with pytest.raises(ShapeError, match="one text"):
        abduct(model, text.expand(2, -1), 1)
    with pytest.raises(ConfigError, match="samples=0"):
        model.abduct(text, 1, samples=0)
