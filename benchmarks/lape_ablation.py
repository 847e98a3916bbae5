"""The parts of the document, one at a time: shares and ensembles, shared paths, projection and mask, flat step."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.finetune import losses as window_losses
from benchmarks.lape_table import Table
from benchmarks.lape_trial import State, Trial
from tether.merge.encoding import encode
from tether.merge.ensembles import neuron_features, spectral_labels, split_half_agreement
from tether.merge.flat import flat_step, gradient_variance, search_scale
from tether.merge.fusion import responsibilities, row_shares
from tether.merge.gram import load_grams
from tether.merge.paths import PathBank
from tether.merge.signatures import Signatures
from tether.merge.tefm.layer import Side, directions_of, fuse_layer
from tether.merge.tefm.neurons import Neurons
from tether.merge.tefm.switches import Options

__all__ = ["document_variants", "fisher_variants", "flat_variants", "shared_path_variants"]

ENSEMBLES = 8
BY_ROW = {"update": "row", "lambda": 0.5}
DOCUMENT: dict[str, dict[str, Any]] = {
    "projection, half shares, rest at 0.7": {"mask": "none"},
    "document's update on rows of A, row mask": {**BY_ROW, "interference": "rows"},
    "document's update on rows of A, ensembles": BY_ROW,
    "document's update on rows of A, no mask": {**BY_ROW, "mask": "none"},
    # As many directions as there are inputs: all of a task vector is its projection.
    "document's update on rows of A, no projection, row mask": {
        **BY_ROW,
        "interference": "rows",
        "rank": 10**6,
    },
}
LITERAL: dict[str, dict[str, Any]] = {
    "paper, as written": {},
    "paper, rows kept, sigma 0": {"update": "row", "sigma": 0.0},
}


def signatures(table: Table, weighting: str, gradients: bool) -> list[Signatures]:
    """Encode both fine-tunes on their own paths.

    Args:
        table: of the trial.
        weighting: of the paths.
        gradients: also by backpropagation.

    Returns:
        A's and B's.
    """
    trial, found = table.trial, []
    for model in (0, 1):
        bank = trial.bank(model)
        trial.on_step(f"signatures of model {model}, {weighting}")
        folder = trial.folder / f"signatures-{model}-{weighting}"
        found.append(
            encode(trial.load(trial.tuned[model]), bank, folder, weighting=weighting, gradients=gradients)
        )
    return found


def fisher_variants(table: Table, first: list[Path], second: list[Path]) -> list[Signatures]:
    """Measure shares by Fisher norm: one a layer, quantile ensembles, spectral ensembles, single rows.

    Args:
        table: of the trial.
        first: A's Gram matrices.
        second: B's.

    Returns:
        The signatures with position weights.
    """
    trial = table.trial
    encoded = signatures(table, "position", gradients=True)

    def fishers(module: str) -> list[Tensor]:
        return [one.signature(module).fisher.mean(0) for one in encoded]

    def shares(count: int) -> Callable[[str], Tensor | None]:
        return lambda module: None if module == "lm_head" else row_shares(fishers(module), ensembles=count)

    def spectral(module: str) -> Tensor | None:
        if module == "lm_head":
            return None
        labels = spectral_labels(neuron_features(encoded[0].phi(module)), ENSEMBLES)
        rows = row_shares(fishers(module), ensembles=len(labels))
        size = torch.bincount(labels, minlength=ENSEMBLES).clamp(min=1)
        mean = torch.zeros(2, ENSEMBLES, dtype=rows.dtype).index_add_(1, labels, rows) / size
        return mean[:, labels]

    choices = {"8 quantile ensembles": shares(ENSEMBLES), "8 spectral ensembles": spectral}
    for name, choice in choices.items():
        table.test(f"regression mean, {name}", lambda c=choice: trial.gram_merge(first, second, shares=c))
    modules = [name for name, layer in trial.linears.items() if layer in {0, 14, 29}]
    table.value(
        "split-half agreement",
        lambda: [split_half_agreement(encoded[0].phi(module), ENSEMBLES) for module in modules],
    )
    table.value("effective paths", lambda: float(encoded[0].effective.mean()))
    return encoded


def shared_path_variants(table: Table) -> None:
    """Measure the regression mean on shared paths, with and without responsibilities by loss.

    Args:
        table: of the trial.
    """
    trial = table.trial
    banks = [trial.bank(model) for model in (0, 1)]
    losses = []
    for model in (0, 1):
        for bank in (0, 1):
            trial.on_step("losses on shared paths")
            folder = trial.folder / f"losses-{model}-{bank}"
            shell = trial.load(trial.tuned[model])
            families = ["mlp.down_proj"]
            losses.append(encode(shell, banks[bank], folder, families=families, gradients=False).loss)
    matrix = torch.stack([torch.cat(losses[:2]), torch.cat(losses[2:])])
    count = len(banks[0].probes)
    for temperature in (None, 0.25):
        folders: list[list[Path]] = [[], []]
        for model in (0, 1):
            for bank in (0, 1):
                share = (
                    torch.full_like(matrix, 0.5)
                    if temperature is None
                    else responsibilities(matrix, temperature)
                )
                mine = share[model, bank * count : (bank + 1) * count]
                name = f"{model}-shared-{bank}-{temperature}"
                weights = lambda pack, mine=mine: mine[pack.sample].float().expand(len(pack.path))  # noqa: E731
                folders[model].append(trial.grams(model, banks[bank], name, weights))
        label = "regression mean, shared paths" + ("" if temperature is None else ", responsibilities")
        table.test(label, lambda f=folders: trial.gram_merge(*f))
        for folder in (*folders[0], *folders[1]):
            shutil.rmtree(folder)


def document_variants(table: Table, encoded: list[Signatures], first: list[Path], second: list[Path]) -> None:
    """Measure the document's update, row by row and as written, by the operator's own stages.

    Args:
        table: of the trial.
        encoded: signatures with position weights.
        first: A's Gram matrices.
        second: B's.
    """
    trial = table.trial

    @cache
    def axes(module: str, layer: int, rank: int) -> Tensor:
        grams = [load_grams(folder, layer).grams[module] for folder in (*first, *second)]
        return directions_of(grams, rank)

    def merged(options: Options, signed: list[Signatures]) -> State:
        chosen = options.chosen(parent=True)

        def rule(module: str, layer: int, *weights: Tensor) -> Tensor:
            a, b, c = (weight.double() for weight in weights)
            if module == "lm_head":
                return (weights[0] + weights[1]) / 2
            known = [_neurons(one, module, chosen.gradient) for one in signed]
            directions = axes(module, layer, chosen.rank) if chosen.direction == "inputs" else None
            fused = fuse_layer(Side(a, known[0]), Side(b, known[1]), c, directions, chosen).weight
            return fused.to(weights[0].dtype)

        return trial.merge(rule)

    for name, given in DOCUMENT.items():
        table.test(name, lambda g=given: merged(Options(**g), encoded))
    literal = signatures(table, "paper", gradients=False)
    table.value("effective paths, paper", lambda: float(literal[0].effective.mean()))
    for name, given in LITERAL.items():
        table.test(name, lambda g=given: merged(Options(form="literal", affinity="shifted", **g), literal))


def _neurons(signatures_: Signatures, module: str, gradient: str) -> Neurons:
    found = signatures_.signature(module)
    second = found.gradient if gradient == "true" else found.paper_gradient
    return Neurons(found.activation, second, signatures_.loss, signatures_.log_mass, found.fisher)


def flat_variants(table: Table, state: State) -> None:
    """Measure the choice of lambda by gradient variance and by loss, and a flat step.

    Args:
        table: of the trial.
        state: the default merge.
    """
    trial = table.trial
    bank = trial.bank(0)
    few = PathBank(bank.probes[:6], bank.tokens[:6], bank.log_prob[:6], bank.lengths[:6])

    def variance(scale: float) -> float:
        trial.on_step(f"gradient variance {scale}")
        return gradient_variance(
            trial.load(trial.scaled(state, scale)), few, ("mlp.up_proj", "mlp.down_proj")
        )

    candidates = [0.25, 0.5, 0.75, 1.0, 1.25]
    table.value("lambda by gradient variance", lambda: list(search_scale(variance, candidates)))

    def step() -> list[float]:
        trial.on_step("flat step")
        model = trial.load(state)
        tokens = torch.cat([part[:4] for part in trial.validation])
        held = [part[4:] for part in trial.validation]

        def held_out(model: Any) -> float:
            return float(torch.stack([window_losses(model, part).mean() for part in held]).mean())

        found = flat_step(model, lambda m: m(input_ids=tokens, labels=tokens, use_cache=False).loss, held_out)
        moved = Trial.state_of(model)
        table.test("regression mean, flat step", lambda: moved)
        return list(found)

    table.value("flat step", step)
