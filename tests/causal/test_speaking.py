"""Fusion by evidence in mode causal: who speaks, abduction of speakers and noise, replay, what if."""

import pytest
import torch
from torch.testing import assert_close

import tiny
from tether.causal.counterfactual import Abducted, abduct, replay
from tether.causal.evidence import Rule
from tether.causal.fingerprint import renew_fingerprint
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.noise import Noise
from tether.causal.posterior import Posterior
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.gate import Gate

H = 32
RULE = Rule(prior=0.4, restarts=(0.02, 0.2))
CONTEXT = torch.tensor([[72, 101, 108, 108, 111]])
OPTIONS = {"pad_token_id": 257, "eos_token_id": None}


def random_delta(model, name, seed, size):
    generator = torch.Generator().manual_seed(seed)
    first, second = (size * torch.randn(H, H, generator=generator) / H for _ in range(2))
    gate = Gate(torch.zeros(H), torch.randn(3, H, generator=generator), torch.linspace(120.0, 40.0, 4))
    base = model.config.base_fingerprint
    return Delta(
        name=name, chart="symmetric", first=first, second=second, gate=gate, base=base, record={"strengths": [1.0]}
    )  # fmt: skip


def make(gated=False, size=2.0, numbers=False):
    model = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"), latent_scale=0.3)
    if numbers:
        model.add_numbers(tiny.tokenizer())
        with torch.no_grad():
            model.action.bias[model.config.num_token_id] = 6.0
            model.action.value_weight.mul_(5)
        renew_fingerprint(model)
    deltas = [random_delta(model, name, seed, size) for seed, name in enumerate("ab")]
    alone = [model] + [fuse(model, {d: s}, by="sum", gated=False) for d in deltas for s in d.strengths]
    return fuse(model, dict.fromkeys(deltas, 1.0), rule=RULE, gated=gated), alone


@pytest.fixture(scope="module", params=[False, True], ids=["always", "gated"])
def fused(request):
    return make(request.param)[0]


def written(model, noise, new=6):
    options = OPTIONS | {"attention_mask": torch.ones_like(CONTEXT), "max_new_tokens": new}
    return model.generate(CONTEXT, mode="causal", noise=noise, **options)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_individual_replays_what_was_written(fused, shared, seed):
    text = written(fused, Noise.draw(1, H, seed=seed, shared=shared))
    people = abduct(fused, text, 5, shared=shared, samples=12)
    again = replay(fused, people, CONTEXT, **OPTIONS)["sequences"]
    assert torch.equal(again, text.expand(12, -1))
    posterior = people.posterior
    chains = 1 if shared else 6
    assert posterior.noise.shape == (12, chains, H)
    assert posterior.speaker.shape == (12, chains)
    assert posterior.expert.shape == (12, 6)
    assert float(posterior.noise.std(0).mean()) > 0.02
    if not shared:
        assert max(len(column.unique()) for column in posterior.expert.T) > 1
    # Replayed with the cache, and without.
    slow = replay(fused, people, CONTEXT, use_cache=False, **OPTIONS)["sequences"]
    assert torch.equal(slow, again)


def test_the_weights_of_who_speaks_are_those_of_the_writing(fused, monkeypatch):
    text = written(fused, Noise.draw(1, H, seed=2), new=8)
    seen = {}

    def remember(loc, scale, weight, **options):
        seen.update(loc=loc, scale=scale, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr("tether.causal.counterfactual.sample_posterior", remember)
    with pytest.raises(KeyboardInterrupt):
        abduct(fused, text, 5)
    cache, told = None, []
    for first, last in [(0, 5)] + [(place, place + 1) for place in range(5, 12)]:
        part = text[:, first:last]
        with torch.no_grad():
            out = fused(
                input_ids=part, past_key_values=cache, use_cache=True, written_from=5, logits_to_keep=1,
                output_weights=True,
            )  # fmt: skip
        cache = out.past_key_values
        told.append((out.log_weights[0, -1], out.latent_loc[0, -1], out.latent_log_scale[0, -1]))
    log_weights, loc, log_scale = (torch.stack(column) for column in zip(*told, strict=True))
    assert seen["loc"].shape == (8, 3, H)
    assert_close(seen["log_weights"].exp(), log_weights.exp(), rtol=1e-4, atol=1e-6)
    assert_close(seen["loc"][:, 0], loc, rtol=1e-4, atol=1e-4)
    assert_close(seen["scale"][:, 0], log_scale.exp(), rtol=1e-4, atol=1e-5)
    assert float(log_weights.exp()[:, 0].std()) > 0.01


@pytest.mark.parametrize("shared", [False, True])
def test_who_wrote_writes_it_again(fused, shared):
    changed = 0
    for seed in range(6):
        noise = Noise.draw(1, H, seed=seed, shared=shared)
        text = written(fused, noise, new=8)
        steps = torch.arange(4, 12)[None]
        u, e = noise.at(steps).double(), noise.speaker(steps)
        if shared:
            u, e = u[:, :1], e[:, :1]
        none = torch.ones(u.shape[1:])
        posterior = Posterior(u, none, none[:, 0], none[:, 0], none[:, 0], e)
        again = replay(fused, Abducted(posterior, shared, text[0, 5:]), CONTEXT, **OPTIONS)["sequences"]
        assert torch.equal(again, text)
        others = Abducted(posterior._replace(speaker=(e + 0.5) % 1), shared, text[0, 5:])
        changed += not torch.equal(replay(fused, others, CONTEXT, **OPTIONS)["sequences"], text)
    assert changed > 1  # the speakers matter: with others the text is another


def test_speakers_are_at_the_steps_whatever_the_length_of_the_context(fused):
    people = abduct(fused, written(fused, Noise.draw(1, H, seed=3)), 5, samples=3)
    for length in (1, 5, 9):
        noise = people.noise(length)
        steps = torch.arange(length - 1, length + 5).expand(3, -1)
        assert torch.equal(noise.speaker(steps), people.posterior.speaker)
        assert torch.equal(noise.at(steps), people.posterior.noise)


def test_in_another_context_the_same_individual_speaks_by_the_weights_there():
    fused, alone = make()
    people = abduct(fused, written(fused, Noise.draw(1, H, seed=4)), 5, samples=16)
    other = torch.tensor([[90, 40, 33]])
    what_if = replay(fused, people, other, **OPTIONS)["sequences"][:, 3]
    with torch.no_grad():
        weights = fused(input_ids=other, written_from=3, output_weights=True).log_weights[0, -1].exp()
        laws = [each(input_ids=other) for each in alone]
    ends = weights.cumsum(0)
    number = (people.posterior.speaker[:, :1] >= ends[:-1]).sum(-1)
    assert len(number.unique()) > 1
    t = torch.tan(torch.pi * (people.posterior.noise[:, 0] - 0.5))
    u = torch.stack([each.latent_loc[0, -1] for each in laws])[number]
    u = u + torch.stack([each.latent_log_scale[0, -1].exp() for each in laws])[number] * t
    action = fused.action
    assert torch.equal(what_if, (u.float() @ action.weight.T).argmax(-1))


def test_numbers_are_replayed_with_their_values():
    fused, _ = make(numbers=True)
    number = fused.config.num_token_id
    ids = torch.tensor([[72, 101, number, 111, 32]])
    values = torch.zeros(1, 5, dtype=torch.float64)
    values[0, 2] = 3.5
    for shared in (False, True):
        for seed in range(20):
            text = fused.generate(
                ids, numeric_values=values, mode="causal", noise=Noise.draw(1, H, seed=seed, shared=shared),
                max_new_tokens=5, return_dict_in_generate=True, attention_mask=torch.ones_like(ids), **OPTIONS,
            )  # fmt: skip
            if 0 < int((text["sequences"][0, 5:] == number).sum()) < 4:
                break
        people = abduct(
            fused,
            text["sequences"],
            5,
            numeric_values=text["numeric_values"],
            shared=shared,
            samples=8,
            burn_in=8,
        )
        again = replay(fused, people, ids, numeric_values=values, **OPTIONS)
        assert torch.equal(again["sequences"], text["sequences"].expand(8, -1))
        assert_close(again["numeric_values"], text["numeric_values"].expand(8, -1), rtol=1e-3, atol=1e-4)
        if not shared:
            here = text["sequences"][0, 5:] == number
            assert len(people.posterior.expert[:, here].unique()) > 1


def test_each_expert_speaks_as_often_as_its_weight():
    """Over many individuals, told by whose law U was drawn from; experts run alone are the reference."""
    fused, alone = make()
    people = 6000
    rows = CONTEXT.expand(people, -1)
    with torch.no_grad():
        out = fused(
            input_ids=rows, mode="causal", noise=Noise.draw(people, H, seed=5), output_weights=True,
            logits_to_keep=1,
        )  # fmt: skip
        laws = torch.stack([each(input_ids=CONTEXT).latent_loc[0, -1] for each in alone])
    weights = out.log_weights[0, -1].exp()
    distance = (out.latent_loc[:, -1].unsqueeze(1) - laws).abs().amax(-1)
    nearest = distance.argmin(-1)
    assert float(distance.amin(-1).max()) < 1e-3 < float((laws[1:] - laws[:1]).abs().amax(-1).min())
    share = torch.bincount(nearest, minlength=3) / people
    error = (weights * (1 - weights) / people).sqrt()
    assert float(weights.min()) > 0.03
    assert float(((share - weights) / error).abs().max()) < 4
    # U is drawn from that law: the noise of who speaks is uniform, whoever it is.
    with torch.no_grad():
        spread = torch.stack([each(input_ids=CONTEXT).latent_log_scale[0, -1].exp() for each in alone])[
            nearest
        ]
    u = torch.atan((out.latent[:, -1] - laws[nearest]) / spread) / torch.pi + 0.5
    for number in range(3):
        mean = u[nearest == number].mean(0)
        assert float((mean - 0.5).abs().max()) < 5 * (1 / 12 / int((nearest == number).sum())) ** 0.5


@pytest.mark.parametrize("gated", [False, True])
def test_the_deterministic_law_is_the_mixture_of_firing_probabilities(gated):
    """log sum of w P(S > C), every expert's law mixed in float64 from the law of a model of its own."""
    fused, alone = make(gated)
    ids, action = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(1)), fused.action
    with torch.no_grad():
        out = fused(input_ids=ids, mode="deterministic", output_weights=True)
        total, base = 0.0, None
        for number, each in enumerate(alone):
            law = each(input_ids=ids)
            weight = action.weight.double()
            loc = law.latent_loc.double() @ weight.T
            scale = law.latent_log_scale.double().exp() @ weight.abs().T + action.noise_scale.double()
            own = 0.5 + torch.atan((loc - action.thresholds(loc).double()) / scale) / torch.pi
            if number == 0:
                base = own
            total = total + out.log_weights[..., number].exp().unsqueeze(-1) * own
    assert_close(out.logits.double(), total.log(), rtol=1e-4, atol=1e-4)
    assert float((total.log() - base.log()).abs().max()) > 0.01
