"""Fuse deltas into a model that shares its base's weights, and take a fusion apart again."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from tether.cauchy.charts import NATIVE
from tether.causal.evidence import Rule
from tether.causal.fingerprint import fingerprint
from tether.causal.fused import Fusion
from tether.causal.leash import check_leash
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.quantising import refuse_packed
from tether.causal.routed import make_fusion
from tether.delta.cache import latent_print
from tether.delta.carried import declared_drift
from tether.delta.delta import Delta
from tether.delta.gate import describe_gates, put_gate, take_gate
from tether.errors import CheckpointError, ConfigError

__all__ = ["BY", "fuse", "manner", "unfuse"]


BY = ("evidence", "sum")
"""Experts weighted by evidence, or moves added in a chart."""


def fuse(
    model: CausalQwenForCausalLM,
    deltas: Mapping[Delta, float],
    *,
    by: str | None = None,
    rule: Rule | None = None,
    chart: str | None = None,
    gated: bool | None = None,
    gate: str | None = None,
    leash: float | None = None,
    leash_metric: str = "softmax",
    allowance: Mapping[str, Any] | None = None,
) -> CausalQwenForCausalLM:
    """Combine deltas in a model.

    By `evidence` the base and each delta alone, at the strengths that its file names, are experts, weighted by how
    well they predicted the text so far (`tether.causal.evidence`). By `sum` the deltas' moves are added, as the source
    document does. The result shares backbone, abduction and action with `model`: nothing is copied but the deltas.

    Args:
        model: the base, without a fusion.
        deltas: each delta's weight, finite, any sign. In a sum it multiplies the move; by evidence it multiplies the
            strengths, and is not 0.
        by: `evidence` or `sum`; None takes evidence, or a sum where an option of sums is given (chart, gate, leash).
        rule: prior, restarts and floor of evidence; None takes the defaults.
        chart: of a sum, the chart in which they are added: `linear`, `symmetric`, `geodesic`, `rootkl`; or `matrix`,
            for deltas that are matrices: the sum is then the base with the weighted matrices added to its two heads.
            None takes `matrix` where all deltas are matrices, else `symmetric`.
        gated: whether each delta acts only where its gate is open (by evidence: sleeps elsewhere); None gates when
            every delta has a gate.
        gate: of a sum, `one-class`, or `softmax`, which shares a context among the open gates; see
            `tether.causal.gates.GATES`.
        leash: largest drift allowed in any context, nats, > 0; contexts beyond it are pulled back when the
            model runs (`tether.causal.leash`). None lets them drift.
        leash_metric: what the leash is in: `softmax`, KL(base || fused) of the softmax, or `latent`, the
            drift of U.
        allowance: mean drift that this fusion may have, which later additions are checked against: nats and
            metric, see `tether.delta.ledger`.

    Returns:
        The fused model, in evaluation mode.

    Raises:
        ConfigError: no deltas, an unknown chart or leash, chart `matrix` with deltas of another, a weight that is not
            finite, two deltas of one name, a gate asked for and missing, or a model that is fused already.
        CheckpointError: a delta was learnt on another base, or says so.
        IdentityError: the model's weights are not those that its config names: they are hashed
            (`tether.causal.fingerprint.fingerprint`), and deltas are held against what is found.
    """  # noqa: DOC502 - raised by fingerprint
    refuse_packed(model, "fusing deltas")
    by = manner(by, rule, {"chart": chart, "gate": gate, "leash": leash})
    chart, gate = _sum_chart(chart, deltas), gate or "one-class"
    if leash is not None:
        check_leash(leash, leash_metric)
    if not deltas:
        raise ConfigError("no deltas: expected at least one delta to fuse")
    if model.fusion is not None:
        raise ConfigError(
            f"the model is fused already ({', '.join(model.fusion.domains)}): take it apart with unfuse and fuse all "
            "deltas at once into the base"
        )
    for delta, weight in deltas.items():
        if not abs(weight) <= torch.finfo(torch.float32).max:
            raise ConfigError(f"weight of {delta.name!r} is {weight}: expected a finite number of 32 bits")
        if by == "evidence" and weight == 0:
            raise ConfigError(
                f"weight of {delta.name!r} is 0: by evidence it multiplies strengths; leave the delta out"
            )
    names = [delta.name for delta in deltas]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"deltas named {', '.join(names)}: expected distinct names; rename one at 'tether learn'"
        )
    own = fingerprint(model)
    foreign = [delta for delta in deltas if delta.base != own]
    if foreign:
        raise CheckpointError(
            "\n".join(
                f"delta {delta.name!r} was learnt on base {delta.base[:19]}..., the model given is "
                f"{own[:19]}...: learn it again on this base, or name the other base"
                for delta in foreign
            )
        )
    _check_widths(model, deltas)
    latent = latent_print(model)
    moved = [delta.name for delta in deltas if delta.record.get("latent", latent) != latent]
    if moved:
        raise CheckpointError(
            f"{', '.join(moved)}: learnt on the same backbone with another latent (scale, location or axes of U, which "
            "convert --calibrate, --preset and training change), in whose units it moves: learn it again on this base"
        )
    ungated = [delta.name for delta in deltas if delta.gate is None]
    if gated and ungated:
        raise ConfigError(
            f"{', '.join(ungated)}: no gate in the delta; learn it with a gate, or fuse without gates"
        )
    gated = not ungated if gated is None else gated
    config = copy.deepcopy(model.config)
    config.fusion = _describe(deltas, chart, gated)
    if by == "evidence":
        config.fusion = _by_evidence(config.fusion, deltas, rule or Rule())
    else:
        if gated:
            config.fusion["gate"] = gate
        config.fusion["leash"] = None if leash is None else {"nats": float(leash), "metric": leash_metric}
    config.fusion["allowance"] = None if allowance is None else dict(allowance)
    with torch.device("meta"):
        fused = CausalQwenForCausalLM(config)
    for name in ("backbone", "numeric", "abduction", "action"):
        setattr(fused, name, getattr(model, name))
    head = model.abduction.loc
    fused.fusion = _stack(list(deltas), make_fusion(head.in_features, head.out_features, config.fusion)).to(
        head.weight.device
    )
    fused.generation_config = copy.deepcopy(model.generation_config)
    # It stands in no folder yet: a certificate of it must not name the base's.
    fused.name_or_path = config._name_or_path = ""
    fused.eval()
    return fused


def manner(by: str | None, rule: Rule | None, of_sums: Mapping[str, Any]) -> str:
    """Find out whether a fusion is by evidence or a sum.

    Args:
        by: what was asked for, or None.
        rule: of evidence, or None.
        of_sums: options of sums by name, None where not given.

    Returns:
        One of `BY`.

    Raises:
        ConfigError: an unknown manner, or options of the other one.
    """
    given = [name for name, value in of_sums.items() if value is not None]
    by = by or ("sum" if given else "evidence")
    if by not in BY:
        raise ConfigError(f"by={by!r}: expected one of {', '.join(BY)}")
    if by == "evidence" and given:
        raise ConfigError(
            f"{', '.join(given)} with by='evidence': options of sums; leave them out, or by='sum'"
        )
    if by == "sum" and rule is not None:
        raise ConfigError("a rule of evidence with a sum: leave it out, or the options of sums")
    return by


def _by_evidence(described: dict[str, Any], deltas: Mapping[Delta, float], rule: Rule) -> dict[str, Any]:
    described = {key: value for key, value in described.items() if key != "chart"}
    return described | {
        "by": "evidence",
        "strengths": [list(delta.strengths) for delta in deltas],
        **rule.described(),
    }


def _check_widths(model: Any, deltas: Mapping[Delta, float]) -> None:
    size, latent = model.abduction.loc.in_features, model.abduction.loc.out_features
    for delta in deltas:
        expected = (latent, size * (1 + len(delta.layers)))
        if tuple(delta.second.shape) != expected:
            raise CheckpointError(
                f"delta {delta.name!r}: its heads have the shape {tuple(delta.second.shape)}, expected {expected} for "
                "this base; the file is damaged, learn it again"
            )
        if delta.gate is not None and delta.gate.center.shape[-1] != size:
            raise CheckpointError(
                f"delta {delta.name!r}: its gate reads states of width {delta.gate.center.shape[-1]}, the base has "
                f"{size}; the file is damaged, learn it again"
            )


# Deltas that are matrices are added as the source document adds them, unless another chart is asked for.
def _sum_chart(chart: str | None, deltas: Iterable[Delta]) -> str:
    others = [f"{delta.name!r} ({delta.chart})" for delta in deltas if delta.chart != "matrix"]
    if chart is None:
        return "symmetric" if others else "matrix"
    if chart not in NATIVE:
        raise ConfigError(f"chart={chart!r}: expected one of {', '.join(NATIVE)}")
    if chart == "matrix" and others:
        raise ConfigError(
            f"chart 'matrix' with {', '.join(others)}: expected matrices alone; learn them with chart='matrix', or, of "
            "chart 'linear' and a base whose scale is the same in every context, add them in 'linear', the same there"
        )
    return chart


def _describe(deltas: Mapping[Delta, float], chart: str, gated: bool) -> dict[str, Any]:
    gates = [delta.gate for delta in deltas if delta.gate is not None and gated]
    described: dict[str, Any] = {
        "chart": chart,
        "gated": gated,
        "domains": [delta.name for delta in deltas],
        "native": [delta.chart for delta in deltas],
        "weights": [float(weight) for weight in deltas.values()],
        # In the curved charts a second coordinate alone moves the scale too.
        "location_only": all(d.first is None and d.chart not in ("geodesic", "rootkl") for d in deltas),
        "layers": sorted({layer for delta in deltas for layer in delta.layers}),
        "budgets": [declared_drift(delta.record) for delta in deltas],
    }
    if gates:
        described |= describe_gates(gates)
    return described


@torch.no_grad()
def _stack(deltas: list[Delta], fusion: Fusion) -> Fusion:
    # A gate of lower rank is padded with zero directions, which measure nothing.
    for row, delta in enumerate(deltas):
        size = fusion.hidden_size
        expected = (fusion.second.shape[1], size * (1 + len(delta.layers)))
        if delta.second.shape != expected:
            raise CheckpointError(
                f"delta {delta.name!r} is {tuple(delta.second.shape)}, the base takes {expected}"
            )
        # Columns of layers that this delta does not read stay zero.
        blocks = [0, *(1 + fusion.layers.index(layer) for layer in delta.layers)]
        columns = torch.cat([torch.arange(size) + size * block for block in blocks])
        fusion.second[row][:, columns] = delta.second.to(fusion.second.dtype)
        if not fusion.location_only and delta.first is not None:
            fusion.first[row][:, columns] = delta.first.to(fusion.first.dtype)
        if fusion.gated and delta.gate is not None:
            put_gate(fusion, row, delta.gate, f"delta {delta.name!r}")
    return fusion


def unfuse(
    model: CausalQwenForCausalLM,
) -> tuple[CausalQwenForCausalLM, dict[Delta, float]]:
    """Take a fused model apart: its base, and the deltas with their weights.

    What `fuse` makes of some of them is bit for bit what it makes of the delta files, so a domain is removed by
    leaving it out. Nothing is copied but the deltas.

    Args:
        model: a fused model.

    Returns:
        The base, which shares the model's modules, and the deltas in their order. A delta's record holds its
        budget alone.

    Raises:
        ConfigError: the model has no fusion, or routes among its deltas.
    """
    fusion = model.fusion
    if fusion is None:
        raise ConfigError("the model has no fused deltas: expected one made by 'tether fuse'")
    if model.config.fusion.get("kind") == "adapters":
        raise ConfigError(
            "the model is a fusion of adapters: serve those that are wanted again from their folders "
            "('tether fuse BASE A.lora B.lora')"
        )
    if model.config.fusion.get("router"):
        raise ConfigError(
            "the model routes among its deltas: expected a plain fusion; learn the router again ('tether route') "
            "with the deltas that are wanted"
        )
    config = copy.deepcopy(model.config)
    described, config.fusion = config.fusion, None
    with torch.device("meta"):
        base = CausalQwenForCausalLM(config)
    for name in ("backbone", "numeric", "abduction", "action"):
        setattr(base, name, getattr(model, name))
    base.generation_config = copy.deepcopy(model.generation_config)
    base.name_or_path = config._name_or_path = ""
    base.eval()
    return base, {_delta(model, fusion, row): weight for row, weight in enumerate(described["weights"])}


def _delta(model: CausalQwenForCausalLM, fusion: Fusion, row: int) -> Delta:
    size = fusion.hidden_size
    heads = [fusion.second[row].detach().cpu()]
    if not fusion.location_only:
        heads.append(fusion.first[row].detach().cpu())
    # What was padded with zeros is cut off again.
    read = [
        number
        for number in range(1, len(fusion.layers) + 1)
        if any(bool(head[:, size * number : size * (number + 1)].any()) for head in heads)
    ]
    heads = [torch.cat([head[:, size * n : size * (n + 1)] for n in (0, *read)], dim=1) for head in heads]
    gate = take_gate(fusion, row) if fusion.gated else None
    record = dict(fusion.description["budgets"][row])
    if "strengths" in fusion.description:
        record["strengths"] = list(fusion.description["strengths"][row])
    return Delta(
        name=fusion.domains[row],
        chart=fusion.native[row],
        first=heads[1] if len(heads) > 1 and bool(heads[1].any()) else None,
        second=heads[0],
        gate=gate,
        base=str(model.config.base_fingerprint),
        record=record,
        layers=tuple(fusion.layers[number - 1] for number in read),
    )
