"""A fusion by evidence on hidden states drawn at random, without a backbone, against a loop over single tokens.

The loop knows nothing of batches, blocks, caches or logarithms of weights, so each line of the walk, of the mixture, of
the sleeping rule and of the weights has a case here that notices when it is gone.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from tether.cauchy.charts import read_move
from tether.causal import mixture as mixture_file
from tether.causal import walk
from tether.causal.action import Action
from tether.causal.evidence import Rule
from tether.causal.experts import CLIP
from tether.causal.layers import Abduction
from tether.causal.memory import Memory
from tether.causal.mixture import Mixture

H, C, V, T, WINDOW = 5, 4, 12, 14, 3
NUM = 11
NATIVE = ("symmetric", "linear", "geodesic")
STRENGTHS = ((0.5, 1.0), (1.0,), (1.0, 0.25))
RULE = Rule(prior=0.5, restarts=(0.0, 0.05, 0.3), floor=0.1, hold=2, grace=1, stay=1.3)


@dataclasses.dataclass(frozen=True)
class Fused:
    """A mixture with the two heads of a model."""

    mixture: Mixture
    abduction: Abduction
    action: Action

    def serve(self, reading, memory=None, kept=0):
        """Blocks of one call, put together: a dict of tensors of shape (B, positions, ...)."""
        blocks = list(self.mixture.serve(self.abduction, self.action, reading, memory, kept=kept))
        assert [each.first for each in blocks] == [
            kept + sum(other.size for other in blocks[:at]) for at in range(len(blocks))
        ]
        batch = len(reading.mask)
        parts = [
            {
                "weights": each.log_weights.exp(),
                "law": each.scores.served(each.log_weights).softmax(-1).double(),
                "gain": each.gain,
                "scored": each.scored,
                "awake": each.experts.awake,
                "density": each.density,
            }
            for each in blocks
        ]
        return {
            name: torch.cat([part[name].unflatten(0, (batch, -1)) for part in parts], 1) for name in parts[0]
        }


def build(*, rule=RULE, gated=True, layers=(), location_only=False, domains=3, strengths=STRENGTHS):
    draw = torch.Generator().manual_seed(7)
    description = {
        "domains": [*"abc"[:domains]], "native": [*NATIVE[:domains]], "weights": [1.0, -0.8, 1.2][:domains],
        "strengths": [*strengths[:domains]], "gated": gated, "location_only": location_only, "layers": layers,
        "gate_window": WINDOW, "gate_rank": 2, "gate_stages": 2, **rule.described(),
    }  # fmt: skip
    mixture = Mixture(H, C, description)
    assert mixture.description == description
    abduction = Abduction(H, C, 1.0)
    action = Action(C, V, 0.1, "constant", 1.0, "constant", "raw", True)
    with torch.no_grad():
        for module in (abduction, action):
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
        abduction.log_scale.weight.mul_(0.2)
        for name, parameter in mixture.named_parameters():
            drawn = torch.randn(parameter.shape, generator=draw)
            if name in {"first", "second"}:
                parameter.copy_(1.5 * drawn / H)
            elif name == "gate_threshold":
                # About half of the contexts are inside.
                parameter.copy_(torch.tensor([9.0, 6.0, 4.0]))
            else:
                parameter.copy_(drawn if name != "gate_precision" else drawn.abs() / 4)
    return Fused(mixture, abduction, action)


# One text after the other, token by token


def distances(mixture, row, states, count):
    """Squared distance of a mean state from a domain, and the density of a Gaussian with that distance."""
    stage = 1 if count == WINDOW else 0
    center, whitening, precision = (
        each.double()[row, stage]
        for each in (mixture.gate_center, mixture.gate_whitening, mixture.gate_precision)
    )
    apart = states.mean(0) - center
    inside = (whitening @ apart).square().sum()
    unit = whitening / whitening.norm(dim=-1, keepdim=True)
    # Principal directions are as the gate has them, orthogonal or not; each is taken off the rest.
    rest = apart.square().sum() - (unit @ apart).square().sum()
    far = inside + precision * rest
    density = whitening.norm(dim=-1).log().sum() + (H - 2) * precision.log() / 2 - far / 2
    return float(far), float(density)


def gates(mixture, text, rule):
    """For each position: tokens since each gate was open; and densities."""
    count = len(mixture.domains)
    hold = rule.hold if mixture.gated else 0
    since, density, place = [], [], text["places"]
    now = [math.inf] * count
    for t in range(T):
        seen = []
        for row in range(count):
            if not text["mask"][t]:
                seen.append(0.0)
                continue
            if place[t] == 0:
                now[row] = math.inf
            size = min(WINDOW, int(place[t]) + 1)
            if not mixture.gated:
                opens, stays, dense = True, True, 0.0
            else:
                far, dense = distances(mixture, row, text["features"][t - size + 1 : t + 1, :H], size)
                limit = float(mixture.gate_threshold[row, size - 1])
                opens, stays = far <= limit, far <= rule.stay * limit
            seen.append(dense)
            if hold and text["written"] is not None and t >= text["written"]:
                now[row] = 0 if now[row] < hold else math.inf
                continue
            now[row] = 0 if opens or (hold and stays and now[row] == 0) else now[row] + 1
            if place[t] < rule.grace:
                now[row] = min(now[row], hold)
        since.append(list(now))
        density.append(seen)
    return since, density, hold


def laws(fused, features):
    """Whose each expert is; and at each position whether its law is one, its next token, and loc and scale of numbers.

    Shapes (K,), (T, K), (T, K, V), and twice (T, K).
    """
    mixture, action = fused.mixture, fused.action
    base = tuple(each.double() for each in fused.abduction(features[:, :H].float()))
    domain, found = [0], [base]
    for row, strengths in enumerate(mixture.description["strengths"]):
        second = features @ mixture.second[row].double().T
        first = 0 * second if mixture.location_only else features @ mixture.first[row].double().T
        for strength in strengths:
            s = strength * mixture.description["weights"][row]
            x, y = read_move(s * first, s * second, mixture.native[row], base[1])
            domain.append(row)
            # The model has all in single precision: what is infinite there is so at every strength.
            held = torch.cat([first, second], -1).float().isfinite().all(-1, keepdim=True)
            moved = base[0] + base[1].exp() * y
            found.append((torch.where(held, moved, math.nan), base[1] + x))
    loc, log_scale = (torch.stack(each, 1) for each in zip(*found, strict=True))
    scores, cap = loc @ action.weight.double().T, action.logit_cap
    scores = scores if action.bias is None else scores + action.bias.double()
    scores = scores if cap is None else cap * (scores / cap).tanh()
    # A class may be impossible, but none is infinitely likely.
    fine = torch.cat([loc, log_scale, scores.amax(-1, keepdim=True)], -1).float().isfinite().all(-1)
    flat = action.value_weight.double()[0]
    number = loc @ flat + action.value_bias.double(), log_scale.exp() @ flat.abs()
    return domain, fine, scores.softmax(-1), *number


def from_slowest(state, rule):
    """Weights with which the model's own text begins: at each rate those of the slowest one."""
    own = state[rule.restarts.index(min(rule.restarts))]
    return (own / own.sum() / len(state)).expand(len(state), -1)


@torch.no_grad()
def by_hand(fused, text, prompt=walk.PROMPT, begin=0):
    """What is served at each position of one text, in plain probabilities; tokens before `begin` are no evidence."""
    mixture, rule = fused.mixture, fused.mixture.rule
    since, density, hold = gates(mixture, text, rule)
    domain, fine, prob, loc, scale = laws(fused, text["features"])
    counts = [len(each) for each in mixture.strengths]
    chooses = mixture.gated and rule.choice and len(counts) > 1
    left = (1 - rule.prior) / (2 if chooses else 1)
    prior = [rule.prior, *(left / len(counts) / n for n in counts for _ in range(n)), *([left] * chooses)]
    prior = torch.tensor(prior, dtype=torch.float64)
    rates = torch.tensor(rule.restarts, dtype=torch.float64)[:, None]
    start = prior.expand(len(rates), -1) / len(rates)
    state, aim, before = start, prior, None
    found = {name: [] for name in ("weights", "law", "gain", "scored", "awake", "density", "state", "since")}
    for t in range(T):
        up = [bool(text["mask"][t]) and since[t][row] <= hold for row in domain]
        awake = torch.tensor([k == 0 or (up[k] and bool(fine[t, k])) for k in range(len(domain))])
        share = torch.zeros(len(domain), dtype=torch.float64)
        for k in range(1, len(domain)):
            share[k] = math.exp(density[t][domain[k]]) / counts[domain[k]] * bool(awake[k])
        share = share / share.sum() if share.any() else share
        written = text["written"]
        if t == written:
            aim = state / state.sum(-1, keepdim=True)
        scored = bool(
            t >= max(begin, 1)
            and text["ids"] is not None
            and text["mask"][t]
            and text["mask"][t - 1]
            and text["places"][t]
            and (written is None or t >= written - prompt)
        )
        gain = torch.zeros(len(domain), dtype=torch.float64)
        if scored:
            was, chosen = before
            came = torch.where(was, prob[t - 1, :, text["ids"][t]], 0.0)
            if text["values"] is not None and text["ids"][t] == NUM:
                told = scale[t - 1] / (scale[t - 1].square() + (text["values"][t] - loc[t - 1]).square())
                came = came * (told / told[0]).log().clamp(-CLIP, CLIP).exp()
            gain = torch.where(was, (came / came[0]).log(), 0.0)
            if chooses:
                came = torch.cat([came, (chosen @ came)[None]])
                was = torch.cat([was, was[1:].any()[None]])
            heard = state * torch.where(was, came, 0.0)
            moved = torch.where(was, heard / heard.sum() * (state * was).sum(), state)
            to = aim if written is not None and t >= written else prior
            state = (1 - rates) * moved + rates * moved.sum(-1, keepdim=True) * to
        if text["places"][t] == 0:
            state = start
        if rule.whole and t + 1 == written:
            state = from_slowest(state, rule)
        before = awake, share
        voters = torch.cat([awake, awake[1:].any()[None]]) if chooses else awake
        weights = state.sum(0) * voters
        weights = (1 - rule.floor) * weights / weights.sum()
        weights[0] += rule.floor
        if chooses:
            weights = weights[:-1] + weights[-1] * share
        found["weights"].append(weights)
        found["law"].append(weights @ torch.where(awake[:, None], prob[t], 0.0))
        found["gain"].append(gain)
        found["scored"].append(scored)
        found["awake"].append(awake)
        found["density"].append(density[t] if chooses else [0.0] * len(counts))
        found["state"].append(state)
        found["since"].append([min(each, hold + 1) for each in since[t]])
    return {
        name: torch.stack(rows) if isinstance(rows[0], torch.Tensor) else torch.tensor(rows)
        for name, rows in found.items()
    }


# Texts


def texts(*, written=None, layers=0, values=True, ids=True):
    """A whole text, one padded on the left, two packed ones, and one padded on the right."""
    draw = torch.Generator().manual_seed(3)
    mask = torch.ones(4, T, dtype=torch.bool)
    places = torch.arange(T).repeat(4, 1)
    mask[1, :3], places[1] = False, (places[1] - 3).clamp(min=0)
    places[2, 6:] -= 6
    mask[3, 11:] = False
    tokens = torch.randint(V - 1, (4, T), generator=draw)
    tokens[:, 4], tokens[0, 9], tokens[2, 7] = NUM, NUM, NUM
    return walk.Reading(
        features=torch.randn(4, T, H * (1 + layers), generator=draw),
        mask=mask,
        places=places,
        ids=tokens if ids else None,
        values=3 * torch.randn(4, T, generator=draw, dtype=torch.float64) if values else None,
        number=NUM if values else None,
        written=written,
    )


def part(reading, first, last):
    """A piece of a text, as a call of the model reads it."""
    cut = {
        name: value[:, first:last]
        for name, value in reading._asdict().items()
        if isinstance(value, torch.Tensor)
    }
    return reading._replace(**cut)


def expected(fused, reading, **options):
    """What the loop gives for each text, as `Fused.serve` gives it; `gain` and `scored` are of the next token."""
    rows = []
    for row in range(len(reading.mask)):
        text = {
            name: value[row] if isinstance(value, torch.Tensor) else value
            for name, value in reading._asdict().items()
        }
        text["features"] = text["features"].double()
        found = by_hand(fused, text, **options)
        for name in ("gain", "scored"):
            found[name] = torch.cat([found[name][1:], torch.zeros_like(found[name][:1])])
        rows.append(found)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def check(found, known, first, last, seen, names):
    """What was found at some positions is what is known of the whole text; `seen` are positions with a token."""
    for name in names:
        expected = known[name][:, first:last][seen].to(found[name].dtype)
        assert_close(found[name][seen], expected, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


ALL = ("weights", "law", "gain", "scored", "awake", "density")


def in_pieces(fused, reading, cuts, known):
    """Calls that go on from each other give what is known of the whole text, and remember the same."""
    memory = Memory()
    for first, last in itertools.pairwise([0, *cuts, T]):
        found = fused.serve(part(reading, first, last), memory)
        seen = reading.mask[:, first:last]
        check(found, known, first, last, seen, ("weights", "law", "awake", "density"))
        # The last token of a call is followed by none.
        before = {name: found[name][:, :-1] for name in ("gain", "scored")}
        check(before, known, first, last - 1, seen[:, :-1], ("gain", "scored"))
        assert not bool(found["scored"][:, -1].any())
        assert not bool(found["gain"][:, -1].any())
    return memory.held


@pytest.mark.parametrize("written", [None, 0, 1, 5, 13, 20])
@pytest.mark.parametrize("gated", [True, False])
def test_a_text_in_one_call_and_in_several(gated, written):
    fused, reading = build(gated=gated), texts(written=written)
    known = expected(fused, reading)
    if written is None:
        awake = known["awake"][reading.mask][:, 1:].double().mean()
        assert 0.3 < awake < 0.8 if gated else awake == 1
        assert float(known["weights"].amin((0, 1))[0]) < 0.3
    memory = Memory()
    served = fused.serve(reading, memory)
    check(served, known, 0, T, reading.mask, ALL)
    # Nobody learns through what is served, though the heads could.
    assert fused.action.weight.requires_grad
    assert not any(value.requires_grad for value in [*served.values(), *memory.held.values()])
    assert memory.written == written
    held = memory.held
    assert bool(held["known"].all())
    check(held, known, 0, T, reading.mask, ("since", "density", "awake"))
    assert_close(held["state"].exp(), known["state"], rtol=1e-4, atol=1e-7)
    for cuts in ([*range(1, T)], [4], [5, 9], [7, 8]):
        again = in_pieces(fused, reading, cuts, known)
        assert again.keys() == held.keys()
        for name, value in held.items():
            assert_close(again[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"rule": dataclasses.replace(RULE, choice=False)},
        {"rule": dataclasses.replace(RULE, whole=False)},
        {"rule": dataclasses.replace(RULE, restarts=(0.3, 0.05))},
        {"rule": dataclasses.replace(RULE, hold=0, grace=0)},
        {"rule": Rule(prior=0.3, restarts=(0.0,), hold=0, grace=0, stay=1.0)},
        {"domains": 1},
        {"location_only": True},
        {"layers": (1,)},
        {"cap": 1.5},
        {"bias": False},
    ],
    ids=str,
)
def test_other_rules_and_other_heads(changes):
    changes = dict(changes)
    cap, bias = changes.pop("cap", None), changes.pop("bias", True)
    fused = build(**changes)
    fused.action.logit_cap = cap
    fused.action.bias = fused.action.bias if bias else None
    reading = texts(written=9, layers=len(changes.get("layers", ())))
    known = expected(fused, reading)
    check(fused.serve(reading), known, 0, T, reading.mask, ALL)
    in_pieces(fused, reading, [*range(1, T)], known)


@pytest.mark.parametrize("options", [{"ids": False}, {"values": False}], ids=str)
def test_a_text_without_ids_is_no_evidence_and_one_without_numbers_is(options):
    fused, reading = build(), texts(**options)
    known = expected(fused, reading)
    assert bool(known["scored"].any()) == options.get("ids", True)
    check(fused.serve(reading), known, 0, T, reading.mask, ALL)
    in_pieces(fused, reading, [1, 2, 5], known)


@pytest.mark.parametrize("kept", [0, 1, 7, T - 1])
@pytest.mark.parametrize("positions", [1, 3])
def test_positions_come_in_blocks_from_the_first_that_is_kept(kept, positions, monkeypatch):
    fused, reading = build(), texts()
    known = expected(fused, reading)
    monkeypatch.setattr(mixture_file, "BLOCK_BYTES", positions * 4 * V * len(reading.mask))
    memory = Memory()
    blocks = list(fused.mixture.serve(fused.abduction, fused.action, reading, memory, kept=kept))
    sizes = [positions] * ((T - kept) // positions) + [(T - kept) % positions] * ((T - kept) % positions > 0)
    assert [each.size for each in blocks] == sizes
    found = fused.serve(reading, Memory(), kept=kept)
    check(found, known, kept, T, reading.mask[:, kept:], ALL)
    assert_close(memory.held["state"].exp(), known["state"], rtol=1e-4, atol=1e-7)


# Prompts


@pytest.mark.parametrize("prompt", [1, 3, 6])
@pytest.mark.parametrize("gated", [True, False])
def test_of_a_prompt_the_last_tokens_are_scored_and_the_last_law_is_wanted(prompt, gated, monkeypatch):
    monkeypatch.setattr(walk, "PROMPT", prompt)
    given = 9
    fused, reading = build(gated=gated), texts(written=given)
    known = expected(fused, reading, prompt=prompt)
    looked = []
    listen = walk.Walk.listen
    monkeypatch.setattr(
        walk.Walk, "listen", lambda self, scores, *at: looked.append(at) or listen(self, scores, *at)
    )
    for cuts in ([9], [4, 9], [8, 9], [7, 9], [2, 11], [*range(1, T)]):
        memory, looked[:] = Memory(), []
        for first, last in itertools.pairwise([0, *cuts, T]):
            found = fused.serve(part(reading, first, last), memory, kept=last - first - 1)
            check(found, known, last - 1, last, reading.mask[:, last - 1 : last], ("weights", "law", "awake"))
        if cuts == [9]:
            # Nobody is asked before the position that predicts the first token which is scored.
            assert looked[0][0] == given - prompt - 1
            assert memory.held["known"][0].tolist() == [at >= given - prompt - 1 for at in range(T)]
        assert_close(memory.held["state"].exp(), known["state"], rtol=1e-4, atol=1e-7)
        assert bool(memory.held["awake"][..., 0].all())


@pytest.mark.parametrize("given", [2, 5, 9])
def test_a_call_of_which_no_law_is_wanted_is_remembered(given, monkeypatch):
    monkeypatch.setattr(walk, "PROMPT", 3)
    fused, reading = build(), texts(written=given)
    known = expected(fused, reading, prompt=3)
    memory = Memory()
    for first, last in ((0, 3), (3, 4), (4, T - 1)):
        call = fused.mixture.serve(
            fused.abduction, fused.action, part(reading, first, last), memory, kept=last - first
        )
        assert list(call) == []
    assert_close(memory.held["state"].exp(), known["state"][:, : T - 1], rtol=1e-4, atol=1e-7)
    found = fused.serve(part(reading, T - 1, T), memory)
    check(found, known, T - 1, T, reading.mask[:, T - 1 :], ("weights", "law", "awake"))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("left", [1, 2, 6, 10])
def test_a_text_goes_on_where_nobody_had_asked_for_a_law(gated, left):
    fused, reading = build(gated=gated), texts()
    memory = Memory()
    fused.serve(part(reading._replace(written=999), 0, 12), memory, kept=11)
    assert not bool(memory.held["known"][:, :11].any())
    memory.keep(left)
    found = fused.serve(part(reading, left, T), memory)
    # What had been left out was no evidence.
    known = expected(fused, reading, begin=left)
    check(found, known, left, T, reading.mask[:, left:], ("weights", "law", "awake"))


@pytest.mark.parametrize("whole", [True, False])
def test_a_call_that_ended_with_the_given_text_need_not_have_known_it(whole):
    fused, reading = build(rule=dataclasses.replace(RULE, whole=whole)), texts(written=9)
    known = expected(fused, reading)
    memory = Memory()
    fused.serve(part(reading._replace(written=None), 0, 9), memory)
    found = fused.serve(part(reading, 9, T), memory)
    check(found, known, 9, T, reading.mask[:, 9:], ("weights", "law", "awake"))
    # Where it ended before what is remembered, restarts go to the weights there.
    earlier = part(reading._replace(written=5), 9, T)
    memory.keep(9)
    begun = walk.Walk(fused.mixture, fused.abduction, fused.action, earlier, memory, 0)
    for row, state in enumerate(expected(fused, reading._replace(written=None))["state"][:, 4]):
        there = from_slowest(state, fused.mixture.rule) if whole else state
        aim = there / there.sum(-1, keepdim=True)
        assert_close(begun.towards[row].exp(), aim, rtol=1e-4, atol=1e-7)


# Laws that are none


@pytest.mark.parametrize("head", ["first", "second"])
def test_an_expert_sleeps_where_its_law_or_its_scores_are_not_finite(head):
    fused, reading = build(gated=False, strengths=((1e-36, 1.0), *STRENGTHS[1:])), texts(values=False)
    sizes = torch.tensor([2e-38, 2e-38, 3e-2, 30.0])
    with torch.no_grad():
        # One dimension of U that only the first domain moves; it decides the score of one class. In half of the
        # contexts nothing overflows, in the others that score at the greater strength, or the law.
        for each in (fused.abduction.loc.weight, fused.abduction.loc.bias):
            each[-1] = 0.0
        fused.mixture.second[1:, -1] = 0.0
        getattr(fused.mixture, head)[0, -1] = torch.tensor([1e38, 0.0, 0.0, 0.0, 0.0])
        fused.action.weight[:, -1] = 0.0
        fused.action.weight[5, -1] = 1e3
        drawn = torch.randint(4, (4, T), generator=torch.Generator().manual_seed(5))
        reading.features[..., 0] = reading.features[..., 0].sign() * sizes[drawn]
    known = expected(fused, reading)
    awake = known["awake"][reading.mask][:, 1:]
    assert 0.3 < awake[:, 1].double().mean() < 0.7
    assert bool((awake[:, 0] & ~awake[:, 1]).any())
    assert bool(awake[:, 2:].all())
    memory, again = Memory(), Memory()
    names = ("weights", "law", "scored", "awake")
    check(fused.serve(reading, memory), known, 0, T, reading.mask, names)
    for first in range(T):
        found = fused.serve(part(reading, first, first + 1), again)
        check(found, known, first, first + 1, reading.mask[:, first : first + 1], ("weights", "law", "awake"))
    assert torch.equal(memory.held["awake"], again.held["awake"])
