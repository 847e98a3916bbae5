"""Accounts of fusions by evidence: what the model serves, by formulas in double precision; figures that can fail."""

import math

import pytest
import torch
from torch.testing import assert_close

import tiny
from tether.causal import mixture
from tether.causal.evidence import Rule, regret_allowed
from tether.causal.experts import CLIP
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.account import account
from tether.delta.continuations import generated_account
from tether.delta.delta import Delta
from tether.delta.fusion import fuse
from tether.delta.gate import Gate
from tether.delta.regret import account_figures, shares, window_sums
from tether.delta.windows import Windows, window_text

H = 32
RULE = Rule(prior=0.6, restarts=(0.0, 0.05), floor=0.05)


def random_delta(model, name, seed, chart="symmetric", size=3.0, strengths=(0.5, 1.0), layers=()):
    generator = torch.Generator().manual_seed(seed)
    first, second = (size * torch.randn(H, H * (1 + len(layers)), generator=generator) / H for _ in range(2))
    gate = Gate(torch.zeros(H), torch.randn(3, H, generator=generator), torch.linspace(120.0, 40.0, 4))
    return Delta(
        name=name,
        chart=chart,
        first=first,
        second=second,
        gate=gate,
        base=model.config.base_fingerprint,
        record={"strengths": list(strengths)},
        layers=layers,
    )


@pytest.fixture(scope="module")
def base():
    return CausalQwenForCausalLM.from_backbone(tiny.backbone(), latent_scale=1.0)


@pytest.fixture(scope="module")
def deltas(base):
    return [
        random_delta(base, "a", 1),
        random_delta(base, "b", 2, "linear", strengths=(1.0,)),
        random_delta(base, "c", 3, "geodesic"),
    ]


@pytest.fixture(scope="module")
def windows():
    """Documents of one and of several windows, which differ in length."""
    documents = [
        text[:length]
        for text, length in zip(tiny.documents("words", 6, 5), (130, 60, 95, 33, 41, 110), strict=True)
    ]
    found = window_text(documents, tiny.tokenizer(), length=60)
    assert len(set(found.starts.diff().tolist())) > 2
    assert len(found.starts) - 1 > len(found.documents.unique())
    return found


def experts_of(model, weighted):
    """Each expert as a model of its own, base first."""
    made = [model]
    for delta in weighted:
        made += [fuse(model, {delta: s}, by="sum", chart=delta.chart, gated=False) for s in delta.strengths]
    return made


def by_forward(model, weighted, fused, windows):
    """Every figure from what the models give for each window alone, in double precision."""
    found = {
        name: []
        for name in ("nll", "base_nll", "softmax_kl", "parts_kl", "latent_drift", "gain", "log_weights")
    }
    experts = experts_of(model, weighted)
    for first, last in zip(windows.starts[:-1], windows.starts[1:], strict=True):
        ids = windows.input_ids[first:last][None]
        with torch.no_grad():
            out = fused(input_ids=ids, output_weights=True, use_cache=False)
            alone = [each(input_ids=ids) for each in experts]
        q = out.logits[0].double().log_softmax(-1)
        p = torch.stack([each.logits[0].double().log_softmax(-1) for each in alone], 1)
        share = out.log_weights[0].exp()
        kl = (p[:, :1].exp() * (p[:, :1] - p)).sum(-1)
        laws = [
            torch.distributions.Cauchy(each.latent_loc[0].double(), each.latent_log_scale[0].double().exp())
            for each in alone
        ]
        drift = torch.stack([torch.distributions.kl_divergence(laws[0], law).sum(-1) for law in laws], 1)
        token = p[:-1].gather(-1, ids[0, 1:, None, None].expand(-1, len(experts), 1))[..., 0]
        found["nll"].append(-q[:-1].gather(-1, ids[0, 1:, None])[:, 0])
        found["base_nll"].append(-token[:, 0])
        found["softmax_kl"].append((p[:, 0].exp() * (p[:, 0] - q)).sum(-1))
        found["parts_kl"].append((share * kl).sum(-1))
        found["latent_drift"].append((share * drift).sum(-1))
        found["gain"].append(torch.where(share[:-1] > 0, token - token[:, :1], 0.0))
        found["log_weights"].append(out.log_weights[0])
    return {name: torch.cat(values) for name, values in found.items()}


@pytest.mark.parametrize("gated", [True, False])
def test_an_account_is_what_the_model_serves(base, deltas, windows, gated, monkeypatch):
    weighted = dict.fromkeys(deltas, 1.0)
    fused = fuse(base, weighted, rule=RULE, gated=gated)
    expected = by_forward(base, weighted, fused, windows)
    for batch_size, block in ((8, None), (1, None), (3, 7)):
        if block:
            monkeypatch.setattr(mixture, "BLOCK_BYTES", block * 4 * base.action.weight.shape[0] * batch_size)
        steps = []
        (found,) = account([fused], windows, batch_size=batch_size, on_step=steps.append)
        assert torch.equal(found.documents, windows.documents)
        assert found.windows.bincount().tolist() == windows.starts.diff().tolist()
        assert torch.equal(found.scored, windows.targets >= 0)
        assert len(found.nll) == int(found.scored.sum())
        assert_close(found.log_weights.exp(), expected["log_weights"].exp(), rtol=1e-3, atol=1e-6)
        for name in ("nll", "base_nll", "softmax_kl", "parts_kl", "latent_drift", "gain"):
            assert_close(getattr(found, name).double(), expected[name], rtol=1e-3, atol=1e-5, msg=name)
        assert steps[-1] == {"done": len(windows.input_ids), "total": len(windows.input_ids)}
    assert float(found.softmax_kl.max()) > 0.05
    asleep = found.log_weights[:, 1:] == -math.inf
    assert bool(asleep.any()) == gated


def test_several_fusions_are_accounted_for_as_each_alone(base, deltas, windows):
    deep = random_delta(base, "deep", 7, layers=(1,))
    models = [
        fuse(base, dict.fromkeys(deltas, 1.0), rule=RULE),
        fuse(base, {deltas[1]: -1.0}, gated=False),
        fuse(base, {deep: 1.0, deltas[0]: 0.5}, rule=Rule(prior=0.5)),
    ]
    together = account(models, windows, batch_size=4)
    for model, found in zip(models, together, strict=True):
        (alone,) = account([model], windows, batch_size=4)
        for name, value in alone._asdict().items():
            assert torch.equal(getattr(found, name), value), name
    assert together[1].log_weights.shape[1] == 2


@pytest.mark.parametrize("written", [1, 20, 45])
def test_text_that_the_model_is_said_to_have_written(base, deltas, windows, written):
    weighted = dict.fromkeys(deltas, 1.0)
    fused = fuse(base, weighted, rule=RULE)
    (found,) = account([fused], windows, written=written)
    for window, first in enumerate(windows.starts[:-1].tolist()):
        ids = windows.input_ids[first : windows.starts[window + 1]][None]
        with torch.no_grad():
            out = fused(input_ids=ids, written_from=written, output_weights=True)
        got = found.log_weights[found.windows == window]
        assert_close(got.exp(), out.log_weights[0].exp(), rtol=1e-3, atol=1e-6)


def test_figures_of_an_honest_account(base, deltas, windows):
    fused = fuse(base, dict.fromkeys(deltas, 1.0), rule=RULE)
    (found,) = account([fused], windows)
    figures = account_figures(fused.fusion, found)
    assert figures["tokens"] == len(windows.input_ids)
    assert figures["documents"] == 6
    assert figures["windows"] == len(windows.starts) - 1
    assert figures["nll"] == pytest.approx(float(found.nll.double().mean()))
    assert figures["nll_change"]["mean"] == pytest.approx(figures["nll"] - figures["nll_base"], abs=1e-6)
    assert figures["softmax_kl"]["mean"] == pytest.approx(float(found.softmax_kl.double().mean()))
    assert figures["latent_drift"]["max"] == pytest.approx(float(found.latent_drift.max()))
    assert figures["parts"]["violations"] == 0
    assert figures["parts"]["contexts"] == figures["tokens"]
    assert 0 < figures["parts"]["largest_ratio"] <= 1 + 1e-4
    assert figures["worst_token"]["violations"] == 0
    assert 0 < figures["worst_token"]["lost"] <= figures["worst_token"]["allowed"]
    share = figures["shares"]
    assert list(share) == ["base", "a", "b", "c"]
    assert sum(share.values()) == pytest.approx(1, abs=1e-12)
    assert share == shares(fused.fusion, found)
    expected = found.log_weights.exp().mean(0)
    assert share["a"] == pytest.approx(float(expected[1:3].sum()))
    assert share["b"] == pytest.approx(float(expected[3]))


def test_regret_by_hand(base, deltas, windows):
    """Document by document, against the expert of each domain that did best in each window where it was awake."""
    fused = fuse(base, dict.fromkeys(deltas, 1.0), rule=RULE)
    (found,) = account([fused], windows)
    regret = account_figures(fused.fusion, found)["regret"]
    assert list(regret) == ["base", "a", "b", "c"]
    served = (found.nll - found.base_nll).double()
    # Half of what the base leaves has the gates' choice.
    prior = [0.6, 0.2 / 6, 0.2 / 6, 0.2 / 3, 0.2 / 6, 0.2 / 6]
    of_scored, awake = found.windows[found.scored], found.log_weights[found.scored] > -math.inf
    for name, rows in {"base": [0], "a": [1, 2], "b": [3], "c": [4, 5]}.items():
        documents = {}
        for window, first in enumerate(windows.starts[:-1].tolist()):
            here = of_scored == window
            tokens = int(windows.starts[window + 1]) - first - 1
            assert int(here.sum()) == tokens
            lost = [float((served[here] + found.gain[here, k])[awake[here, k]].sum()) for k in rows]
            best = max(range(len(rows)), key=lost.__getitem__)
            allowed = regret_allowed(RULE, prior[rows[best]], tokens, floored=name != "base")
            documents.setdefault(int(windows.documents[first]), []).append((lost[best], allowed))
        expected = [
            [sum(pair[i] for pair in pairs) for i in (0, 1)] for _, pairs in sorted(documents.items())
        ]
        assert_close(torch.tensor(regret[name]["documents"]), torch.tensor(expected), rtol=1e-5, atol=1e-4)
        every = [pair for pairs in documents.values() for pair in pairs]
        assert regret[name]["largest"] == pytest.approx(max(every)[0], abs=1e-4)
        assert regret[name]["allowed"] == pytest.approx(max(every)[1], rel=1e-9)
        assert regret[name]["violations"] == 0
    assert max(regret[name]["largest"] for name in "abc") > 0


@pytest.mark.parametrize(
    "rule", [Rule(), Rule(prior=0.5, restarts=(0.0,)), Rule(prior=1e-3, restarts=(0.3,), floor=0.4)]
)
@pytest.mark.parametrize("gated", [True, False])
def test_no_honest_account_violates_what_is_promised(base, deltas, windows, rule, gated):
    strong = [
        random_delta(base, delta.name, seed, delta.chart, size=20.0) for seed, delta in enumerate(deltas)
    ]
    fused = fuse(base, dict.fromkeys(strong, 1.0), rule=rule, gated=gated)
    (found,) = account([fused], windows)
    assert float(found.parts_kl.max()) > 1
    figures = account_figures(fused.fusion, found)
    assert figures["parts"]["violations"] == figures["worst_token"]["violations"] == 0
    assert all(of["violations"] == 0 for of in figures["regret"].values())


def test_where_only_the_base_is_awake_nothing_is_lost(base, deltas, windows):
    shut = [
        Delta(**{**delta.__dict__, "gate": delta.gate._replace(threshold=torch.full((4,), -1.0))})
        for delta in deltas
    ]
    fused = fuse(base, dict.fromkeys(shut, 1.0), rule=Rule(grace=0))
    (found,) = account([fused], windows)
    assert torch.equal(found.nll, found.base_nll)
    for values in (found.softmax_kl, found.parts_kl, found.latent_drift, found.gain):
        assert not bool(values.any())
    figures = account_figures(fused.fusion, found)
    assert figures["shares"] == {"base": 1.0, "a": 0.0, "b": 0.0, "c": 0.0}
    assert figures["parts"]["largest_ratio"] == 0
    assert figures["worst_token"]["lost"] == 0
    assert figures["regret"]["a"]["largest"] == 0


def test_figures_of_an_account_that_was_tampered_with_say_so(base, deltas, windows):
    fused = fuse(base, dict.fromkeys(deltas, 1.0), rule=RULE)
    (found,) = account([fused], windows)
    allowed = account_figures(fused.fusion, found)["regret"]

    def figures(**changed):
        return account_figures(fused.fusion, found._replace(**changed))

    # One context drifts more than the mean of its parts.
    at = int(found.parts_kl.argmax())
    drift = found.softmax_kl.clone()
    drift[at] = found.parts_kl[at] * 1.001 + 1e-4
    assert figures(softmax_kl=drift)["parts"]["violations"] == 1
    # One token is lost by more than the weight of the base allows.
    token = int(found.nll.argmin())
    nll = found.nll.clone()
    nll[token] = found.base_nll[token] - found.log_weights[found.scored, 0][token] + 0.01
    changed = figures(nll=nll)
    assert changed["worst_token"]["violations"] == 1
    # A window is lost by more than the start allows, against the base and against who did better than it.
    window = found.windows[found.scored] == 2  # the only one of its document
    room = allowed["base"]["documents"][1][1] + 0.1
    nll = torch.where(window, found.base_nll + room / window.sum(), found.nll)
    changed = figures(nll=nll)["regret"]
    assert changed["base"]["violations"] == 1
    assert changed["base"]["largest"] > changed["base"]["allowed"]
    for name in "abc":
        assert figures(nll=nll + window * 2.0)["regret"][name]["violations"] > 0, name
    # Serving the base where an expert did much better is regretted against the expert.
    gain = found.gain.clone()
    gain[:, 3] = 1.0
    awake = found.log_weights.clone()
    awake[:, 3] = awake[:, 0]
    changed = figures(gain=gain, log_weights=awake, nll=found.base_nll)["regret"]
    assert changed["b"]["violations"] == len(windows.starts) - 1
    assert changed["base"]["violations"] == 0


def test_numbers_are_allowed_their_clip():
    base = CausalQwenForCausalLM.from_backbone(tiny.backbone("qwen2"), latent_scale=1.0)
    reader = base.add_numbers(tiny.tokenizer())
    with torch.no_grad():
        base.action.value_weight.mul_(4)
    own = [random_delta(base, name, seed, size=8.0) for seed, name in enumerate("ab")]
    fused = fuse(base, dict.fromkeys(own, 1.0), rule=RULE, gated=False)
    windows = window_text(
        [f"the gate {n} of base {n * n} and {n / 7:.3f} state tokens" for n in range(3, 300, 40)],
        reader,
        length=33,
    )
    number = base.config.num_token_id
    is_number = windows.targets[windows.targets >= 0] == number
    assert int(is_number.sum()) > 5
    (found,) = account([fused], windows)
    for window, first in enumerate(windows.starts[:-1].tolist()):
        last = int(windows.starts[window + 1])
        with torch.no_grad():
            out = fused(
                input_ids=windows.input_ids[first:last][None], numeric_values=windows.numeric_values[first:last][None],
                output_weights=True,
            )  # fmt: skip
        got = found.log_weights[found.windows == window]
        assert_close(got.exp(), out.log_weights[0].exp(), rtol=1e-3, atol=1e-6)
    with_numbers = account_figures(fused.fusion, found, numbers=is_number)["regret"]
    without = account_figures(fused.fusion, found)["regret"]
    per_window = window_sums(is_number, found.windows[found.scored], len(windows.starts) - 1)
    for name in ("base", "a", "b"):
        assert with_numbers[name]["violations"] == 0
        more = sum(allowed for _, allowed in with_numbers[name]["documents"])
        fewer = sum(allowed for _, allowed in without[name]["documents"])
        assert more - fewer == pytest.approx(CLIP * float(per_window.sum()), rel=1e-6)


def test_an_account_of_one_token_windows_and_sums_over_windows():
    sums = window_sums(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([2, 0, 2]), 4)
    assert sums.tolist() == [[3.0, 4.0], [0.0, 0.0], [6.0, 8.0], [0.0, 0.0]]
    assert sums.dtype == torch.float64


def test_windows_without_a_next_token_are_part_of_it(base, deltas):
    ids = torch.arange(12)
    starts = torch.tensor([0, 1, 7, 12])
    targets = torch.cat([ids[1:], torch.tensor([-100])])
    targets[starts[1:] - 1] = -100
    windows = Windows(ids, targets, torch.tensor([0] * 7 + [2] * 5), starts)
    fused = fuse(base, dict.fromkeys(deltas, 1.0), rule=RULE)
    (found,) = account([fused], windows)
    figures = account_figures(fused.fusion, found)
    assert figures["windows"] == 3
    assert figures["documents"] == 2
    assert len(figures["regret"]["base"]["documents"]) == 2
    assert all(of["violations"] == 0 for of in figures["regret"].values())
    assert float(found.nll.isfinite().all())


def test_contexts_in_which_generated_tokens_were_drawn(base, deltas):
    ids = torch.randint(256, (24,), generator=torch.Generator().manual_seed(1))
    starts = torch.tensor([0, 12, 24])
    targets = torch.cat([ids[1:], torch.tensor([-100])])
    targets[starts[1:] - 1] = -100
    windows = Windows(ids, targets, torch.arange(2).repeat_interleave(12), starts)
    fused = fuse(base, dict.fromkeys(deltas, 1.0), rule=RULE)
    (found,) = account([fused], windows, written=8)
    own = generated_account(found, 4)
    kept = [7, 8, 9, 10, 19, 20, 21, 22]
    assert torch.equal(own.softmax_kl, found.softmax_kl[kept])
    assert torch.equal(own.log_weights, found.log_weights[kept])
    assert torch.equal(own.nll, found.nll.unflatten(0, (2, 11))[:, 7:].flatten())
    assert torch.equal(own.gain, found.gain.unflatten(0, (2, 11))[:, 7:].flatten(0, 1))
    figures = account_figures(fused.fusion, own)
    assert figures["tokens"] == 8
    assert figures["worst_token"]["violations"] == 0
