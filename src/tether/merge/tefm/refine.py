"""What depends on the merged model itself: lambda by the variance of g', or by loss, and the last step."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar, final

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from tether.causal.losses import IGNORE
from tether.delta.windows import Batch, Windows
from tether.errors import CheckpointError, ConfigError
from tether.merge.check import load_checkpoint, load_tokenizer, read_texts
from tether.merge.descriptions import read_description
from tether.merge.encoding import encode
from tether.merge.flat import flat_step, search_scale
from tether.merge.paths import sample_paths
from tether.merge.probes import Probe, encode_probes, probes_hash, read_probes
from tether.merge.recipe import Check, Refine
from tether.merge.signatures import Signatures
from tether.merge.tefm.switches import ETA, Options
from tether.merge.towers import find_linears, find_tower
from tether.reading import Strict
from tether.store.publish import write_json
from tether.store.writer import write_safetensors

__all__ = ["Refinement", "log_variance"]

T = TypeVar("T")

_RECORD: Final = "search.json"
_STEP: Final = "step.safetensors"
_TINY: Final = 5e-324
_ROWS: Final = 8
"""Windows a pass."""


class Trial(Protocol):
    """Make the merge under other options, unpublished, and look at its folder."""

    def __call__(self, options: dict[str, Any], look: Callable[[Path], T]) -> T: ...


class _Record(Strict):
    """``search.json``: what an interrupted search has measured."""

    key: str
    values: dict[str, float] = Field(default_factory=dict)
    probes: str | None = None


def log_variance(signatures: Signatures, gradient: str) -> float:
    """Give the logarithm of the document's criterion: the variance over all neurons of ``g'* = phi*[1]``.

    The document's sums are as small as the probabilities of paths, and their squares smaller than any number; the
    logarithm has the same minimum.

    Args:
        signatures: of the merged model.
        gradient: form of phi[1], ``paper`` or ``true``.

    Returns:
        Natural logarithm; about -745 where all are equal.

    Reference:
        TEFM, stage 3, lambda by ``min Var(g'*)``.
    """
    means = [signatures.mean_phi(module, gradient) for module in signatures.modules]
    values = torch.cat([value[:, 1] for value, _ in means])
    # All modules are averaged with the same masses.
    return 2 * means[0][1] + math.log(max(float(values.var()), _TINY))


@final
class Refinement:
    """What a recipe's ``refine`` is measured on, read before the long part.

    Args:
        wanted: the section of the recipe.
        options: of the operator.
        parent: whether the recipe has one.
        seed: of the merged model's paths.
        tokenizer: folder of the model whose tokenizer the result has.

    Raises:
        ConfigError: Probes or texts are missing, or too short.
    """

    def __init__(self, wanted: Refine, options: Options, parent: bool, seed: int, tokenizer: Path) -> None:
        self.wanted, self.options, self.seed = wanted, options, seed
        self.switches = options.chosen(parent=parent)
        self.probes: list[Probe] = []
        self.texts: dict[str, Windows] = {}
        self.shown: str | None = None
        if wanted.encodes:
            assert wanted.probes is not None  # read_recipe refuses it
            self.probes = read_probes(wanted.probes)[: wanted.samples]
        if wanted.reads:
            asked = Check(text=wanted.text, tokens=wanted.tokens, window=wanted.window)
            self.texts = read_texts(asked, tokenizer)
            if wanted.step == "sam" and sum(len(text.starts) - 1 for text in self.texts.values()) < 2:
                raise ConfigError(
                    "refine.text: step sam needs two windows, one to step by and one held out; give more text"
                )

    def run(self, trial: Trial, folder: Path, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Search lambda, then make the last step's file.

        Args:
            trial: makes a merge and looks at it.
            folder: for what an interrupted search has measured, and for the step.
            key: equal for equal merges over equal files.

        Returns:
            Options that differ from the recipe's, and the report.
        """
        options: dict[str, Any] = {}
        report: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if self.wanted.search:
            known = self._known(folder, key)

            def measure(scale: float) -> float:
                if repr(scale) not in known:
                    known[repr(scale)] = trial({"lambda": scale}, lambda model: self._value(model, folder))
                    record = {"key": self._key(key), "values": known, "probes": self.shown}
                    write_json(folder / _RECORD, record)
                return known[repr(scale)]

            found = search_scale(measure, self.wanted.search)
            options["lambda"] = found.best
            name = "log_variance" if self.wanted.criterion == "variance" else "loss"
            tried = [
                {"lambda": scale, name: value}
                for scale, value in zip(found.scales, found.values, strict=True)
            ]
            report |= {"criterion": self.wanted.criterion, "lambda": found.best, "tried": tried}
        if self.wanted.step:
            file = folder / _STEP
            report["step"] = trial(options, lambda model: self._step(model, file, folder))
            options["step"] = str(file)
        if self.shown:
            report["probes"] = self.shown
        return options, report

    def _key(self, key: str) -> str:
        own = json.dumps([key, self.wanted.model_dump(mode="json"), self.seed], sort_keys=True)
        return hashlib.sha256(own.encode()).hexdigest()

    def _known(self, folder: Path, key: str) -> dict[str, float]:
        file = folder / _RECORD
        if not file.is_file():
            return {}
        try:
            record = read_description(file, "Remove it, and start the merge again.", _Record)
        except CheckpointError:
            file.unlink()
            return {}
        if record["key"] != self._key(key):
            return {}
        self.shown = record["probes"]
        return dict(record["values"])

    def _value(self, folder: Path, work: Path) -> float:
        model = load_checkpoint(folder)
        if self.wanted.criterion == "loss":
            return self._loss(model, self._windows())
        signatures, place = self._encoded(model, folder, work)
        found = log_variance(signatures, self.switches.gradient)
        shutil.rmtree(place)
        return found

    def _step(self, folder: Path, file: Path, work: Path) -> dict[str, Any]:
        model = load_checkpoint(folder)
        form = str(self.wanted.step)
        eta = ETA[form] if self.options.eta is None else self.options.eta
        if form == "sam":
            return self._sharpness_aware(model, file, eta)
        signatures, place = self._encoded(model, folder, work)
        gradients = {}
        for module in signatures.modules:
            value, scale = signatures.mean_phi(module, self.switches.gradient)
            gradients[_canonical(model, module)] = (value[:, 1] * math.exp(scale)).contiguous()
        shutil.rmtree(place)
        write_safetensors(file, gradients)
        every = torch.cat(list(gradients.values())).abs()
        return {
            "form": form, "eta": eta, "neurons": len(every), "largest": float((every / (every + 1e-8)).max()) * eta,
            "mean": float((every / (every + 1e-8)).mean()) * eta,
        }  # fmt: skip

    # The merged model's own paths, encoded under the operator's weighting.
    def _encoded(self, model: Any, folder: Path, work: Path) -> tuple[Signatures, Path]:
        processor = _load_processor(folder) if any(probe.image for probe in self.probes) else None
        encoded = encode_probes(self.probes, load_tokenizer(folder), processor=processor)
        self.shown = probes_hash(encoded)
        wanted = self.wanted
        bank = sample_paths(model, encoded, paths=wanted.paths, longest=wanted.longest, seed=self.seed)
        place = work / "encoded"
        shutil.rmtree(place, ignore_errors=True)
        switches = self.switches
        true = switches.gradient == "true"
        return (
            encode(model, bank, place, weighting=switches.weighting, gamma=switches.gamma, gradients=true),
            place,
        )

    def _windows(self) -> list[Batch]:
        return [batch for text in self.texts.values() for batch in text.batches(_ROWS)]

    def _loss(self, model: Any, batches: list[Batch]) -> float:
        with torch.no_grad():
            return float(_mean_loss(model, batches))

    def _sharpness_aware(self, model: Any, file: Path, eta: float) -> dict[str, Any]:
        single = [batch for text in self.texts.values() for batch in text.batches(1)]
        own, held = single[::2], single[1::2]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        linears = {name: module for layer in find_linears(model) for name, module in layer.items()}
        before = {}
        for name, module in linears.items():
            module.weight.requires_grad_(True)
            before[name] = module.weight.detach().clone()
        found = flat_step(model, lambda m: _mean_loss(m, own), lambda m: self._loss(m, held), eta=eta)
        steps = {
            _canonical(model, name): before[name] - module.weight.detach() for name, module in linears.items()
        }
        write_safetensors(file, steps)
        return {"form": "sam", **found._asdict()}


def _load_processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"refine.probes have images, but the merged model has no processor that loads "
            f"({str(error).splitlines()[0]}); give text probes, or merge into a model with processor files"
        ) from error


def _mean_loss(model: Any, batches: list[Batch]) -> Tensor:
    total: Any = 0.0
    count = 0
    for batch in batches:
        logits = model(
            input_ids=batch.input_ids, attention_mask=batch.mask.long(), use_cache=False
        ).logits.float()
        targets = batch.input_ids.masked_fill(~batch.mask, IGNORE)[:, 1:]
        total = total + cross_entropy(
            logits[:, :-1].transpose(1, 2), targets, ignore_index=IGNORE, reduction="sum"
        )
        count += int((targets != IGNORE).sum())
    return torch.as_tensor(total / count)


# The name of a module's weight inside the language tower.
def _canonical(model: Any, module: str) -> str:
    return f"layers{module.removeprefix(find_tower(model).prefix)}.weight"
