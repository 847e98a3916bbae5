"""A step of an adapter's fit dealt to several processes: each takes some windows, and gradients are added up."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tether.delta.windows import Batch, Windows
from tether.processes import current

__all__ = ["StepShare"]


class StepShare:
    """What this process does of each step, so that all of them together take the step that one would take.

    A step's windows go to whoever has the fewest tokens so far, longest first. Every loss counts by its tokens among
    those of the whole step, so that gradients add up to those of one process, up to rounding.
    """

    def __init__(self) -> None:
        self._group = current()
        self._loads = [0] * self._group.count

    def of_domain(self, windows: Windows, batch: Batch) -> tuple[Batch | None, float]:
        """Begin a step, and pick the windows of the domain.

        Args:
            windows: the domain's text.
            batch: of the whole step.

        Returns:
            This process's windows and the share that their mean loss has in that of the step; None and 0 where it has
            nothing to learn from.
        """
        if self._group.count == 1:
            return batch, 1.0
        self._loads = [0] * self._group.count
        rows = self.of_base(windows, batch.rows)
        if not len(rows):
            return None, 0.0
        own = windows.batch(rows)
        counts = [int((windows.targets[windows.positions(each)] >= 0).sum()) for each in (own, batch)]
        return (own, counts[0] / counts[1]) if counts[0] else (None, 0.0)

    def of_base(self, windows: Windows, rows: Tensor) -> Tensor:
        """Pick windows that have the same step, beside those that were picked before.

        Args:
            windows: a text.
            rows: numbers of its windows, shape (W,).

        Returns:
            Those of this process; none where there are too few.
        """
        if self._group.count == 1:
            return rows
        lengths = windows.starts.diff()[rows]
        own = torch.zeros(len(rows), dtype=torch.bool)
        for at in lengths.argsort(descending=True, stable=True).tolist():
            rank = self._loads.index(min(self._loads))
            self._loads[rank] += int(lengths[at])
            own[at] = rank == self._group.rank
        return rows[own]

    def everywhere(self, drifts: Tensor) -> Tensor:
        """Collect what all processes have measured in this step.

        Args:
            drifts: of this process's tokens, nats, shape (n,); empty where it has none.

        Returns:
            Of all tokens, shape (N,), without a gradient.
        """
        if self._group.count == 1:
            return drifts.detach()
        return torch.cat(self._group.gather(drifts.detach().cpu()))

    def pressed(self, drifts: Tensor, everywhere: Tensor, press: Callable[[Tensor], Tensor]) -> Tensor:
        """Give this process's part of what a step is penalised for, which may depend on all tokens, as a quantile does.

        Args:
            drifts: of this process's tokens, nats, shape (n,).
            everywhere: of all tokens, shape (N,), from `everywhere`.
            press: gives the penalty from the drifts of all tokens; of the first degree in them.

        Returns:
            A scalar whose gradients add up over the processes to that of the penalty.
        """
        if self._group.count == 1:
            return press(drifts)
        whole = everywhere.clone().requires_grad_()
        with torch.enable_grad():
            (weights,) = torch.autograd.grad(press(whole), whole)
        before = sum(self._group.gather(len(drifts))[: self._group.rank])
        return (weights[before : before + len(drifts)].to(drifts.device) * drifts).sum()

    def add_up(self, learnt: Iterable[Tensor], nll: Tensor) -> Tensor:
        """Add up over the processes what their backward passes gave.

        Args:
            learnt: what is learnt; its gradients are replaced by those of the whole step.
            nll: this process's part of the step's loss.

        Returns:
            The loss of the whole step.
        """
        if self._group.count == 1:
            return nll
        gradients = []
        for values in learnt:
            if values.grad is None:
                values.grad = torch.zeros_like(values)
            gradients.append(values.grad)
        total = nll.detach().float().clone()
        self._group.add([*gradients, total])
        return total
