"""The loop: windows -> shares of a step's loss -> AdamW, on one process or several, resumed where it stopped."""

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tether.causal.apart import check_apart
from tether.causal.constants import OF_LOSSES
from tether.causal.dataset import Examples, count_labels, make_examples, shuffled
from tether.causal.evaluation import evaluate
from tether.causal.fingerprint import renew_fingerprint, weights_fingerprint
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.numbers import NumericTokenizer
from tether.causal.pairs import Document
from tether.causal.placement import find_device
from tether.causal.readout import fit_values
from tether.causal.resume import load_state, save_state
from tether.causal.term import Term
from tether.causal.trainable import (
    Objective,
    TrainOptions,
    half_backbone,
    parameter_groups,
    select,
)
from tether.causal.vocabulary import wake_numbers
from tether.errors import ConfigError
from tether.runs import Run
from tether.store.manifest import Manifest, write_manifest
from tether.store.publish import clean_stale, publish_folder

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TrainOptions", "check_processes", "train"]

_STATE, _MODEL = "state", "model"
_PROBE = 256
"""Positions that an added `<NUM>` is woken on."""


def train(
    model: CausalQwenForCausalLM,
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    options: TrainOptions,
    folder: str | Path,
    held_out: Sequence[Document] | None = None,
    device: str | torch.device = "auto",
    term: Term | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train a model, or go on with a training that was stopped.

    The folder becomes a run folder: `run.json` (options and hashes), `metrics.jsonl` (a line a step; after a
    line `resumed: k` the lines of steps beyond k before it no longer count), `state` (to go on from), and at
    the end `model`, which `tether.load` and `AutoModelForCausalLM` read. All randomness is a function of seed
    and step, so a resumed training takes the same steps as one that was never stopped. Under `torchrun` or
    `accelerate launch` every process calls this; the loss of a step is a sum over the labels of all of them,
    divided by their number, whatever their split.

    Args:
        model: not fused, its trained weights of float32 or wider; changed in place. To resume, the same
            model as at the start.
        tokenizer: its tokenizer; the numeric one is made of a plain one where the model has numbers.
        documents: what to learn.
        options: see `TrainOptions`.
        folder: new or empty, or that of a training with the same model, text and options.
        held_out: text to evaluate on before and after, or None.
        device: where to train: `auto` takes an accelerator if there is one; several processes take one each.
        term: added to the loss of every step, such as `tether.router.RoutingCourse`, which shapes the routers of a
            mixture of experts.
        on_step: called in the main process after each step with step, steps, loss, class_loss, value_loss,
            lr, gradient_norm, and term where there is one; it may raise to stop.

    Returns:
        path of the model, steps, windows, tokens (labels of all steps), parameters (trained), curve (the
        loss of every step, without the term), before and after (of `evaluate`, or None), fingerprint; the same on every
        process, but for `before` and `after`, which the main process has. With a term also `term`, its report.

    Raises:
        ConfigError: accelerate is missing; model, tokenizer, text, term or options do not fit; the folder is of
            another run; or the batch cannot be split evenly.
        CheckpointError: the saved state is damaged.
    """  # noqa: DOC502 - raised by what it calls
    options = options.on(model)
    trained = select(model, options)
    if term is not None:
        term.check(model)
    accelerator = _accelerator(find_device(device))
    check_processes(options, accelerator.num_processes)
    if model.config.num_token_id is not None:
        tokenizer = model.add_numbers(tokenizer)
    elif isinstance(tokenizer, NumericTokenizer):
        raise ConfigError(
            "a numeric tokenizer for a model without <NUM>: call model.add_numbers(tokenizer) first"
        )
    if options.packed:
        check_apart(model)
    examples = make_examples(documents, tokenizer, window=options.window, packed=options.packed)
    if options.fit_values and (count := count_labels(examples.labels, model.config.num_token_id)[1]) < 3:
        raise ConfigError(
            f"fit_values with {count} numbers to learn: expected at least 3 and a model with <NUM> "
            "(model.add_numbers(tokenizer)); give more text, or leave it out"
        )
    folder = Path(folder).absolute()
    config = {
        "base": weights_fingerprint(model),
        "text": examples.fingerprint(),
        "held_out": make_examples(held_out, tokenizer).fingerprint() if held_out else None,
        "constants": {name: getattr(model.config, name) for name in OF_LOSSES},
        "options": {key: value for key, value in asdict(options).items() if key != "save_every"},
        **({} if term is None else {"term": term.settings}),
    }
    with ExitStack() as stack:
        run = stack.enter_context(Run(folder, config)) if accelerator.is_main_process else None
        if run:
            clean_stale(folder)
        accelerator.wait_for_everyone()
        model.to(accelerator.device)
        if not (folder / _STATE).is_dir():
            _wake(model, examples)
        before = _evaluate(run, "before", model, tokenizer, held_out)
        accelerator.wait_for_everyone()
        loop = _Loop(accelerator, model, examples, options, trained, folder, run, term)
        curve = loop.run(on_step)
        if options.fit_values:
            with half_backbone(model, accelerator.device.type, options.mixed_precision):
                fit_values(model, examples)
        renew_fingerprint(model)
        if run:
            _publish(model, tokenizer, folder / _MODEL, config)
        after = _evaluate(run, "after", model, tokenizer, held_out)
        accelerator.wait_for_everyone()
    return {
        "path": str(folder / _MODEL),
        "steps": len(curve),
        "windows": examples.windows,
        "tokens": loop.tokens,
        "parameters": sum(parameter.numel() for parameter in trained.values()),
        "curve": curve,
        "before": before,
        "after": after,
        "fingerprint": model.config.base_fingerprint,
        **({} if term is None else {"term": term.report()}),
    }


def check_processes(options: TrainOptions, processes: int) -> None:
    """Refuse a batch that cannot be split evenly, before any work.

    Args:
        options: see `TrainOptions`.
        processes: how many there are.

    Raises:
        ConfigError: it cannot.
    """
    if options.batch % (options.accumulate * processes):
        raise ConfigError(
            f"batch={options.batch} over {processes} processes with accumulate={options.accumulate}: expected a "
            f"multiple of {options.accumulate * processes}"
        )


class _Loop:
    """The steps of a training, from the first or from a saved one."""

    def __init__(
        self,
        accelerator: "Accelerator",
        model: CausalQwenForCausalLM,
        examples: Examples,
        options: TrainOptions,
        trained: dict[str, nn.Parameter],
        folder: Path,
        run: Run | None,
        term: Term | None,
    ) -> None:
        self.accelerator, self.model, self.examples, self.term = accelerator, model, examples, term
        self.options, self.trained, self.folder, self.record = options, trained, folder / _STATE, run
        self.steps = options.total(examples.windows)
        self.tokens = 0
        # Rates of thresholds follow their size at the start, which a resumed training has here too.
        self.optimizer = torch.optim.AdamW(parameter_groups(model, trained, options))
        self.curve: list[float] = []
        saved = load_state(self.folder, trained, self.optimizer) if self.folder.is_dir() else None
        if term is not None:
            term.begin(model, self.optimizer)
        if saved is not None:
            self.curve = saved["curve"]
            if term is not None:
                term.load_state_dict(saved["term"] or {})
            if run:
                run.log({"resumed": len(self.curve)})
        share = 1 / (options.accumulate * accelerator.num_processes)
        self.objective = accelerator.prepare(Objective(model, options, term, share))

    def run(self, on_step: Callable[[dict[str, float]], None] | None) -> list[float]:
        """Take all steps that are left; the model is in evaluation mode afterwards.

        Returns:
            The loss of every step of the training.
        """
        model, options = self.model, self.options
        model.train()
        if options.part == "head":
            # Dropout in a frozen part would only add noise.
            model.backbone.eval()
        device = self.accelerator.device.type
        try:
            with torch.random.fork_rng(), half_backbone(model, device, options.mixed_precision):
                for step in range(self.steps):
                    self._advance(step, on_step)
        finally:
            model.eval()
            if self.term is not None:
                self.term.close()
        return self.curve

    def _advance(self, step: int, on_step: Callable[[dict[str, float]], None] | None) -> None:
        options, record = self.options, self.record
        rows = shuffled(self.examples.windows, options.seed, step * options.batch, (step + 1) * options.batch)
        counts = self._counts(rows)
        self.tokens += counts[0]
        if step < len(self.curve):
            return
        figures = self._step(step, rows, counts)
        self.curve.append(figures["loss"])
        done = step + 1
        if self.term is not None:
            self.term.after_step(done, done == self.steps)
        if record:
            record.log(figures)
        if record and (done % options.save_every == 0 or done == self.steps):
            term = None if self.term is None else self.term.state_dict()
            save_state(
                self.folder, self.trained, self.optimizer, {"step": done, "curve": self.curve, "term": term}
            )
        if record and on_step is not None:
            on_step(figures)

    def _counts(self, rows: list[int]) -> tuple[int, int]:
        starts = self.examples.starts.tolist()
        labels = torch.cat([self.examples.labels[starts[row] : starts[row + 1]] for row in rows])
        return count_labels(labels, self.model.config.num_token_id)

    def _step(self, step: int, rows: list[int], counts: tuple[int, int]) -> dict[str, float]:
        options, accelerator = self.options, self.accelerator
        rate = options.rate(step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self.optimizer.zero_grad()
        processes, rank = accelerator.num_processes, accelerator.process_index
        size = options.batch // (options.accumulate * processes)
        found = torch.zeros(3, device=accelerator.device)
        for part in range(options.accumulate):
            first = (part * processes + rank) * size
            batch = self.examples.collate(rows[first : first + size])
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            _seed(options.seed, step, part, rank)
            last = part == options.accumulate - 1
            with nullcontext() if last else accelerator.no_sync(self.objective):
                loss, parts = self.objective(batch, *counts)
                # Gradients are averaged over the processes, where the shares of a loss add up.
                accelerator.backward(loss * processes)
            found = found + parts
        norm = accelerator.clip_grad_norm_(self.trained.values(), options.clip)
        self.optimizer.step()
        class_loss, value_loss, term = accelerator.reduce(found, "sum").tolist()
        return {
            "step": step + 1,
            "steps": self.steps,
            "loss": class_loss + self.model.config.value_loss_weight * value_loss,
            "class_loss": class_loss,
            "value_loss": value_loss,
            "lr": options.lr * rate,
            "gradient_norm": float(norm),
            **({} if self.term is None else {"term": term}),
        }


def _accelerator(device: torch.device) -> "Accelerator":
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError("training needs the package accelerate; install it with pip install accelerate")
    from accelerate import Accelerator, DistributedDataParallelKwargs

    # A loss need not reach all that is trained: a text without numbers says nothing about values.
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    return Accelerator(mixed_precision="no", cpu=device.type == "cpu", kwargs_handlers=handlers)


def _seed(*place: int) -> None:
    # Dropout and the sampled loss draw from the global state, which fork_rng restores in the end.
    digest = hashlib.sha256(repr(place).encode()).digest()
    torch.random.manual_seed(int.from_bytes(digest[:7], "little"))


@torch.no_grad()
def _wake(model: CausalQwenForCausalLM, examples: Examples) -> None:
    labels, numbers = count_labels(examples.labels, model.config.num_token_id)
    if not 0 < numbers < labels:
        return
    found: list[Tensor] = []
    for row in range(examples.windows):
        batch = examples.collate([row])
        predicts = batch["labels"][0, 1:] >= 0
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
        loc = model(**inputs, use_cache=False, return_logits=False).latent_loc[0, :-1]
        found.append(loc[predicts.to(loc.device)])
        if sum(map(len, found)) >= _PROBE:
            break
    wake_numbers(model, torch.cat(found)[:_PROBE], numbers / labels)


def _evaluate(
    run: Run | None, name: str, model: CausalQwenForCausalLM, tokenizer: Any, text: Sequence[Document] | None
) -> dict[str, Any] | None:
    if run is None or not text:
        return None
    return run.stage(name, lambda: ([], evaluate(model, tokenizer, text)))


def _publish(model: CausalQwenForCausalLM, tokenizer: Any, folder: Path, config: dict[str, Any]) -> None:
    with publish_folder(folder, replace=True) as target:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        write_manifest(target, Manifest(kind="checkpoint", recipe={"training": config}))
    model.name_or_path = str(folder)
