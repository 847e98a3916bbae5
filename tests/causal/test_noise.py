"""Noise addressed by individual and position, and its truncation to likely causes."""

import itertools
import subprocess
import sys

import pytest
import scipy.stats
import torch
from torch.testing import assert_close

from tether.cauchy.functional import from_noise, log_prob
from tether.causal.noise import Noise, truncate
from tether.errors import CheckpointError, ConfigError, ShapeError


def places(*rows):
    return torch.tensor(rows)


def run(first, last, batch=1):
    return torch.arange(first, last).expand(batch, -1)


def test_numbers_are_uniform_and_no_two_belong_together():
    noise = Noise.draw(4, 6, seed=11).at(run(0, 500, 4)).double()
    flat = noise.flatten()
    assert scipy.stats.kstest(flat.numpy(), "uniform").pvalue > 1e-3
    # Every coordinate of every individual, at its place and at the next one: 48 series, all independent.
    series = torch.cat(
        [noise[:, :-1].permute(0, 2, 1).flatten(0, 1), noise[:, 1:].permute(0, 2, 1).flatten(0, 1)]
    )
    correlation = torch.corrcoef(series) - torch.eye(48)
    assert correlation.abs().max() < 0.25  # 5.5 standard errors of 1/sqrt(499)
    assert len(flat.unique()) > 0.999 * len(flat)


def test_seeds_next_to_each_other_are_other_individuals():
    noise = Noise.draw(2000, 3, seed=0).at(torch.zeros(2000, 1, dtype=torch.long))[:, 0].double()
    for column in noise.T:
        assert scipy.stats.kstest(column.numpy(), "uniform").pvalue > 1e-3
        assert abs(float(torch.corrcoef(torch.stack([column[1:], column[:-1]]))[0, 1])) < 0.1


@pytest.mark.parametrize("size", [1, 3, 4, 5, 576])
def test_a_part_is_the_part_of_the_whole(size):
    noise = Noise.draw(2, size, seed=5)
    whole = noise.at(run(0, 40, 2))
    for first, last in ((0, 1), (7, 8), (13, 29), (39, 40)):
        assert torch.equal(noise.at(run(first, last, 2)), whole[:, first:last])
    mixed = places([3, 3, 38, 0], [17, 4, 9, 21])
    assert torch.equal(noise.at(mixed), torch.stack([whole[row, mixed[row]] for row in range(2)]))


def test_who_else_is_in_the_batch_does_not_matter():
    noise = Noise.draw(5, 7, seed=3)
    order = [4, 0, 0, 2]
    positions = places(*[range(start, start + 6) for start in (2, 9, 0, 5)])
    together = noise.rows(order).at(positions)
    for row, individual in enumerate(order):
        alone = noise.rows(torch.tensor([individual])).at(positions[row : row + 1])
        assert torch.equal(alone[0], together[row])
    assert torch.equal(Noise.draw(1, 7, seed=7).at(run(0, 3)), noise.rows([4]).at(run(0, 3)))
    assert torch.equal(noise.rows([-1]).seeds, noise.seeds[-1:])


def test_padding_is_where_it_may_be():
    noise = Noise.draw(1, 3, seed=3)
    padded = noise.at(places([0, 0, 0, 1, 2]))
    assert torch.equal(padded[:, 2:], noise.at(run(0, 3)))
    assert torch.equal(noise.at(places([-1, -1, 0])), noise.at(places([0, 0, 0])))


def test_shared_noise_is_one_draw():
    noise = Noise.draw(2, 4, shared=True, seed=3)
    drawn = noise.at(run(5, 9, 2))
    assert torch.equal(drawn, Noise.draw(2, 4, seed=3).at(run(0, 1, 2)).expand(-1, 4, -1))
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("common", [0.2, 0.7])
def test_what_a_text_has_in_common_is_one_draw_beside_each_positions_own(common):
    places = torch.arange(40).expand(300, -1)
    own, mixed = (Noise.draw(300, 6, seed=3, common=part).at(places).double() for part in (0.0, common))
    laws = scipy.stats.kstest(mixed[:, 0].flatten().numpy(), "uniform")
    assert laws.pvalue > 1e-3
    cauchy = [torch.tan(torch.pi * (part - 0.5)) for part in (own, mixed)]
    text = (cauchy[1] - (1 - common) * cauchy[0]) / common
    # One number for all positions of a dimension of an individual, up to float32.
    middle = text.median(1, keepdim=True).values
    size = cauchy[0].abs() + cauchy[1].abs() + middle.abs() + 1
    assert bool(((text - middle).abs() < 1e-3 * size * (1 + cauchy[1].abs())).all())
    assert scipy.stats.kstest(middle.flatten().numpy(), "cauchy").pvalue > 1e-3
    noise = Noise.draw(2, 6, seed=3, common=common)
    assert torch.equal(noise.at(places[:2])[:, 7:9], noise.at(places[:2, 7:9]))


def test_numbers_end_where_float32_ends():
    class Extreme(Noise):
        def _block(self, seed, first, count):
            return torch.tensor([0.0, 1.0, 0.5]).expand(count, -1).numpy()

    drawn = Extreme.draw(1, 3, seed=0).at(run(0, 2))
    assert drawn.min() > 0
    assert drawn.max() < 1
    assert torch.isfinite(from_noise(drawn, torch.zeros(3), torch.ones(3))).all()
    assert drawn[0, 0, 0] == 1 - drawn[0, 0, 1]
    half = torch.tensor([[[1e-7, 0.5, 0.999]]]).half()
    assert torch.isfinite(from_noise(Noise.of(half).at(run(0, 1)), torch.zeros(3), torch.ones(3))).all()


def test_given_noise_comes_first_and_the_rest_is_drawn(generator):
    given = torch.rand(2, 3, 5, generator=generator)
    noise = Noise.of(given)
    later = Noise.draw(2, 5, seed=0).at(run(0, 8, 2))
    assert torch.equal(noise.at(run(0, 8, 2)), torch.cat([given, later[:, 3:]], dim=1))
    assert torch.equal(noise.at(run(2, 4, 2)), torch.cat([given, later[:, 3:]], dim=1)[:, 2:4])
    assert torch.equal(noise.rows([1, 1]).at(run(0, 3, 2)), given[[1, 1]])


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 5)])
def test_given_noise_without_positions_holds_everywhere(generator, shape):
    given = torch.rand(shape, generator=generator)
    noise = Noise.of(given)
    assert noise.shared
    assert noise.size == 5
    assert len(noise) == (1 if len(shape) == 1 else shape[0])
    assert torch.equal(noise.at(run(4, 7, len(noise))), given.reshape(-1, 1, 5).expand(-1, 3, -1))


def test_abducted_noise_keeps_its_precision():
    close = torch.tensor([[[1 - 1e-12, 1e-12, 0.3]]], dtype=torch.float64)
    assert torch.equal(Noise.of(close).at(run(0, 1)), close)
    assert Noise.of(close).at(run(0, 2)).dtype == torch.float64
    assert torch.equal(Noise.of(close).at(run(1, 2)), Noise.draw(1, 3, seed=0).at(run(1, 2)).double())


KINDS = {
    "drawn": lambda: Noise.draw(3, 5, seed=8),
    "shared": lambda: Noise.draw(3, 5, shared=True, seed=2**62),
    "in common": lambda: Noise.draw(3, 5, common=0.3, seed=8),
    "picked": lambda: Noise.draw(3, 5, seed=8).rows([2, 0, 2]),
    "known": lambda: Noise.of(torch.rand(3, 2, 5)),
    "known and shared": lambda: Noise.of(torch.rand(3, 5, dtype=torch.float64)),
    "not contiguous": lambda: Noise.of(torch.rand(5, 3).T),
}


KINDS |= {
    "speakers": lambda: Noise(
        seeds=torch.arange(3), size=5, known=torch.rand(3, 4, 5), known_speaker=torch.rand(3, 2).double()
    ),
    "speakers alone": lambda: Noise(seeds=torch.arange(3), size=5, known_speaker=torch.rand(4, 3).T),
    "a shared speaker": lambda: Noise(
        seeds=torch.arange(3), size=5, shared=True, known_speaker=torch.rand(3, 1)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_what_was_saved(kind, tmp_path):
    noise = KINDS[kind]()
    noise.save(tmp_path / "noise.safetensors")
    loaded = Noise.load(tmp_path / "noise.safetensors")
    assert (loaded.size, loaded.shared) == (noise.size, noise.shared)
    assert torch.equal(loaded.seeds, noise.seeds)
    assert torch.equal(loaded.at(run(0, 6, 3)), noise.at(run(0, 6, 3)))
    assert torch.equal(loaded.speaker(run(0, 6, 3)), noise.speaker(run(0, 6, 3)))
    assert (loaded.known_speaker is None) == (noise.known_speaker is None)
    assert [path.name for path in tmp_path.iterdir()] == ["noise.safetensors"]


def test_another_process_draws_the_same(tmp_path):
    Noise.draw(2, 3, seed=1).save(tmp_path / "noise")
    script = (
        "import torch; from tether.causal.noise import Noise;"
        f"drawn = Noise.load({str(tmp_path / 'noise')!r}).at(torch.tensor([[4], [9]]));"
        "print(*drawn.double().flatten().tolist())"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    expected = Noise.draw(2, 3, seed=1).at(places([4], [9])).double().flatten().tolist()
    assert [float(each) for each in output.split()] == expected


def test_drawing_follows_the_generator():
    first, second = (Noise.draw(3, 2, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first.seeds, second.seeds)
    assert len(Noise.draw(50, 2).seeds.unique()) == 50
    assert not torch.equal(Noise.draw(3, 2).seeds, Noise.draw(3, 2).seeds)


def test_the_speakers_number_is_uniform_and_belongs_to_nothing_else():
    steps = run(0, 4000, 3)
    noise = Noise.draw(3, 4, seed=11)
    speaker, drawn = noise.speaker(steps), noise.at(steps).double()
    assert speaker.dtype == torch.float64
    assert scipy.stats.kstest(speaker.flatten().numpy(), "uniform").pvalue > 1e-3
    # Three individuals' numbers, at their place and at the next ones, and all of their noise: independent.
    series = torch.cat([speaker[:, :-8], speaker[:, 1:-7], speaker[:, 2:-6], speaker[:, 4:-4]])
    series = torch.cat([series, drawn[:, :-8].permute(0, 2, 1).flatten(0, 1)])
    correlation = torch.corrcoef(series) - torch.eye(len(series))
    assert correlation.abs().max() < 5 / 3992**0.5
    # Nor is it one of the numbers that the noise has anywhere near.
    every = torch.cat([Noise.draw(8, size, seed=8).at(run(0, 300, 8)).flatten() for size in (1, 4, 7)])
    assert not bool(torch.isin(Noise.draw(8, 4, seed=8).speaker(run(0, 300, 8)).float(), every).any())
    assert len(noise.speaker(steps).unique()) == 12_000


def test_the_speakers_number_depends_on_individual_and_position_alone():
    noise = Noise.draw(5, 7, seed=5)
    whole = noise.speaker(run(0, 40, 5))
    assert torch.equal(Noise.draw(5, 3, seed=5).speaker(run(0, 40, 5)), whole)
    for first, last in ((0, 1), (7, 8), (13, 29), (39, 40)):
        assert torch.equal(noise.speaker(run(first, last, 5)), whole[:, first:last])
    order = [4, 0, 0, 2]
    mixed = places([3, 3, 38, 0], [17, 4, 9, 21], [1, 2, 3, 4], [39, 0, 1, 2])
    expected = torch.stack([whole[individual, at] for individual, at in zip(order, mixed, strict=True)])
    assert torch.equal(noise.rows(order).speaker(mixed), expected)
    assert torch.equal(noise.rows([3]).speaker(places([0, 0, 0, 1, 2]))[:, 2:], whole[3:4, :3])
    assert torch.equal(noise.rows([3]).speaker(places([-1, -1, 0])), whole[3:4, :1].expand(1, 3))
    assert len(whole.unique()) == whole.numel()


def test_a_shared_speaker_is_one_number():
    noise = Noise.draw(2, 4, shared=True, seed=3)
    said = noise.speaker(run(5, 9, 2))
    assert torch.equal(said, Noise.draw(2, 4, seed=3).speaker(run(0, 1, 2)).expand(-1, 4))
    assert said[0, 0] != said[1, 0]


def test_given_speakers_come_first_and_the_rest_is_drawn(generator):
    told = torch.rand(2, 3, generator=generator, dtype=torch.float64)
    told[0, 1] = 1 - 1e-12
    noise = Noise(seeds=torch.tensor([6, 7]), size=5, known_speaker=told)
    later = Noise.draw(2, 5, seed=6)
    expected = torch.cat([told, later.speaker(run(3, 8, 2))], dim=1)
    assert torch.equal(noise.speaker(run(0, 8, 2)), expected)
    assert torch.equal(noise.speaker(run(2, 4, 2)), expected[:, 2:4])
    assert torch.equal(noise.at(run(0, 8, 2)), later.at(run(0, 8, 2)))
    picked = noise.rows([1, 1, 0])
    assert torch.equal(picked.known_speaker, told[[1, 1, 0]])
    assert torch.equal(picked.speaker(run(0, 8, 3)), expected[[1, 1, 0]])
    one = Noise(seeds=torch.arange(2), size=5, shared=True, known_speaker=told[:, :1])
    assert torch.equal(one.speaker(run(3, 6, 2)), told[:, :1].expand(-1, 3))


BAD = {
    "negative seed": (lambda: Noise.draw(2, 3, seed=-1), ConfigError, "seed=-1"),
    "all in common": (lambda: Noise.draw(2, 3, common=1.0), ConfigError, "common=1.0"),
    "less than nothing in common": (lambda: Noise.draw(2, 3, common=-0.1), ConfigError, "common=-0.1"),
    "in common twice": (lambda: Noise.draw(2, 3, common=0.1, shared=True), ConfigError, "none beside it"),
    "large seed": (lambda: Noise.draw(2, 3, seed=2**63), ConfigError, "seed=9223372036854775808"),
    "nobody": (lambda: Noise.draw(0, 3, seed=1), ConfigError, "batch=0"),
    "no dimension": (lambda: Noise.draw(2, 0, seed=1), ShapeError, "size >= 1"),
    "negative seeds": (lambda: Noise(seeds=torch.tensor([3, -2]), size=3), ConfigError, "seed of -2"),
    "seeds in rows": (lambda: Noise(seeds=torch.tensor([[3]]), size=3), ShapeError, "expected shape"),
    "broken seeds": (lambda: Noise(seeds=torch.tensor([0.5]), size=3), ShapeError, "int64"),
    "zero": (lambda: Noise.of(torch.tensor([0.0, 0.5])), ConfigError, "open interval"),
    "one": (lambda: Noise.of(torch.tensor([0.5, 1.0])), ConfigError, "open interval"),
    "nan": (lambda: Noise.of(torch.tensor([0.5, torch.nan])), ConfigError, "open interval"),
    "whole numbers": (lambda: Noise.of(torch.tensor([1, 2])), ShapeError, "floating point"),
    "a list": (lambda: Noise.of([0.5, 0.5]), ShapeError, "list"),
    "a scalar": (lambda: Noise.of(torch.tensor(0.5)), ShapeError, r"\(B, P, C\)"),
    "four dimensions": (lambda: Noise.of(torch.rand(1, 1, 1, 1)), ShapeError, r"\(B, P, C\)"),
    "no position": (lambda: Noise.of(torch.rand(2, 0, 3)), ShapeError, "known noise"),
    "known of others": (
        lambda: Noise(seeds=torch.arange(2), size=3, known=torch.rand(3, 1, 3)),
        ShapeError,
        r"\(2, 1, 3\)",
    ),
    "known of another size": (
        lambda: Noise(seeds=torch.arange(2), size=3, known=torch.rand(2, 1, 4)),
        ShapeError,
        r"\(2, 1, 3\)",
    ),
    "shared at two places": (
        lambda: Noise(seeds=torch.arange(2), size=3, shared=True, known=torch.rand(2, 2, 3)),
        ShapeError,
        r"\(2, 1, 3\)",
    ),
    "known flat": (lambda: Noise(seeds=torch.arange(2), size=3, known=torch.rand(3)), ShapeError, "known"),
    "another batch": (lambda: Noise.draw(2, 3, seed=1).at(run(0, 4, 3)), ShapeError, "2 individuals"),
    "speakers of others": (
        lambda: Noise(seeds=torch.arange(2), size=3, known_speaker=torch.rand(3, 1)),
        ShapeError,
        r"\(2, 1\)",
    ),
    "speakers flat": (
        lambda: Noise(seeds=torch.arange(2), size=3, known_speaker=torch.rand(2)),
        ShapeError,
        "known speakers",
    ),
    "shared speakers at two places": (
        lambda: Noise(seeds=torch.arange(2), size=3, shared=True, known_speaker=torch.rand(2, 2)),
        ShapeError,
        r"\(2, 1\)",
    ),
    "a speaker of 0": (
        lambda: Noise(seeds=torch.arange(2), size=3, known_speaker=torch.zeros(2, 1)),
        ConfigError,
        "open interval",
    ),
    "a speaker of 1": (
        lambda: Noise(seeds=torch.arange(2), size=3, known_speaker=torch.ones(2, 1)),
        ConfigError,
        "open interval",
    ),
    "whole speakers": (
        lambda: Noise(seeds=torch.arange(2), size=3, known_speaker=torch.ones(2, 1).long()),
        ShapeError,
        "floating point",
    ),
    "speakers of another batch": (
        lambda: Noise.draw(2, 3, seed=1).speaker(run(0, 4, 3)),
        ShapeError,
        "individuals",
    ),
    "no such row": (lambda: Noise.draw(2, 3, seed=1).rows([0, 2]), ShapeError, r"rows \[0, 2\]"),
    "no such file": (lambda: Noise.load("absent.safetensors"), CheckpointError, "absent"),
    "share above 1": (lambda: truncate(torch.rand(3), 1.5), ConfigError, "1.5"),
    "share below 0": (lambda: truncate(torch.rand(3), -0.1), ConfigError, "-0.1"),
    "share nan": (lambda: truncate(torch.rand(3), float("nan")), ConfigError, "nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    make, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        make()


def test_other_files_are_no_noise(tmp_path):
    from safetensors.torch import save_file

    save_file({"seeds": torch.arange(2)}, tmp_path / "model.safetensors")
    (tmp_path / "text").write_text("not a tensor in sight")
    for name, message in (("model.safetensors", "written by Noise.save"), ("text", "text")):
        with pytest.raises(CheckpointError, match=message):
            Noise.load(tmp_path / name)


@pytest.mark.parametrize("share", [1e-12, 1e-3, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truncation_keeps_the_likely_part(share, dtype):
    noise = torch.cat([torch.tensor([2.0**-24, 1 - 2.0**-24]), torch.linspace(0.001, 0.999, 999)]).to(dtype)
    kept = truncate(noise, share)
    assert kept.dtype == dtype
    loc, scale = torch.tensor(3.0, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    drawn = from_noise(kept.double(), loc, scale)
    density = log_prob(drawn, loc, scale) - log_prob(loc, loc, scale)
    assert density.exp().min() >= share * (1 - 1e-6)
    if share < 1:
        # The ends reach the least likely cause that is kept, on both sides; nothing more is cut off.
        end = scale * (1 / share - 1) ** 0.5
        tolerance = {"rtol": 0.25 if share < 1e-6 else 1e-3, "atol": 0.0}
        assert_close(drawn[:2] - loc, torch.stack([-end, end]), **tolerance)
    ordered = kept[2:]
    assert (ordered.diff() >= 0).all()
    assert share == 1 or (ordered.diff() > 0).all()
    assert_close(kept[2 + 499].double(), torch.tensor(0.5, dtype=torch.float64), rtol=0, atol=1e-7)


def test_truncated_draws_have_the_restricted_law():
    noise = Noise.draw(1, 4, seed=2).at(run(0, 2000)).double().flatten()
    drawn = from_noise(truncate(noise, 0.2), torch.tensor(0.0).double(), torch.tensor(1.0).double())
    cut = scipy.stats.cauchy.cdf(2.0)  # density 1/5 of the peak at |t| = 2
    law = lambda t: (scipy.stats.cauchy.cdf(t) - (1 - cut)) / (2 * cut - 1)  # noqa: E731
    assert scipy.stats.kstest(drawn.numpy(), law).pvalue > 1e-3


def test_the_ends_of_truncation_are_all_and_the_median():
    noise = torch.rand(4, 5)
    assert torch.equal(truncate(noise, 0.0), noise)
    assert torch.equal(truncate(noise, 1.0), torch.full((4, 5), 0.5))
    spread = [float((truncate(noise, share) - 0.5).abs().max()) for share in (0.0, 0.01, 0.3, 0.7, 1.0)]
    assert all(wide > narrow for wide, narrow in itertools.pairwise(spread))
