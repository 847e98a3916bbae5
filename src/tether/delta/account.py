"""Account for fusions by evidence on a text: loss, drift, weights and regret of every token that was served."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tether.cauchy.divergence import drift
from tether.causal.mixture import Block
from tether.causal.softmax import softmax_kl
from tether.causal.walk import Reading
from tether.delta.cache import hidden_states
from tether.delta.dealt import dealt
from tether.delta.windows import Windows

__all__ = ["Account", "account"]


class Account(NamedTuple):
    """Per-token results on one text; n tokens, m of them with a next token, K experts, N domains.

    Attributes:
        documents: document of each token, shape (n,).
        windows: window of each token, shape (n,); each is served as a text of its own.
        scored: which tokens have a next token, shape (n,), bool.
        base_nll: of the base at scored tokens, nats, shape (m,).
        nll: of what is served at scored tokens, nats, shape (m,).
        gain: by how much each expert predicted the next token better than the base, nats, 0 where it slept,
            shape (m, K).
        softmax_kl: KL(base || served), nats, shape (n,).
        parts_kl: the weighted mean of KL(base || expert), which bounds it, nats, shape (n,).
        latent_drift: the weighted mean of the experts' Cauchy drifts of U, which bounds that of the mixture, nats,
            shape (n,).
        log_weights: of the experts in each context, shape (n, K), -inf where asleep.
        density: log density that the gate of each domain gives to each context, shape (n, N).
    """

    documents: Tensor
    windows: Tensor
    scored: Tensor
    base_nll: Tensor
    nll: Tensor
    gain: Tensor
    softmax_kl: Tensor
    parts_kl: Tensor
    latent_drift: Tensor
    log_weights: Tensor
    density: Tensor


def account(
    models: Sequence[Any],
    windows: Windows,
    *,
    written: int | None = None,
    batch_size: int = 8,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> list[Account]:
    """Measure fusions by evidence that stand on one base, in one pass of the backbone over a text.

    What is measured is what the model serves: both read `Mixture.serve`. Processes that work together
    (`tether.processes.joined`) measure a share of the windows each. Cost per token: one backbone pass, and for
    each fusion one product with the output head for the base and for each expert awake.

    Args:
        models: fused by evidence; they share their backbone.
        windows: the text; each window is served as a text of its own.
        written: first position of every window that the model is said to have written itself; None where all are
            given.
        batch_size: windows a backbone pass.
        on_step: called with `done` and `total` tokens after each batch.

    Returns:
        Per-token results of each fusion, in the text's own order.
    """

    def work(part: Windows) -> list[Tensor]:
        return [values for each in _account(models, part, written, batch_size, on_step) for values in each]

    found, size = dealt(windows, work), len(Account._fields)
    accounts = [Account(*found[begin : begin + size]) for begin in range(0, len(found), size)]
    return [each._replace(windows=_of_window(windows)) for each in accounts]


def _of_window(windows: Windows) -> Tensor:
    lengths = windows.starts.diff()
    return torch.arange(len(lengths)).repeat_interleave(lengths)


@torch.no_grad()
def _account(
    models: Sequence[Any],
    windows: Windows,
    written: int | None,
    batch_size: int,
    on_step: Callable[[dict[str, float]], None] | None,
) -> list[Account]:
    sinks = [_Sink(model, windows, written) for model in models]
    done, total = 0, len(windows.input_ids)
    for batch in windows.batches(batch_size):
        states: dict[tuple[int, ...], Tensor] = {}
        for model, sink in zip(models, sinks, strict=True):
            layers = tuple(model.fusion.layers)
            if layers not in states:
                states[layers] = hidden_states(model, batch, layers)
            sink.take(states[layers], batch)
        done += int(batch.mask.sum())
        if on_step:
            on_step({"done": done, "total": total})
    return [sink.account() for sink in sinks]


class _Sink:
    """Collects what one model serves."""

    def __init__(self, model: Any, windows: Windows, written: int | None) -> None:
        self.model, self.windows, self.written = model, windows, written
        count, experts = len(windows.input_ids), model.fusion.experts
        self.found = {
            name: torch.zeros(count) for name in ("base_nll", "nll", "softmax_kl", "parts_kl", "latent_drift")
        }
        self.gain = torch.zeros(count, experts, dtype=torch.float64)
        self.log_weights = torch.zeros(count, experts, dtype=torch.float64)
        self.density = torch.zeros(count, len(model.fusion.domains))

    def take(self, states: Tensor, batch: Any) -> None:
        """Serve one batch.

        Args:
            states: what experts read, shape (B, T, F).
            batch: from `Windows.batches`.
        """
        model, device = self.model, states.device
        mask = batch.mask.to(device)
        places = torch.arange(mask.shape[1], device=device).expand(mask.shape)
        values = None if batch.numeric_values is None else batch.numeric_values.to(device)
        number = model.config.num_token_id
        reading = Reading(states, mask, places, batch.input_ids.to(device), values, number, self.written)
        where = torch.zeros(mask.shape, dtype=torch.long)
        where[batch.mask] = self.windows.positions(batch)
        for block in model.fusion.serve(model.abduction, model.action, reading):
            part = slice(block.first, block.first + block.size)
            self._keep(block, where[:, part].flatten(), batch.mask[:, part].flatten())

    def _keep(self, block: Block, where: Tensor, tokens: Tensor) -> None:
        rows = tokens.nonzero().squeeze(-1)
        at = where[rows]
        scores, experts = block.scores, block.experts
        base = scores.base.float()
        log_prob = base.log_softmax(-1)
        target = self.windows.targets[where].clamp(min=0).to(base.device)
        nll = -log_prob.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        kept = {name: torch.zeros(len(tokens), device=base.device) for name in self.found}
        kept["base_nll"] = kept["nll"] = nll
        if bool(scores.mixed.any()):
            mixed = scores.mixed
            log_norm = base[mixed].logsumexp(-1, keepdim=True)
            # Its own normaliser is taken off once more: rounding of one scale against another would count as loss.
            served = (scores.served(block.log_weights)[mixed] - log_norm).log_softmax(-1)
            kept["nll"] = nll.clone()
            kept["nll"][mixed] = -served.gather(-1, target[mixed].unsqueeze(-1)).squeeze(-1)
            kept["softmax_kl"][mixed] = softmax_kl(log_prob[mixed], served)
            kept["parts_kl"], kept["latent_drift"] = _parts(block, log_prob)
        for name, values in kept.items():
            self.found[name][at] = values[rows].float().cpu()
        self.gain[at] = torch.where(experts.awake, block.gain, 0.0)[rows].cpu()
        self.log_weights[at] = block.log_weights[rows].cpu()
        self.density[at] = block.density[rows].cpu()

    def account(self) -> Account:
        """Put the results together.

        Returns:
            Everything that was served.
        """
        scored = self.windows.targets >= 0
        found = self.found
        return Account(
            documents=self.windows.documents,
            windows=_of_window(self.windows),
            scored=scored,
            base_nll=found["base_nll"][scored],
            nll=found["nll"][scored],
            gain=self.gain[scored],
            softmax_kl=found["softmax_kl"],
            parts_kl=found["parts_kl"],
            latent_drift=found["latent_drift"],
            log_weights=self.log_weights,
            density=self.density,
        )


# Weighted means over the experts of KL(base || expert) and of the drift of U, shape (M,) each.
def _parts(block: Block, log_prob: Tensor) -> tuple[Tensor, Tensor]:
    experts, scores, count = block.experts, block.scores, len(block.experts.entry)
    rows, numbers = experts.row[count:], experts.expert[count:]
    share = block.log_weights[rows, numbers].exp().float()
    own = scores.moved.float() - scores.log_norm[count:].unsqueeze(-1)
    kl = softmax_kl(log_prob[rows], own)
    x = experts.log_scale[count:] - experts.log_scale[rows]
    y = (experts.loc[count:] - experts.loc[rows]) / experts.log_scale[rows].exp()
    found = torch.zeros(2, count, device=log_prob.device)
    found.index_add_(1, rows, torch.stack([share * kl, share * drift(x, y).sum(-1).float()]))
    return found[0], found[1]
