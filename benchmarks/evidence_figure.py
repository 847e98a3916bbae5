"""Draw who speaks along a text that changes its domain twice: `python -m benchmarks.evidence_figure FUSED OUT.png`."""

import argparse
from pathlib import Path
from typing import Any

import torch

from tether.causal.loading import load
from tether.delta.fusion import fuse, unfuse
from tether.demo.corpora import DOMAINS, documents

__all__ = ["draw", "weights_along"]

PIECE = 100
"""Tokens of each part."""


def weights_along(model: Any, tokenizer: Any, parts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Serve a text made of the beginnings of several documents.

    Args:
        model: fused by evidence.
        tokenizer: of its base.
        parts: documents.

    Returns:
        Weight of the base and of each domain at each token, shape (1 + N, T), and by how much the loss was below the
        base's, nats, shape (T - 1,).
    """
    ids = torch.tensor([[token for part in parts for token in tokenizer(part)["input_ids"][:PIECE]]])
    with torch.no_grad():
        output = model(input_ids=ids, output_weights=True)
        base = model.action.score_loc(model.abduction(model.backbone(ids).last_hidden_state)[0])
    weights = output.log_weights[0].exp()
    rows = torch.stack([weights[:, 0], *(weights[:, part].sum(-1) for part in model.fusion.rows)])
    target = ids[0, 1:, None]
    losses = [
        -scores[0, :-1].float().log_softmax(-1).gather(-1, target)[:, 0] for scores in (base, output.logits)
    ]
    return rows, losses[0] - losses[1]


def draw(model: Any, rows: torch.Tensor, gain: torch.Tensor, names: list[str], path: Path) -> None:
    """Draw the weights, and what they are worth so far.

    Args:
        model: fused by evidence.
        rows: from `weights_along`.
        gain: from `weights_along`.
        names: of the parts.
        path: of the picture.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    colours = ["#b7bdc6", "#4a9fd4", "#e08b3c", "#5aa469", "#aa3377", "#c7b42c"]
    figure, axes = plt.subplots(
        2, 1, figsize=(8, 4.6), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    labels = ["base", *model.fusion.domains]
    axes[0].stackplot(
        range(rows.shape[1]), rows.numpy(), colors=colours[: len(rows)], labels=labels, linewidth=0
    )
    axes[0].set(ylabel="weight", ylim=(0, 1), xlim=(0, rows.shape[1] - 1))
    axes[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes[1].plot(range(1, len(gain) + 1), gain.cumsum(0).numpy(), color="#333333")
    axes[1].axhline(0, color="#b7bdc6", linewidth=0.8)
    axes[1].set(ylabel="nats gained\non the base", xlabel="tokens read")
    for number, name in enumerate(names):
        start = number * PIECE
        axes[0].annotate(f"text: {name}", (start + PIECE / 2, 1.03), ha="center", annotation_clip=False)
        if number:
            for axis in axes:
                axis.axvline(start, color="#333333", linewidth=0.8, linestyle=":")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)


def main() -> None:
    """Parse, serve, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fused", help="folder of the demo's fused model")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    served, tokenizer = load(arguments.fused)
    base, deltas = unfuse(served)
    # Gates open late where a text goes over into another; here evidence alone is to be seen.
    model = fuse(base, deltas, by="evidence", gated=False)
    names = ["code", "bible", "tables"]
    parts = [next(text for text in documents(DOMAINS[name]) if len(text) > 8 * PIECE) for name in names]
    rows, gain = weights_along(model, tokenizer, parts)
    draw(model, rows, gain, names, arguments.out)


if __name__ == "__main__":
    main()
