"""One sequence a sample: the prompt once, then all its paths side by side, blind to each other."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.causal.losses import IGNORE
from tether.errors import ShapeError
from tether.merge.paths import PathBank

__all__ = ["Pack", "pack_bank", "pack_sample", "spread"]


class Pack(NamedTuple):
    """A sample and its K paths as one sequence of S tokens.

    The prefix is the prompt without its last token. Block k repeats the prompt's last token and goes on with
    all of path k but its last token, so that every position of a block predicts one generated token, every
    block has positions of its own, and the prompt is read once.

    Attributes:
        sample: which sample of the bank.
        inputs: what the model is called with: `input_ids` and `position_ids` (1, S), an additive
            `attention_mask` (1, 1, S, S), and the probe's extras.
        path: path of each position, -1 in the prefix, shape (S,).
        step: position within the path from 0, -1 in the prefix, shape (S,).
        targets: the token predicted, `IGNORE` in the prefix, shape (S,).
    """

    sample: int
    inputs: dict[str, Tensor]
    path: Tensor
    step: Tensor
    targets: Tensor

    @property
    def blocks(self) -> Tensor:
        """Offsets of the positions that predict generated tokens."""
        return (self.path >= 0).nonzero().squeeze(-1)


def pack_sample(bank: PathBank, sample: int, model: Any) -> Pack:
    """Lay out one sample.

    Args:
        bank: the paths.
        sample: which sample.
        model: gives device and dtype.

    Returns:
        The sequence, on the model's device.
    """
    probe, lengths = bank.probes[sample], bank.lengths[sample]
    paths, longest = bank.tokens.shape[1:]
    prefix = len(probe.input_ids) - 1
    time = torch.arange(longest)
    exists = time < lengths.unsqueeze(-1)  # (K, T)
    fed = torch.cat([probe.input_ids[-1].expand(paths, 1), bank.tokens[sample, :, :-1]], dim=1)
    before = torch.full((prefix,), -1)
    path = torch.cat([before, torch.arange(paths).unsqueeze(-1).expand(-1, longest)[exists]])
    step = torch.cat([before, time.expand(paths, -1)[exists]])
    targets = torch.cat([torch.full((prefix,), IGNORE), bank.tokens[sample][exists]])
    position = torch.cat([torch.arange(prefix), prefix + step[prefix:]])
    order = torch.arange(len(path))
    causal = order.unsqueeze(-1) >= order
    seen = causal & ((path == -1) | (path == path.unsqueeze(-1)))
    blocked = torch.finfo(model.dtype).min
    mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, blocked)
    inputs = {
        "input_ids": torch.cat([probe.input_ids[:-1], fed[exists]]).unsqueeze(0),
        "position_ids": position.unsqueeze(0),
        "attention_mask": mask[None, None],
        **probe.extras,
    }
    device = model.device
    return Pack(
        sample,
        {name: tensor.to(device) for name, tensor in inputs.items()},
        *(tensor.to(device) for tensor in (path, step, targets)),
    )


def pack_bank(bank: PathBank, model: Any) -> Iterator[Pack]:
    """Lay out all samples, one at a time.

    Args:
        bank: the paths.
        model: gives device and dtype.

    Yields:
        A pack a sample, in order.
    """
    for sample in range(len(bank.probes)):
        yield pack_sample(bank, sample, model)


def spread(pack: Pack, values: Tensor) -> Tensor:
    """Put values of (path, step) on the positions of a pack.

    Args:
        pack: the layout.
        values: shape (..., K, T).

    Returns:
        Zero in the prefix, shape (..., S).

    Raises:
        ShapeError: fewer paths or steps than the pack has.
    """
    if (
        values.ndim < 2
        or values.shape[-2] <= int(pack.path.max())
        or values.shape[-1] <= int(pack.step.max())
    ):
        raise ShapeError(
            f"values have shape {tuple(values.shape)}: expected (..., K, T) with K > {int(pack.path.max())} and "
            f"T > {int(pack.step.max())}"
        )
    found = values.new_zeros((*values.shape[:-2], len(pack.path)))
    where = pack.blocks
    found[..., where] = values[..., pack.path[where], pack.step[where]]
    return found
