"""A drift budget for somebody else's trainer: what presses on each step, and the factor and the certificate at the end.

Every optimizer step also learns from a window of base text: the drift of the served law there, times a multiplier that
rises while the drift is above the budget. When the training ends, the adapter is shrunk by one factor so that the drift
measured on other base text is within the budget, and what was measured is certified. It is the same ascent and the same
factor as in `tether learn --adapter`; the loop, the optimizer, the data and the domain's loss are the trainer's own.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from tether.causal.fingerprint import renew_fingerprint
from tether.causal.modeling import CausalQwenForCausalLM
from tether.causal.softmax import softmax_kl
from tether.delta.adapter import Adapter
from tether.delta.adapter_ascent import Ascent
from tether.delta.adapter_drift import logits
from tether.delta.adapter_layers import Plain
from tether.delta.adapter_scaling import fold
from tether.delta.adapter_serving import save_adapted, serve
from tether.delta.budget import Budget
from tether.delta.cache import hidden_states
from tether.delta.certificate import Certificate, certify
from tether.delta.foreign import Foreign, amounts_to, refuse_quantised
from tether.delta.foreign_config import REDONE, read_fields
from tether.delta.gate import check_windows
from tether.delta.leashing import PROBE, carrying, leash_plain
from tether.delta.material import HELD_OUT
from tether.delta.recomputing import as_served
from tether.delta.unadapted import without_adapters
from tether.delta.windows import Windows, window_text
from tether.errors import CheckpointError, ConfigError, TetherError
from tether.names import check_name
from tether.processes import alone
from tether.store.documents import cut_documents, documents_of, text_hash, write_documents
from tether.store.opened import Text
from tether.store.place import check_free

__all__ = ["TrainerLeash"]

CERTIFIED = 4
"""Times as many tokens as the budget is met on are certified, of the same base text."""


class TrainerLeash(TrainerCallback):  # type: ignore[misc]
    """The budget of a training; give it to a trainer that has `tether.LeashedTrainer` mixed in.

    Cost of a step, beside the trainer's own: a forward pass of the base and a forward and backward pass of the adapted
    model over `base_batch` windows. At the end: what `tether.leash_adapter` costs, and a certificate over base text.

    Args:
        base_texts: general text that the model shall keep treating as it does: a file or a list of documents. The fit
            sees three fifths of it; the budget is met on the rest.
        budget: mean drift allowed there, nats of softmax KL a token, or a `Budget` in softmax with a quantile.
        out: folder to write at the end, new or empty: `adapter` (for PEFT and `tether fuse`), `served` (for
            `AutoModelForCausalLM` and `tether generate`) and `certificate.json` (for `tether verify`); None writes
            nothing.
        texts: text of the domain, for a gate and a sample; None leaves both out.
        name: of the domain.
        window: tokens a context of base text.
        tokens: of base text that the budget is met on.
        base_batch: windows of base text a step.
        sample: whether the adapter carries a few documents of `texts`; not for private text.
        seed: of the order of base text.

    Attributes:
        adapter: the adapter within its budget, with its record, once the training has ended.
        certificate: what was certified, where `out` is given.

    Raises:
        ConfigError: a budget that is not positive or in another metric, or a name that is none for a domain.
    """

    def __init__(
        self,
        base_texts: str | Path | Sequence[str],
        *,
        budget: float | Budget = 0.05,
        out: str | Path | None = None,
        texts: str | Path | Sequence[str] | None = None,
        name: str = "adapter",
        window: int = 256,
        tokens: int = PROBE,
        base_batch: int = 1,
        sample: bool = True,
        seed: int = 0,
    ) -> None:
        self.budget = budget if isinstance(budget, Budget) else Budget(value=budget)
        if self.budget.value is None or self.budget.hard or self.budget.metric != "softmax":
            raise ConfigError(
                f"{self.budget}: expected a budget in softmax for the mean or a quantile of the drift, which is what a "
                "trainer's model shows"
            )
        self.base_texts, self.texts = documents_of(base_texts), None if texts is None else documents_of(texts)
        self.out, self.name = None if out is None else Path(out), check_name(name)
        self.window, self.tokens, self.base_batch, self.sample = window, tokens, base_batch, sample
        self.generator = torch.Generator().manual_seed(seed)
        self.ascent = Ascent(self.budget)
        self.adapter: Adapter | None = None
        self.certificate: Certificate | None = None
        self._trainer: Any = None
        self._base: Any = None

    def attach(self, trainer: Any) -> None:
        """Look at a trainer and refuse what the budget cannot be held for, before it trains.

        Args:
            trainer: a `transformers.Trainer`, made; its model is PEFT's.

        Raises:
            ConfigError: the model is none of PEFT's or is quantised, the adapter trains more than a LoRA below the
                output head, or the base cannot be wrapped.
            CheckpointError: the kind of the adapter is refused, see `tether.delta.foreign_config`.
        """  # noqa: DOC502 - raised by what it calls
        self._trainer = trainer
        peft = self._peft()
        if not hasattr(peft, "peft_config"):
            raise ConfigError(
                f"a trainer of a {type(peft).__name__}: expected a LoRA on a frozen base, which the drift is "
                "measured from; give the trainer peft_config=LoraConfig(...), or leash the trained model afterwards "
                "with 'tether leash'"
            )
        refuse_quantised(peft.get_base_model())
        self._base = CausalQwenForCausalLM.from_backbone(without_adapters(peft))
        self._check(peft)
        self._plain()
        if self.out is not None:
            check_free(self.out)
            if not self._base.config.get_text_config(decoder=True).name_or_path:
                raise ConfigError(
                    "the base has no name_or_path, by which what is served would find it again: load it by "
                    "from_pretrained, or leave out=... away"
                )
        processing = trainer.processing_class
        self._tokenizer = getattr(processing, "tokenizer", processing)
        if self._tokenizer is None:
            raise ConfigError(
                "the trainer has no processing_class: give it the tokenizer, which base text is read with"
            )
        parts = cut_documents(self.base_texts, 1 - HELD_OUT)
        self._fitted, self._held_out = (
            window_text(part, self._tokenizer, length=self.window, name="the base text") for part in parts
        )
        self._own: Windows | None = None
        if self.texts is not None:
            self._own = window_text(self.texts, self._tokenizer, length=self.window, name="the domain text")
            check_windows(len(self._own.starts) - 1)
        self.generator.manual_seed(self.generator.initial_seed() + trainer.accelerator.process_index)

    def pressed(self, model: nn.Module) -> Tensor:
        """Compute what a step shall be penalised for, on windows of base text drawn at random.

        Args:
            model: as the trainer trains it.

        Returns:
            The multiplier times the drift, nats, with a gradient.
        """
        rows = torch.randint(len(self._fitted.starts) - 1, (self.base_batch,), generator=self.generator)
        batch = self._fitted.batch(rows)
        with torch.no_grad():
            before = logits(self._base, hidden_states(self._base, batch)[batch.mask]).log_softmax(-1)
        ids = batch.input_ids.to(before.device)
        # The drift that is served is without dropout.
        with as_served(model):
            scores = model(input_ids=ids, use_cache=False).logits[batch.mask.to(before.device)]
        after = scores.float().log_softmax(-1)
        drifts = softmax_kl(before, after)
        seen = self._trainer.accelerator.reduce(self.budget.statistic(drifts.detach()), reduction="mean")
        self.ascent.see(float(seen))
        return self.ascent.multiplier * self.budget.pressed(drifts)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from the multiplier of an interrupted training, which its log has.

        Args:
            args: of the trainer.
            state: of the training.
            control: not touched.
            kwargs: not read.
        """
        logged = [entry["leash_multiplier"] for entry in state.log_history if "leash_multiplier" in entry]
        if state.global_step and logged:
            self.ascent.go_on_from(logged[-1])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer to the drift, once the first eighth of the steps is over.

        Args:
            args: of the trainer.
            state: of the training.
            control: not touched.
            kwargs: not read.
        """
        if state.global_step > max(1, state.max_steps // 8):
            self.ascent.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shrink the adapter to its budget, in the trainer's model too, and write and certify it.

        Args:
            args: of the trainer.
            state: of the training.
            control: not touched.
            kwargs: not read.

        Raises:
            TetherError: no factor was found at which it is within its budget, or the base's own weights were trained
                too; the adapter as it was trained is in `output_dir` then.
        """  # noqa: DOC502 - raised by what it calls
        from accelerate.utils import broadcast_object_list

        peft, accelerator = self._peft(), self._trainer.accelerator
        factor: list[Any] = [None]
        if accelerator.is_main_process:
            try:
                with alone():
                    self.adapter = self._leashed()
            except TetherError as error:
                # What was trained for hours is not lost with the script that ends here.
                kept = Path(args.output_dir) / "unleashed"
                peft.save_pretrained(kept)
                raise type(error)(f"{error}. The adapter as it was trained is in {kept}") from error
            factor = [self.adapter.record["factor"]]
        broadcast_object_list(factor)
        fold(peft, peft.active_adapter, factor[0])
        if accelerator.is_main_process and self.out is not None:
            with alone():
                self._write(self.out)
        accelerator.wait_for_everyone()

    def _peft(self) -> Any:
        return self._trainer.accelerator.unwrap_model(self._trainer.model)

    # What the adapter would have to be for its base to stay as it is while it trains.
    def _check(self, peft: Any) -> None:
        config = peft.peft_config[peft.active_adapter]
        start = config.init_lora_weights
        if isinstance(start, str) and start.lower() in REDONE:
            raise ConfigError(
                f"init_lora_weights={start!r} changes the base that the drift is measured from: train from the usual "
                "start, or without this leash, and leash the saved adapter with 'tether leash'"
            )
        if config.bias != "none" or config.modules_to_save or config.trainable_token_indices:
            raise ConfigError(
                "bias, modules_to_save or trainable_token_indices train parts of the base that the drift is measured "
                "from: leave them out (lora_bias=True learns biases too)"
            )

    def _plain(self) -> Plain:
        from peft import get_peft_model_state_dict

        peft = self._peft()
        with warnings.catch_warnings():
            # PEFT 0.21 takes the bias of B for a matrix that has lost a side.
            warnings.filterwarnings("ignore", message="Adapter .* LoRA tensor.* have invalid shape")
            held = get_peft_model_state_dict(
                peft, adapter_name=peft.active_adapter, save_embedding_layers=False
            )
        fields = read_fields(peft.peft_config[peft.active_adapter].to_dict(), "the trainer's adapter")
        tensors = {name: values.detach().cpu() for name, values in held.items()}
        return amounts_to(Foreign(fields, tensors, "the trainer's adapter"), self._base)

    def _leashed(self) -> Adapter:
        # Where several processes train, each has the weights of the first written over its own equal ones.
        before = self._base.config.base_fingerprint
        if renew_fingerprint(self._base) != before:
            raise CheckpointError(
                "the base's own weights have changed while the adapter was trained, so there is no drift from it to "
                "measure: freeze all but the adapter"
            )
        hashes = {"base": text_hash(self.base_texts)}
        about = {
            "trainer": type(self._trainer).__name__,
            "steps": self._trainer.state.global_step,
            "multiplier": self.ascent.multiplier,
        }
        made = leash_plain(
            self._base, self._plain(), self.name, self._held_out, self.budget, tokens=self.tokens, about=about,
            hashes=hashes,
        )  # fmt: skip
        if self._own is None or self.texts is None:
            return made
        made.record["texts"]["domain"] = text_hash(self.texts)
        return carrying(self._base, made, self._own, self.texts, self._tokenizer, sample=self.sample)

    def _write(self, out: Path) -> None:
        assert self.adapter is not None
        text = self.base_texts
        if not isinstance(text, Text) or text.path is None:
            write_documents(out / "base-text.jsonl", text)
            text = documents_of(out / "base-text.jsonl")
        self.adapter = self.adapter.save(out / "adapter")
        alone = {self.adapter: 1.0}
        served = serve(self._base, alone, by="sum", gated=False)
        name = self._base.config.get_text_config(decoder=True).name_or_path
        save_adapted(served, alone, self._tokenizer, out / "served", base=name)
        self.certificate = certify(
            self._base, served, self._tokenizer, {"base-text": text}, window=self.window,
            tokens=CERTIFIED * self.tokens,
        )  # fmt: skip
        self.certificate.save(out / "certificate.json")
