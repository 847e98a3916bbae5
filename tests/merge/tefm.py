"""An independent reading of stage 3 of LAPE-TEFM, neuron by neuron in NumPy, and random layers to try it on."""

import numpy as np
import torch

from tether.merge.tefm.layer import Side
from tether.merge.tefm.neurons import Neurons
from tether.merge.tefm.switches import Options

ROWS, INPUTS, SAMPLES = 24, 10, 6


def switches(form="literal", *, parent=True, **given):
    return Options(form=form, ensembles=4, **given).chosen(parent=parent)


def neurons(seed, rows=ROWS, samples=SAMPLES, mass=-2.0):
    draw = torch.Generator().manual_seed(seed)
    return Neurons(
        activation=torch.randn(samples, rows, generator=draw),
        gradient=torch.randn(samples, rows, generator=draw),
        loss=1 + torch.rand(samples, generator=draw),
        log_mass=mass * torch.rand(samples, generator=draw),
        fisher=torch.rand(samples, rows, generator=draw),
    )


def side(seed, rows=ROWS, **given):
    draw = torch.Generator().manual_seed(100 + seed)
    weight = torch.randn(rows, INPUTS, generator=draw, dtype=torch.float64)
    return Side(weight, neurons(seed, rows, **given))


def directions(rank=3):
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(30, INPUTS, generator=draw, dtype=torch.float64) * torch.arange(1, INPUTS + 1)
    return torch.linalg.svd(x)[2][:rank].T.contiguous()


def mean_phi(known):
    weight = np.exp(known.log_mass.double().numpy())
    phi = known.phi.numpy()
    return sum(w * one for w, one in zip(weight, phi, strict=True)) / len(phi)


def hessian(known, mean, form):
    if form == "paper":
        return mean[:, 1] ** 2 + mean[:, 2] + 1e-8
    if form == "fisher":
        found = known.fisher.double().numpy().mean(0)
    else:
        found = (known.gradient.double().numpy() ** 2).mean(0)
        # torch's median, the lower one of two in the middle.
        found = np.maximum(found, np.sort(found)[(len(found) - 1) // 2])
    return found / found.mean()


def masks(a, b, partners, chosen):
    """The mask of each row of A, by the definitions."""
    labels_a, labels_b, row = (each.numpy() for each in (partners.labels_a, partners.labels_b, partners.row))
    pairs = dict(zip(partners.match.first.tolist(), partners.match.second.tolist(), strict=True))
    mean_a, mean_b = mean_phi(a), mean_phi(b)
    curve = hessian(b, mean_b, chosen.hessian)
    if chosen.mask == "none":
        return np.ones(len(mean_a))
    score = np.zeros(len(mean_a))
    if chosen.interference == "paper":
        for i, k in enumerate(labels_a):
            if k in pairs:
                theirs = labels_b == pairs[k]
                gap = mean_a[labels_a == k].mean(0) - mean_b[theirs].mean(0)
                score[i] = np.sqrt((gap**2).sum()) / (curve[theirs].mean() + 1e-8)
    else:
        both = np.concatenate([mean_a, mean_b])
        one, other = (
            (each - both.mean(0)) / np.maximum(both.std(0, ddof=1), 1e-12) for each in (mean_a, mean_b)
        )
        level = curve / curve.mean()
        alone = np.full(len(score), np.nan)
        for i, j in enumerate(row):
            if j >= 0:
                alone[i] = np.sqrt(((one[i] - other[j]) ** 2).sum()) / (level[j] + 1e-8)
        for i, k in enumerate(labels_a):
            inside = alone[labels_a == k]
            mean = np.nanmean(inside) if np.isfinite(inside).any() else 0.0
            score[i] = (
                mean if chosen.interference == "ensembles" else (alone[i] if np.isfinite(alone[i]) else mean)
            )
    return (
        1 - 1 / (1 + np.exp(-chosen.beta * score)) if chosen.mask == "paper" else np.exp(-chosen.beta * score)
    )


def fused(a, b, parent, axes, partners, chosen):
    """Stage 3, one row after the other."""
    labels_a, labels_b, row = (each.numpy() for each in (partners.labels_a, partners.labels_b, partners.row))
    pairs = dict(zip(partners.match.first.tolist(), partners.match.second.tolist(), strict=True))
    mean_a, mean_b = mean_phi(a.neurons), mean_phi(b.neurons)
    weight_a, weight_b = a.weight.numpy(), b.weight.numpy()
    c = None if parent is None else parent.numpy()
    mask = masks(a.neurons, b.neurons, partners, chosen)
    result = weight_a.copy()
    ensemble = chosen.task_vector == "ensemble"
    for i, k in enumerate(labels_a):
        mine = labels_a == k
        if ensemble and k not in pairs:
            continue
        if not ensemble and row[i] < 0:
            continue
        theirs = np.flatnonzero(labels_b == pairs[k]) if ensemble else [row[i]]
        own = np.flatnonzero(mine) if ensemble else [i]
        push = chosen.sigma * np.mean([mean_b[j, 1] for j in theirs])
        if c is not None:
            tau = np.mean([weight_b[j] - c[j] for j in theirs], axis=0) + push
        elif chosen.without_parent == "paper":
            number = np.mean([mean_b[j, 0] for j in theirs]) - np.mean([mean_a[j, 0] for j in own])
            tau = np.full(weight_a.shape[1], number) + push
        else:
            tau = np.mean([weight_b[j] for j in theirs], axis=0) + push
            tau = tau - np.mean([weight_a[j] for j in own], axis=0)
        base = weight_a[mine].mean(0) if chosen.update == "ensemble" else weight_a[i]
        if chosen.update == "symmetric":
            base = c[i]
            tau = tau + np.mean([weight_a[j] - c[j] + chosen.sigma * mean_a[j, 1] for j in own], axis=0)
        if chosen.direction == "paper":
            d = np.full(weight_a.shape[1], mean_a[mine, 0].mean())
            shared = (tau @ d) / (d @ d + 1e-8) * d
        else:
            shared = sum((tau @ d) * d for d in axes.numpy().T)
        rest = tau - (mask[i] * shared if chosen.rest == "masked" else shared)
        result[i] = base + chosen.lambda_proj * mask[i] * shared + chosen.lambda_ortho * rest
    return result
