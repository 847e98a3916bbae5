"""The parts of the document, one at a time: shares and ensembles, shared paths, projection and mask, flat step."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.finetune import losses as window_losses
from benchmarks.lape_table import Table
from benchmarks.lape_trial import State, Trial
from tether.merge.encoding import encode
from tether.merge.ensembles import mean_curvature, neuron_features, spectral_labels, split_half_agreement
from tether.merge.flat import flat_step, gradient_variance, search_scale
from tether.merge.fusion import responsibilities, row_shares
from tether.merge.gram import load_grams
from tether.merge.matching import ensemble_similarity, match_ensembles
from tether.merge.paper import fuse_paper
from tether.merge.paths import PathBank
from tether.merge.signatures import Signatures
from tether.merge.task_vectors import (
    fuse_projected,
    fuse_shared,
    input_directions,
    interference,
    interference_mask,
)

__all__ = ["document_variants", "fisher_variants", "flat_variants", "shared_path_variants"]

ENSEMBLES = 8


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
    """Measure the document's own path, corrected and literal.

    Args:
        table: of the trial.
        encoded: signatures with position weights.
        first: A's Gram matrices.
        second: B's.
    """
    trial = table.trial

    def directions(module: str, layer: int) -> Tensor:
        name = module
        grams = [load_grams(folder, layer).grams[name] for folder in (*first, *second)]
        return input_directions(torch.stack([gram / gram.diagonal().mean() for gram in grams]).sum(0))

    cache: dict[str, Tensor] = {}

    def shared_basis(module: str, layer: int) -> Tensor:
        if module not in cache:
            cache[module] = directions(module, layer)
        return cache[module]

    def mask(module: str, by_ensemble: bool) -> Tensor:
        phi = [one.phi(module).double().mean(0) for one in encoded]
        both = torch.cat(phi)
        standard = (both - both.mean(0)) / both.std(0).clamp(min=1e-12)
        a, b = standard.chunk(2)
        curvature = mean_curvature(encoded[1].signature(module).gradient.double())
        score = interference(a, b, curvature / curvature.mean())
        if by_ensemble:
            labels = spectral_labels(neuron_features(encoded[1].phi(module)), ENSEMBLES)
            size = torch.bincount(labels, minlength=ENSEMBLES).clamp(min=1)
            score = (torch.zeros(ENSEMBLES, dtype=score.dtype).index_add_(0, labels, score) / size)[labels]
        return interference_mask(score).float()

    def projected(kind: str) -> Callable[[str, int, Tensor, Tensor, Tensor], Tensor]:
        def rule(module: str, layer: int, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            if module == "lm_head":
                return (a + b) / 2
            if kind == "shared":
                half = torch.full((len(a),), 0.5)
                return fuse_shared(c, a - c, b - c, shared_basis(module, layer), half)
            gate = (
                torch.ones(len(a))
                if kind in {"no mask", "no projection"}
                else mask(module, kind == "ensembles")
            )
            basis = torch.eye(a.shape[1]) if kind.startswith("no projection") else shared_basis(module, layer)
            return fuse_projected(a, b - c, basis, gate, lambda_proj=0.5, lambda_ortho=0.5)

        return rule

    table.test("projection, half shares, rest at 0.7", lambda: trial.merge(projected("shared")))
    for kind in ("row mask", "ensembles", "no mask", "no projection, row mask"):
        table.test(f"document's update on rows of A, {kind}", lambda k=kind: trial.merge(projected(k)))

    literal = signatures(table, "paper", gradients=False)
    table.value("effective paths, paper", lambda: float(literal[0].effective.mean()))

    def paper(collapse: bool, sigma: float) -> Callable[[str, int, Tensor, Tensor, Tensor], Tensor]:
        def rule(module: str, layer: int, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            del layer
            if module == "lm_head":
                return (a + b) / 2
            phi = []
            for one in literal:
                value, scale = one.mean_phi(module, "paper")
                phi.append(value * torch.exp(torch.tensor(scale, dtype=torch.float64)))
            labels = [spectral_labels(part, ENSEMBLES) for part in phi]
            curvature = [part[:, 1].square() + part[:, 2] for part in phi]
            match = match_ensembles(ensemble_similarity(*phi, *labels, *curvature))
            fused = fuse_paper(
                a.double(), b.double(), c.double(), *phi, *labels, match, collapse=collapse, sigma=sigma
            )
            return fused.to(a.dtype)

        return rule

    for name, options in (("as written", (True, 1.0)), ("rows kept, sigma 0", (False, 0.0))):
        table.test(f"paper, {name}", lambda o=options: trial.merge(paper(*o)))


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
