"""The ledger against brute force, and a domain taken out as if it had never been in."""

import hashlib
import itertools

import pytest
import torch
from torch.testing import assert_close

import tiny
from tether.cauchy.charts import CHARTS, to_chart
from tether.cauchy.charts import fuse as fuse_moves
from tether.cauchy.divergence import drift
from tether.causal.checkpoint import save_checkpoint
from tether.causal.modeling import CausalQwenForCausalLM
from tether.delta.delta import Delta
from tether.delta.fusion import fuse, unfuse
from tether.delta.gate import Gate
from tether.delta.ledger import Allowance, check_allowance, keep_ledger, room
from tether.delta.shares import shares
from tether.errors import CertificateError, ConfigError


def delta(model, name, seed, *, size=1.0, rank=3, first=True, layers=()):
    generator = torch.Generator().manual_seed(seed)
    heads = [size * torch.randn(32, 32 * (1 + len(layers)), generator=generator) / 32 for _ in range(2)]
    return Delta(
        name=name,
        chart="symmetric",
        first=heads[0] if first else None,
        second=heads[1],
        gate=Gate(torch.zeros(32), torch.randn(rank, 32, generator=generator), torch.full((4,), 90.0)),
        base=model.config.base_fingerprint,
        record={"budget": 0.1, "metric": "softmax"},
        layers=layers,
    )


@pytest.fixture(scope="module")
def deltas(model):
    return {delta(model, "a", 1): 1.0, delta(model, "b", 2, rank=5): -0.5, delta(model, "c", 3): 0.7}


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("size", [0.01, 60.0])
def test_shares_are_the_integral_along_the_way_and_add_up(chart, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) * min(size, 1.0)
    y = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) * size
    weights = torch.tensor([1.0, -0.5, 0.8], dtype=torch.float64).unsqueeze(-1).expand(3, 4)
    got, total = shares(*to_chart(x, y, chart), weights, chart)
    assert_close(total, drift(*fuse_moves(x, y, weights[:, 0], chart)).sum(-1))
    assert_close(got.sum(0), total, rtol=1e-9, atol=1e-14)
    # The definition, by a fine midpoint rule in the weights themselves.
    steps = ((torch.arange(150, dtype=torch.float64) + 0.5) / 150) ** 4
    widths = 4 * ((torch.arange(150, dtype=torch.float64) + 0.5) / 150) ** 3 / 150
    expected = torch.zeros_like(got)
    for t, width in zip(steps, widths, strict=True):
        scaled = (t * weights).clone().requires_grad_()
        nats = drift(*fuse_moves(x, y, scaled, chart)).sum()
        expected += width * weights * torch.autograd.grad(nats, scaled)[0]
    assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(total.max()))


def test_in_rootkl_shares_are_the_rows_of_the_gram_form(generator):
    x, y = torch.randn(2, 3, 6, 4, generator=generator, dtype=torch.float64)
    weights = torch.tensor([0.7, 2.0, -0.4], dtype=torch.float64)
    first, second = to_chart(x, y, "rootkl")
    gram = torch.einsum("anc,bnc->nab", first, first) + torch.einsum("anc,bnc->nab", second, second)
    expected = weights * (gram @ weights)
    got, _ = shares(first, second, weights.unsqueeze(-1).expand(3, 6), "rootkl")
    assert_close(got, expected.T)


@pytest.mark.parametrize(
    ("chart", "gated"), [("linear", False), ("symmetric", True), ("geodesic", True), ("rootkl", False)]
)
def test_the_ledger_is_what_fusing_anew_gives(model, tokenizer, deltas, chart, gated):
    text = tiny.documents("words", 2)
    figures = keep_ledger(
        fuse(model, deltas, chart=chart, gated=gated), tokenizer, text, window=48, next_drift=0.3
    )

    def mean(names):
        some = {d: w for d, w in deltas.items() if d.name in names}
        if not some:
            return 0.0
        return keep_ledger(fuse(model, some, chart=chart, gated=gated), tokenizer, text, window=48)["total"]

    total = figures["total"]
    rows = figures["domains"]
    assert sum(row["share"] for row in rows.values()) == pytest.approx(total["measured"], rel=1e-6)
    for name in "abc":
        alone = mean(name)["measured"]
        assert rows[name]["alone"] == pytest.approx(alone, rel=1e-5)
        rest = mean(set("abc") - {name})["measured"]
        assert rows[name]["removal"] == pytest.approx(total["measured"] - rest, rel=1e-4, abs=1e-6)
    for pair in itertools.combinations("abc", 2):
        expected = mean(pair)["measured"] - rows[pair[0]]["alone"] - rows[pair[1]]["alone"]
        assert figures["interactions"][" + ".join(pair)] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert total["ratio"] == pytest.approx(total["measured"] / total["allowed"])
    assert figures["charts"][chart] == pytest.approx({k: total[k] for k in ("allowed", "measured", "ratio")})
    # Another delta: no move of that drift, in any direction, goes beyond what is said.
    assert figures["next"]["allowed"] > total["measured"]
    assert (rows["a"]["gate_open"] < 1) == gated


def test_under_softmax_gates_the_others_take_over_what_a_domain_leaves(model, tokenizer, deltas):
    text = tiny.documents("words", 2)

    def ledger(some):
        return keep_ledger(fuse(model, some, gate="softmax"), tokenizer, text, window=48)

    figures = ledger(deltas)
    assert 0 < figures["domains"]["a"]["gate_open"] < 1
    for name in "abc":
        rest = ledger({d: w for d, w in deltas.items() if d.name != name})["total"]["measured"]
        saved = figures["total"]["measured"] - rest
        assert figures["domains"][name]["removal"] == pytest.approx(saved, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("options", [{"gated": False}, {"gate": "softmax"}, {"gate": "one-class"}])
def test_of_many_domains_each_is_accounted_for_beside_the_rest(model, tokenizer, options):
    text = tiny.documents("words", 1)
    deltas = {delta(model, f"d{row}", row, rank=2 + row % 3): (-1.0) ** row * 0.5 for row in range(10)}

    def ledger(some):
        return keep_ledger(fuse(model, some, by="sum", **options), tokenizer, text, window=48)

    figures = ledger(deltas)
    assert [*figures["interactions"]] == [f"d{row} + the rest" for row in range(10)]
    for name in ("d0", "d7"):
        rest = ledger({d: w for d, w in deltas.items() if d.name != name})["total"]["measured"]
        row = figures["domains"][name]
        assert row["removal"] == pytest.approx(figures["total"]["measured"] - rest, rel=1e-4, abs=1e-6)
        beyond = figures["total"]["measured"] - rest - row["alone"]
        assert figures["interactions"][f"{name} + the rest"] == pytest.approx(beyond, rel=1e-4, abs=1e-6)


def test_the_ledger_of_fifty_domains_is_linear_in_their_number(model, tokenizer, monkeypatch):
    text, computed = tiny.documents("words", 1), []
    exact = drift

    def counted(x, y):
        computed[-1] += x.numel()
        return exact(x, y)

    monkeypatch.setattr("tether.delta.ledger.drift", counted)
    for count in (10, 20, 50):
        computed.append(0)
        deltas = {delta(model, f"d{row}", row): 0.1 for row in range(count)}
        keep_ledger(fuse(model, deltas, by="sum", gate="softmax"), tokenizer, text, window=48)
    small, twice, large = computed
    assert twice < 2.01 * small
    assert large < 5.01 * small


@pytest.mark.parametrize("chart", ["geodesic", "rootkl"])
def test_second_coordinates_of_a_curved_chart_are_not_taken_for_locations(model, tokenizer, chart):
    # They move the scale too, so the bound has the constant of deltas that do; with 1 it was broken.
    head = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) / 24
    same = {
        Delta(
            name=name, chart=chart, first=None, second=head, gate=None, base=model.config.base_fingerprint
        ): 1.0
        for name in "ab"
    }
    fused = fuse(model, same, chart="linear")
    assert not fused.config.fusion["location_only"]
    total = keep_ledger(fused, tokenizer, tiny.documents("words", 3), window=64)["total"]
    assert total["measured"] <= total["allowed"]


def test_room_is_what_another_delta_may_drift(generator):
    for chart in CHARTS:
        left = room(0.2, 1.5, chart)
        x, y = torch.randn(2, 2, 4000, 1, generator=generator, dtype=torch.float64)
        # Scale the first to drift 0.2 and the second to what is left, along the chart's own ray.
        from tether.causal.leash import shrink

        target = torch.tensor([0.2, left], dtype=torch.float64).unsqueeze(-1)
        path = "symmetric" if chart == "linear" else chart
        x, y, _ = shrink(30 * x, 30 * y, target.expand(2, 4000), path)
        both = drift(*fuse_moves(x, y, torch.ones(2, dtype=torch.float64), chart)).sum(-1)
        assert float(both.max()) <= 1.5
        assert float(both.max()) > 0.6 * 1.5
    assert room(2.0, 1.5, "symmetric") == 0


def digest(folder, name):
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("removed", ["a", "b", "c"])
def test_removal_restores_the_fusion_without_it_bit_for_bit(model, tokenizer, tmp_path, gated, removed):
    made = {
        delta(model, "a", 1, layers=(1,)): 1.0,
        delta(model, "b", 2, rank=5): -0.5,
        delta(model, "c", 3, first=False): 0.7,
    }
    save_checkpoint(model, tokenizer, tmp_path / "base")
    model = CausalQwenForCausalLM.from_pretrained(tmp_path / "base")
    options = {"chart": "geodesic", "gated": gated, "leash": 0.5, "leash_metric": "latent"}
    save_checkpoint(fuse(model, made, **options), tokenizer, tmp_path / "all")
    base, deltas = unfuse(CausalQwenForCausalLM.from_pretrained(tmp_path / "all"))
    rest = {d: w for d, w in deltas.items() if d.name != removed}
    save_checkpoint(fuse(base, rest, **options), tokenizer, tmp_path / "rest")
    never = {d: w for d, w in made.items() if d.name != removed}
    save_checkpoint(fuse(model, never, **options), tokenizer, tmp_path / "never")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert digest(tmp_path / "rest", name) == digest(tmp_path / "never", name), name
    # And a domain taken out can be put back.
    save_checkpoint(fuse(base, deltas, **options), tokenizer, tmp_path / "again")
    assert digest(tmp_path / "again", "model.safetensors") == digest(tmp_path / "all", "model.safetensors")


def test_a_fusion_beyond_its_allowance_is_refused(model, tokenizer, deltas):
    text = tiny.documents("words", 6)
    fused = fuse(model, deltas, gated=False, by="sum")
    latent = keep_ledger(fused, tokenizer, text, window=48)["total"]["measured"]
    got = check_allowance(fused, tokenizer, text, Allowance(1.01 * latent, "latent"), window=48)
    assert got == pytest.approx(latent, rel=1e-5)
    with pytest.raises(CertificateError, match="a \\+ b \\+ c: mean latent drift"):
        check_allowance(fused, tokenizer, text, {"nats": 0.99 * latent, "metric": "latent"}, window=48)
    # A leash brings it within.
    held = fuse(model, deltas, gated=False, leash=0.9 * latent, leash_metric="latent")
    check_allowance(held, tokenizer, text, Allowance(0.99 * latent, "latent"), window=48)
    with pytest.raises(ConfigError, match="nats > 0"):
        check_allowance(fused, tokenizer, text, Allowance(0.0, "latent"), window=48)
    with pytest.raises(CertificateError, match="no fused deltas"):
        keep_ledger(model, tokenizer, text)
    with pytest.raises(ConfigError, match="nats, >= 0"):
        keep_ledger(fused, tokenizer, text, next_drift=-1.0)
    with pytest.raises(ConfigError, match="no fused deltas"):
        unfuse(model)
