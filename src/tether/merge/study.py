"""Is an encoding independent of the longest path? phi at several len_max on common paths, claim by claim."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from tether.errors import ConfigError
from tether.merge.encoding import token_losses
from tether.merge.packing import pack_sample, spread
from tether.merge.paths import PathBank
from tether.merge.recorder import Recorder
from tether.merge.towers import FAMILIES
from tether.merge.verdicts import LengthRow, LengthStudy, judge
from tether.merge.weighting import GAMMA, WEIGHTINGS, path_weights

__all__ = ["common_lengths", "study_lengths"]

COMPONENTS: Final = ("activation", "paper_gradient", "loss")


def common_lengths(bank: PathBank, longest: int, shortest: int, uniform: Tensor) -> Tensor:
    """Cut common paths to ``len_k ~ U[shortest, longest]``, with the same draw of the path for every len_max.

    Args:
        bank: paths as long as the largest len_max, or ended by the model.
        longest: len_max.
        shortest: len_min.
        uniform: a number in [0, 1) a path, shape (N, K).

    Returns:
        Lengths, shape (N, K).
    """
    return (shortest + (uniform * (longest - shortest + 1)).long()).minimum(bank.lengths)


def study_lengths(
    model: Any,
    bank: PathBank,
    *,
    lengths: Sequence[int] = (8, 16, 32, 64),
    shortest: int = 4,
    families: Sequence[str] = FAMILIES,
    gamma: float | None = None,
    seed: int = 0,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> LengthStudy:
    """Measure how far phi moves with len_max under every weighting, on the same paths cut to other lengths.

    Args:
        model: in evaluation mode.
        bank: sampled with ``shortest = longest = max(lengths)`` and at least 4 paths.
        lengths: values of len_max, ascending.
        shortest: len_min.
        families: whose neurons.
        gamma: discount of the position weighting; None takes its own.
        seed: of the lengths.
        on_step: called with `done` and `total` samples.

    Returns:
        The table and a verdict a claim.

    Raises:
        ConfigError: lengths that are not ascending, fewer than 2, below `shortest` or longer than the bank's
            paths, or fewer than 4 paths.

    Reference:
        LAPE, theorem and proof, steps 1 to 4.
    """
    count, paths, available = bank.tokens.shape
    if (
        len(lengths) < 2 or list(lengths) != sorted(set(lengths)) or lengths[0] < shortest or lengths[-1] > available
        or paths < 4
    ):  # fmt: skip
        raise ConfigError(
            f"lengths={list(lengths)}, shortest={shortest}, paths of {available} tokens, {paths} a sample: expected "
            "at least two ascending lengths between them, and at least 4 paths"
        )
    uniform = torch.rand(count, paths, generator=torch.Generator().manual_seed(seed))
    cut = [common_lengths(bank, longest, shortest, uniform) for longest in lengths]
    quarter = paths // 4
    parts = {"half 1": slice(0, 2 * quarter), "half 2": slice(2 * quarter, 4 * quarter)}
    parts |= {"quarter 1": slice(0, quarter), "quarter 2": slice(quarter, 2 * quarter)}
    # Each case is a length and the paths that take part.
    cases = [(str(longest), of, slice(0, paths)) for longest, of in zip(lengths, cut, strict=True)]
    cases += [(name, cut[-1], part) for name, part in parts.items()]
    sums = _Sums(bank, cases, gamma)
    for sample in range(count):
        _add_sample(model, bank, sample, cases, families, sums)
        if on_step:
            on_step({"done": sample + 1.0, "total": float(count)})
    rows = tuple(sums.row(form, component, lengths) for form in WEIGHTINGS for component in COMPONENTS)
    literal = [path_weights(bank.log_prob, of, "paper") for of in cut]
    time = torch.arange(available)
    joint = [torch.where(time < of.unsqueeze(-1), bank.log_prob, 0).double().sum(-1) for of in cut]
    logs = [log + (of - 1) * math.log(GAMMA["paper"]) for log, of in zip(joint, cut, strict=True)]
    smallest = math.log(torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps)
    study = LengthStudy(
        lengths=tuple(lengths),
        rows=rows,
        claims=(),
        effective=tuple(float(weights.effective.mean()) for weights in literal),
        underflow=tuple(float((log < smallest).double().mean()) for log in logs),
        paths=paths,
        samples=count,
        neurons=sums.neurons,
    )
    return study._replace(claims=judge(study))


class _Sums:
    """Means over samples of phi by form, case and component; document's sums by their logarithms."""

    def __init__(
        self, bank: PathBank, cases: Sequence[tuple[str, Tensor, slice]], gamma: float | None
    ) -> None:
        self.weights = {
            (form, name): path_weights(
                bank.log_prob[:, part], of[:, part], form, gamma if form == "position" else None
            )
            for form in WEIGHTINGS
            for name, of, part in cases
        }
        # The largest mass of a form over its cases is the unit, so that the sums stay in range.
        self._unit = {
            form: max(float(self.weights[form, name].log_mass.max()) for name, *_ in cases)
            for form in WEIGHTINGS
        }
        self._found: dict[tuple[str, str, str], Tensor] = {}
        self._samples = len(bank.probes)
        self.neurons = 0

    def add(self, form: str, case: str, component: str, sample: int, value: Tensor) -> None:
        mass = math.exp(float(self.weights[form, case].log_mass[sample]) - self._unit[form]) / self._samples
        key = form, case, component
        self._found[key] = self._found.get(key, torch.zeros_like(value)) + mass * value

    def row(self, form: str, component: str, lengths: Sequence[int]) -> LengthRow:
        phi = {case: self._found[form, case, component] for f, case in self.weights if f == form}
        last = phi[str(lengths[-1])]
        size = float(last.norm())
        change = tuple(float((phi[str(longest)] - last).norm()) / size for longest in lengths[:-1])
        noise = float((phi["half 1"] - phi["half 2"]).norm()) / size
        apart = [(phi[f"{part} 1"] - phi[f"{part} 2"]).abs().median() for part in ("quarter", "half")]
        rate = float(apart[0] / apart[1])
        return LengthRow(form, component, change, float(phi[str(lengths[0])].norm()) / size, noise, rate)


def _add_sample(
    model: Any,
    bank: PathBank,
    sample: int,
    cases: Sequence[tuple[str, Tensor, slice]],
    families: Sequence[str],
    sums: _Sums,
) -> None:
    pack = pack_sample(bank, sample, model)
    paths, longest = bank.tokens.shape[1:]
    device = pack.path.device
    # One row of position weights a form and case; forms other than `position` are needed by path for the
    # document's gradient, so each case also has a row a path.
    grid = []
    for form in WEIGHTINGS:
        for name, _, part in cases:
            full = torch.zeros(paths, longest, dtype=torch.float64)
            full[part] = sums.weights[form, name].weights[sample]
            grid.append(full)
    time = torch.arange(longest)
    by_path = []
    for _, of, _ in cases[: len(cases) - 4]:
        length = of[sample].unsqueeze(-1)
        one = ((time < length) / length).double()
        by_path.append(torch.eye(paths, dtype=torch.float64).unsqueeze(-1) * one)
    rows = spread(pack, torch.cat([torch.stack(grid), torch.cat(by_path)]).to(device)).float()
    with Recorder(model, families, lambda y, x: rows @ y) as recorder:
        token_loss = token_losses(model, pack, gradients=False)
    values = torch.cat(list(recorder.forward.values()), dim=-1).double().cpu()
    sums.neurons = values.shape[1]
    losses = (rows[:, pack.blocks] @ token_loss).double().cpu().unsqueeze(-1)
    split = len(WEIGHTINGS) * len(cases)
    means = values[split:].reshape(-1, paths, values.shape[1])  # (lengths, K, neurons)
    row = 0
    for form in WEIGHTINGS:
        for case, (name, _, part) in enumerate(cases):
            share = sums.weights[form, name].weights[sample].sum(-1)
            activation = means[min(case, len(means) - 1), part]
            gradient = share @ (activation * (activation - activation.mean(0)))
            for component, value in zip(COMPONENTS, (values[row], gradient, losses[row]), strict=True):
                sums.add(form, name, component, sample, value)
            row += 1
