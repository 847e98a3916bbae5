"""Fit a one-class gate to a domain's own cached states: no base text, no other domain."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.causal.fused import Fusion
from tether.causal.gates import GateStatistics, gate_distance, gate_stage, window_mean
from tether.delta.cache import BATCH, StateCache
from tether.delta.source import spread
from tether.delta.stage import fit_stage
from tether.errors import ConfigError

__all__ = ["WINDOW", "Gate", "describe_gates", "fit_gate", "gate_faults", "put_gate", "take_gate"]

WINDOW = 32
RANK = 64
QUANTILE = 0.95
STRAY = 0.02
"""Share of what the base writes of itself that a gate may take for its own at the start of a text, beyond the
share that it takes once its window is full."""
CONTEXTS = 32_768
"""Contexts of a stage that its statistics are taken from, spread over the text."""
LEAST = 0.85
"""Share of a domain's own contexts with full windows that a gate accepts whatever the base writes."""
ROUNDING = 1e-5
"""Relative rounding of the squares that a distance is the difference of."""
CLOSED = -1.0
"""A threshold that no squared distance is under."""
EARLY = 8
"""Without a background: tokens of a text before a gate may open (docs/log.md)."""
FOLDS = 4
"""Parts that documents are dealt to; distances of one are measured by statistics of the others."""


class Gate(NamedTuple):
    """What a gate consists of; see `tether.causal.gates`.

    Attributes:
        center: mean of the domain's window means at each stage, shape (S, H), or (H,) for one stage.
        whitening: principal directions over their standard deviations, shape (S, P, H), or (P, H).
        threshold: largest accepted squared distance for each count of tokens, shape (window,).
        precision: one over the variance in all other directions, shape (S,); 0 leaves them out.
    """

    center: Tensor
    whitening: Tensor
    threshold: Tensor
    precision: Tensor = torch.zeros(1)


def fit_gate(
    cache: StateCache,
    *,
    window: int = WINDOW,
    rank: int = RANK,
    quantile: float = QUANTILE,
    background: Tensor | None = None,
    early: int = EARLY,
) -> Gate:
    """Learn what a domain's windows look like, from the first token of a text on.

    Each stage of a window (1, 2, 3-4, 5-8, ... tokens, full) has statistics of its own. A few documents say
    little about hundreds of directions, so their covariance is drawn towards one variance for all, as far as
    makes documents left out of the fit likeliest. The accepted distance is the given quantile, with one
    document more counted beyond it, of the distances that contexts have under statistics fitted without their
    own documents; the gate's own statistics are those of all documents.

    The means of few tokens are alike in many domains. So at the stages before the last, a gate opens only as
    far as it leaves what the base writes of itself alone: see `tether.delta.background` and `STRAY`. At the last
    stage it gives up own contexts for that only down to the share `LEAST`; what it takes even so is taken for
    the domain's own kind, and may be taken at the other stages too.

    Args:
        cache: states of the domain's text.
        window: tokens averaged, >= 1.
        rank: principal directions kept, clipped to what the text supports.
        quantile: share of the domain's own contexts to accept, in (0, 1).
        background: states of what the base writes, shape (B, T, H); None keeps the gate closed for `early`
            tokens instead.
        early: tokens of a text before the gate may open without a background, clipped to the window.

    Returns:
        The gate, float32.

    Raises:
        ConfigError: fewer than 4 documents or windows, or a quantile outside (0, 1).

    Reference:
        Ledoit and Wolf 2004, A well-conditioned estimator for large-dimensional covariance matrices, eq. 2,
        with the weight chosen by left-out likelihood; Vovk et al. 2005, Algorithmic Learning in a Random
        World (the document counted beyond the quantile).
    """
    if not 0 < quantile < 1:
        raise ConfigError(f"quantile={quantile}: expected a share between 0 and 1")
    stages = int(gate_stage(torch.tensor([max(window - 1.0, 1.0)]), window + 1, 64)) + 2 if window > 1 else 1
    of_count = gate_stage(torch.arange(1.0, window + 1), window, stages)
    contexts = _Contexts(cache, window)
    documents = int(contexts.group.max()) + 1
    level = min(1.0, quantile * (1 + 1 / documents))
    limits, least = torch.full((stages,), CLOSED), CLOSED
    known: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for number in range(stages):
        row, time = contexts.some((of_count == number).nonzero().squeeze(-1) + 1, CONTEXTS)
        fold = contexts.group[row] % FOLDS
        if len(fold.unique()) > 1 and len(fold) - int(fold.bincount().max()) > 2:
            known[number], own = fit_stage(contexts.means(row, time), fold, min(rank, contexts.width))
            limits[number] = own.kthvalue(math.ceil(level * len(own))).values
            least = float(own.kthvalue(math.ceil(min(quantile, LEAST) * len(own))).values)
    # A stage that the text does not reach takes the statistics of the nearest later one, or of the last it has.
    sources = (next((k for k in known if k >= number), max(known)) for number in range(stages))
    fitted = [torch.stack(values) for values in zip(*(known[k] for k in sources), strict=True)]
    if background is not None:
        mask = torch.ones(background.shape[:2], dtype=torch.bool)
        strange, seen, _ = window_mean(background, mask, window)
        statistics = GateStatistics.of(*(values.unsqueeze(0) for values in fitted))
        other = gate_distance(strange, seen, window, statistics)[0].flatten()
        other_stage = gate_stage(seen, window, stages).flatten()
        full, taken = other[other_stage == stages - 1], 0.0
        if len(full) and stages - 1 in known:
            limits[-1] = limits[-1].clamp(max=float(full.quantile(STRAY))).clamp(min=least)
            taken = float((full <= limits[-1]).float().mean())
        for number in range(stages - 1):
            near = other[other_stage == number]
            if len(near):
                allowed = (
                    near.sort().values[int((taken + STRAY) * len(near))] if taken + STRAY < 1 else near.max()
                )
                limits[number] = torch.minimum(limits[number], allowed)
    # A gate's distances are differences of squares in single precision; text that always begins alike has none.
    limits += torch.where(limits < 0, 0, ROUNDING * fitted[2] * fitted[0].square().sum(-1))
    threshold = limits[of_count]
    if background is None:
        threshold[: min(early, window) - 1] = CLOSED
    return Gate(fitted[0], fitted[1], threshold, fitted[2])


def check_windows(count: int) -> None:
    """Refuse a domain text that is too short for a gate; to be asked before the long part.

    Args:
        count: windows of the text.

    Raises:
        ConfigError: fewer than a gate is fitted on.
    """
    if count < FOLDS:
        raise ConfigError(
            f"{count} windows: a gate needs at least {FOLDS} windows of domain text; give more text"
        )


class _Contexts:
    """The contexts of a text, windows in the order in which they are batched, each from its first token on.

    Of none of them anything is held until its mean is asked for: all means of a long text are larger than the text's
    states on disk.
    """

    def __init__(self, cache: StateCache, window: int) -> None:
        self.cache, self.window = cache, window
        self.width = cache.states.shape[1] // (1 + len(cache.layers))
        windows = cache.windows
        first = windows.starts[:-1]
        self.group = torch.unique(windows.documents[first], return_inverse=True)[1]
        if int(self.group.max()) + 1 < FOLDS:
            # A text in one document still has windows; they then play the documents' part.
            self.group = torch.arange(len(first))
        check_windows(len(self.group))
        self.lengths = windows.starts.diff()
        self.order = self.lengths.argsort(descending=True, stable=True)

    # Windows and places in them of contexts that hold so many tokens, spread over the text.
    def some(self, counts: Tensor, most: int) -> tuple[Tensor, Tensor]:
        begin, last = int(counts.min()) - 1, int(counts.max())
        lengths = self.lengths[self.order]
        ends = lengths if last == self.window else lengths.clamp(max=last)
        here = (ends - begin).clamp(min=0).cumsum(0)
        chosen = spread(int(here[-1]), most)
        at = torch.searchsorted(here, chosen, right=True)
        before = torch.cat([torch.zeros(1, dtype=torch.int64), here])[at]
        return self.order[at], begin + chosen - before

    # The mean hidden state of the tokens up to each context, at most `window` of them.
    def means(self, row: Tensor, time: Tensor) -> Tensor:
        found = torch.empty(len(row), self.width)
        starts = self.cache.windows.starts
        same, count = torch.unique_consecutive(row, return_counts=True)
        edges = torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)])
        for first in range(0, len(same), BATCH):
            rows, counts = same[first : first + BATCH], count[first : first + BATCH]
            own = edges[first : first + len(rows) + 1]
            part = slice(int(own[0]), int(own[-1]))
            # Of a window only the tokens that some mean holds are read.
            begin, end = (time[own[:-1]] - self.window + 1).clamp(min=0), time[own[1:] - 1] + 1
            place = begin.unsqueeze(-1) + torch.arange(int((end - begin).max()))
            mask = place < end.unsqueeze(-1)
            states = torch.zeros(*mask.shape, self.width)
            positions = (starts[rows].unsqueeze(-1) + place)[mask]
            states[mask] = self.cache.states[positions][:, : self.width].float()
            mean = window_mean(states, mask, self.window)[0]
            of = torch.arange(len(rows)).repeat_interleave(counts)
            found[part] = mean[of, time[part] - begin[of]]
        return found


def describe_gates(gates: Sequence[Gate]) -> dict[str, Any]:
    """Give the sizes of a fusion's gates, for its description.

    Args:
        gates: of its domains.

    Returns:
        gate_window, gate_rank and gate_stages, which fit them all.
    """
    return {
        "gate_window": max(len(gate.threshold) for gate in gates),
        "gate_rank": max(gate.whitening.shape[-2] for gate in gates),
        "gate_stages": max(1 if gate.center.dim() == 1 else len(gate.center) for gate in gates),
    }


def gate_faults(gate: Gate) -> str | None:
    """Tell what is wrong with a gate that was read from a file.

    Args:
        gate: its tensors.

    Returns:
        What does not fit together, or None.
    """
    shapes = {name: tuple(values.shape) for name, values in gate._asdict().items()}
    center, whitening, threshold = (shapes[name] for name in ("center", "whitening", "threshold"))
    fits = (
        len(center) in (1, 2)
        and len(whitening) == len(center) + 1
        and (*whitening[:-2], whitening[-1]) == center
        and len(threshold) == 1
        and shapes["precision"] == (center[:-1] or (1,))
    )
    if not fits or 0 in (*center, *whitening, *threshold):
        return f"its gate's tensors have the shapes {shapes}"
    odd = [name for name, values in gate._asdict().items() if not values.is_floating_point()]
    odd += [name for name, values in gate._asdict().items() if name not in odd and bool(values.isnan().any())]
    return f"its gate's {', '.join(odd)} holds no numbers" if odd else None


@torch.no_grad()
def put_gate(fusion: Fusion, row: int, gate: Gate, owner: str) -> None:
    """Write a gate into a fusion; lower rank is padded with zero rows, one stage is repeated.

    Args:
        fusion: a gated fusion, or a module with the same parameters.
        row: of the domain.
        gate: its gate.
        owner: what to call it in an error.

    Raises:
        ConfigError: the gate averages another number of tokens than the fusion.
    """
    if len(gate.threshold) != fusion.window:
        raise ConfigError(
            f"{owner} has a gate over {len(gate.threshold)} tokens, another one over {fusion.window}: learn them "
            "with the same gate window"
        )
    one = gate.center.dim() == 1
    fusion.gate_center[row] = gate.center.unsqueeze(0) if one else gate.center
    fusion.gate_whitening[row, :, : gate.whitening.shape[-2]] = (
        gate.whitening.unsqueeze(0) if one else gate.whitening
    )
    fusion.gate_precision[row] = gate.precision
    fusion.gate_threshold[row] = gate.threshold


def take_gate(fusion: Fusion, row: int) -> Gate:
    """Read a gate out of a fusion.

    Args:
        fusion: a gated fusion.
        row: of the domain.

    Returns:
        The gate; padding of its rank is cut off.
    """
    whitening = fusion.gate_whitening[row].detach().cpu()
    rank = max(1, int(whitening.any(-1).sum(-1).max()))
    return Gate(
        fusion.gate_center[row].detach().cpu().clone(),
        whitening[:, :rank].clone(),
        fusion.gate_threshold[row].detach().cpu().clone(),
        fusion.gate_precision[row].detach().cpu().clone(),
    )
