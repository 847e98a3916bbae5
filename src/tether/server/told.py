"""What an answer can say of itself: which domains spoke, the regret so far, and the largest drift at one token."""

from typing import Any

import torch
from torch import Tensor

from tether.causal.losses import IGNORE
from tether.causal.mixture import Mixture
from tether.delta.account import Account, account
from tether.delta.regret import regrets, shares
from tether.delta.windows import Windows
from tether.server.refusal import Refused

__all__ = ["check_told", "told"]


def check_told(model: Any) -> None:
    """Refuse what `told` cannot say, before anything is written.

    Args:
        model: that is to answer.

    Raises:
        Refused: it is not fused by evidence, or does not act by softmax.
    """
    if not isinstance(model.fusion, Mixture) or model.config.mode != "softmax":
        raise Refused(
            "tether: this model is not a fusion by evidence in softmax mode, and has no weights to tell; leave it out",
            field="tether",
        )


def told(model: Any, ids: Tensor, values: Tensor | None, prompt: int) -> dict[str, Any]:
    """Account for an answer, by the functions that certificates rest on.

    Cost: two more passes over the text, one of the prompt and one of all of it.

    Args:
        model: fused by evidence.
        ids: prompt and answer, shape (P + A,).
        values: the number at each `<NUM>`, shape (P + A,), or None.
        prompt: tokens of the prompt P.

    Returns:
        `shares` of the weight of the base and of each domain, mean over the tokens of the answer; `shares_at_end`,
        with which the token after it would be predicted; `largest_kl`, KL(base || served) at the token of the
        answer where it is largest, nats; `prompt_regret`, by how many nats the prompt cost more than under the base
        when it was read from its beginning, and `prompt_regret_allowed`, which it never exceeds. Laws are those
        before temperature and top-p.
    """
    read = _accounted(model, ids[:prompt], values, None)
    written = _accounted(model, ids, values, prompt)
    # The law of a token stands at the one before it; the last position predicts what was not written any more.
    answer = slice(prompt - 1, len(ids) - 1)
    kl = written.softmax_kl[answer]
    numbers = None if values is None else (ids[1:prompt] == model.config.num_token_id).cpu()
    regret = regrets(model.fusion, read, numbers)["base"] if prompt > 1 else {"largest": 0.0, "allowed": 0.0}
    return {
        "shares": _shares(model, written, answer),
        "shares_at_end": _shares(model, written, slice(len(ids) - 1, len(ids))),
        "largest_kl": float(kl.max()) if len(kl) else 0.0,
        "prompt_regret": regret["largest"],
        "prompt_regret_allowed": regret["allowed"],
    }


def _accounted(model: Any, ids: Tensor, values: Tensor | None, written: int | None) -> Account:
    ids, count = ids.cpu(), len(ids)
    targets = torch.cat([ids[1:], torch.tensor([IGNORE])])
    numbers = None if values is None else values[:count].cpu()
    windows = Windows(ids, targets, torch.zeros(count, dtype=torch.int64), torch.tensor([0, count]), numbers)
    (found,) = account([model], windows, written=written)
    return found


def _shares(model: Any, found: Account, part: slice) -> dict[str, float]:
    if not len(found.log_weights[part]):
        return {}
    return shares(model.fusion, found._replace(log_weights=found.log_weights[part]))
