"""How a merged model behaves beside the models it was made from: measured before it is published."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tether.causal.folder import check_size
from tether.causal.softmax import softmax_kl
from tether.delta.windows import Windows, window_text
from tether.errors import CheckpointError, ConfigError
from tether.merge.recipe import Check
from tether.stats import standard_error
from tether.store.documents import read_documents

__all__ = [
    "Comparison",
    "check",
    "compare",
    "load_checkpoint",
    "read_texts",
    "sample_paths",
]

_CHUNK = 1 << 24  # logits that are turned into probabilities at once: 64 MB
_PROMPT = 16  # tokens of a text that a sampled path continues

Step = Callable[[dict[str, float]], None]


class Comparison(NamedTuple):
    """Two models on the same tokens; n positions, m of them with a next token.

    Attributes:
        kl: softmax KL(reference || merged), nats, shape (n,).
        nll_reference: of the next token, nats, shape (m,).
        nll_merged: likewise, shape (m,).
        documents: the document of each position, shape (n,).
    """

    kl: Tensor
    nll_reference: Tensor
    nll_merged: Tensor
    documents: Tensor

    def summary(self) -> dict[str, Any]:
        """Give the figures of a report.

        Returns:
            Mean NLL of both and mean, 99th percentile and maximum of the KL, nats; the standard error of
            its mean over documents where there are several.
        """
        kl = self.kl.double().numpy()
        several = len(self.documents.unique()) > 1
        return {
            "tokens": len(kl),
            "nll_reference": float(self.nll_reference.double().mean()),
            "nll_merged": float(self.nll_merged.double().mean()),
            "kl": {
                "mean": float(kl.mean()),
                "p99": float(np.quantile(kl, 0.99)),
                "max": float(kl.max()),
                "standard_error": standard_error(kl, self.documents.numpy()) if several else None,
            },
        }


def load_checkpoint(path: Path | str) -> Any:
    """Load a causal or vision-language model in float32: stored weights, exact arithmetic.

    Args:
        path: a checkpoint folder.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: If transformers cannot load it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        loader = AutoModelForCausalLM if text else AutoModelForImageTextToText
        check_size(str(path), str(path), loader)
        return loader.from_pretrained(path, trust_remote_code=False, dtype=torch.float32).eval()
    except CheckpointError:
        raise
    except Exception as error:
        # transformers raises a dozen types here; the user needs one sentence.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: transformers cannot load it ({reason}); expected a checkpoint folder"
        ) from error


def compare(
    reference: Any, merged: Any, windows: Windows, *, batch_size: int = 8, on_step: Step | None = None
) -> Comparison:
    """Run two models over a text.

    Args:
        reference: a transformers model.
        merged: another with the same vocabulary.
        windows: the text.
        batch_size: windows a pass.
        on_step: called with `done` and `total` tokens after each batch.

    Returns:
        Per-token results in the text's order.

    Raises:
        ConfigError: If the vocabularies have different sizes.
    """
    count = len(windows.input_ids)
    kl, nll_reference, nll_merged = (torch.zeros(count) for _ in range(3))
    done = 0
    for batch in windows.batches(batch_size):
        where = windows.positions(batch)
        with torch.no_grad():
            logits = [model(input_ids=batch.input_ids).logits[batch.mask] for model in (reference, merged)]
        if logits[0].shape != logits[1].shape:
            raise ConfigError(
                f"the models give {logits[0].shape[-1]} and {logits[1].shape[-1]} logits; expected one vocabulary. "
                "Leave the model out of check.references"
            )
        target = windows.targets[where].clamp(min=0).unsqueeze(-1)
        for part in torch.arange(len(where)).split(max(1, _CHUNK // logits[0].shape[-1])):
            log_p, log_q = (each[part].float().log_softmax(-1) for each in logits)
            kl[where[part]] = softmax_kl(log_p, log_q)
            nll_reference[where[part]] = -log_p.gather(-1, target[part]).squeeze(-1)
            nll_merged[where[part]] = -log_q.gather(-1, target[part]).squeeze(-1)
        done += len(where)
        if on_step:
            on_step({"done": float(done), "total": float(count)})
    scored = windows.targets >= 0
    return Comparison(kl, nll_reference[scored], nll_merged[scored], windows.documents)


def sample_paths(model: Any, prompts: Tensor, length: int, generator: torch.Generator) -> Windows:
    """Continue prompts by sampling from a model at temperature 1, all at once.

    Args:
        model: a transformers model.
        prompts: token ids, shape (N, P).
        length: tokens to sample, >= 1.
        generator: source of randomness.

    Returns:
        Prompts and sampled tokens, one window of P + length tokens and one document a path.
    """
    ids, cache = prompts, None
    fresh = prompts
    for _ in range(length):
        with torch.no_grad():
            output = model(input_ids=fresh, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        law = output.logits[:, -1].float().softmax(-1)
        fresh = torch.multinomial(law, 1, generator=generator)
        ids = torch.cat([ids, fresh], dim=1)
    count, width = ids.shape
    targets = torch.cat([ids[:, 1:], torch.full((count, 1), -100)], dim=1)
    return Windows(
        input_ids=ids.reshape(-1),
        targets=targets.reshape(-1),
        documents=torch.arange(count).repeat_interleave(width),
        starts=torch.arange(count + 1) * width,
    )


# Keep the positions that predict sampled tokens.
def _sampled(comparison: Comparison, windows: Windows, prompt: int, width: int) -> Comparison:
    place = torch.arange(len(windows.input_ids)) % width
    positions = (place >= prompt - 1) & (place < width - 1)
    scored = positions[windows.targets >= 0]
    return Comparison(
        comparison.kl[positions],
        comparison.nll_reference[scored],
        comparison.nll_merged[scored],
        comparison.documents[positions],
    )


def read_texts(wanted: Check, tokenizer: Path) -> dict[str, Windows]:
    """Read the texts of a check as the result will; done before the long part.

    Args:
        wanted: the check.
        tokenizer: folder of the model whose tokenizer the result has.

    Returns:
        Name to windows.

    Raises:
        CheckpointError: If the tokenizer cannot be loaded.
        ConfigError: If a text is missing, empty or shorter than a window.
    """  # noqa: DOC502 - raised by what it calls
    # A recipe is a file, and may come from somebody else: nothing is fetched because it says so.
    documents = {name: read_documents(path, fetch=False) for name, path in wanted.text.items()}
    reader = load_tokenizer(tokenizer)
    return {
        name: window_text(
            text,
            reader,
            length=wanted.window,
            tokens=wanted.tokens,
            name=f"check.text.{name} ({wanted.text[name]})",
        )
        for name, text in documents.items()
    }


def check(
    wanted: Check,
    merged: Path,
    references: Mapping[str, Path],
    windows: Mapping[str, Windows],
    *,
    seed: int = 0,
    steps: Callable[[str], Step] | None = None,
) -> dict[str, Any]:
    """Measure a merged checkpoint against the models it was made from.

    Two models are in memory at a time. On each text, and on continuations that the reference itself samples:
    a merged model can follow a short text and still drift where it writes on.

    Args:
        wanted: what to measure.
        merged: the checkpoint folder.
        references: name to folder; the first one holds the budget.
        windows: name to held-out text, see `read_texts`.
        seed: of the sampled paths.
        steps: gives a callback for each reference.

    Returns:
        JSON: reference to text to figures, with the worst mean KL from the first reference, the budget and
        whether it is kept (None without a budget).

    Raises:
        CheckpointError: If a model cannot be loaded.
        ConfigError: If the vocabularies differ.
    """  # noqa: DOC502 - raised by what it calls
    model = load_checkpoint(merged)
    figures: dict[str, Any] = {}
    for name, path in references.items():
        step = (steps or (lambda _: lambda entry: None))(f"checking {name}")
        figures[name] = dict(_against(load_checkpoint(path), model, windows, wanted, seed, step))
    first = figures[next(iter(references))]
    worst = max(entry["kl"]["mean"] for entry in first.values())
    return {
        "references": figures,
        "worst_mean_kl": worst,
        "budget": wanted.accept,
        "accepted": None if wanted.accept is None else worst <= wanted.accept,
    }


def _against(
    reference: Any, merged: Any, windows: Mapping[str, Windows], wanted: Check, seed: int, step: Step
) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, text in windows.items():
        yield name, compare(reference, merged, text, on_step=step).summary()
        starts = text.starts[:-1][text.starts.diff() >= _PROMPT][: wanted.paths]
        if not len(starts):
            continue
        prompts = text.input_ids[starts.unsqueeze(-1) + torch.arange(_PROMPT)]
        generator = torch.Generator().manual_seed(seed)
        sampled = sample_paths(reference, prompts, wanted.path_length, generator)
        result = compare(reference, merged, sampled, on_step=step)
        yield f"{name}, sampled", _sampled(result, sampled, _PROMPT, _PROMPT + wanted.path_length).summary()


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer.

    Args:
        folder: a checkpoint folder.

    Returns:
        The tokenizer, which reads digits as text.

    Raises:
        CheckpointError: If there is none that can be loaded.
    """
    from transformers import AutoTokenizer

    from tether.causal.numbers import without_numbers

    try:
        return without_numbers(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{folder}: no tokenizer that can be loaded ({reason}); name a model that has one under tokenizer"
        ) from error
