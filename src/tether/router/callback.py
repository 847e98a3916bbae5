"""Shaping in a stock `transformers.Trainer`: a callback that adds the term to the loss and names dead experts."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from tether.errors import ConfigError
from tether.router.course import RoutingCourse, describe
from tether.router.journal import write_course
from tether.router.options import Shaping

__all__ = ["RoutingCallback"]


class RoutingCallback(TrainerCallback, ExportableState):  # type: ignore[misc]  # transformers has no types
    """Shapes the routers of the mixture of experts that a `transformers.Trainer` trains.

    The term is added to the loss that the model itself returns, so the logged loss has it in it. Every 20 steps the
    experts that are dead are named, if they are others than before, by a warning of the logger `tether.router.course`.
    At the end `routing.json` and `routing.png` in the output folder say what became of the experts. A training that is
    resumed from a checkpoint with the same options goes on with what the shaper had learnt.

    Args:
        form: one of `tether.router.options.FORMS` but `bias`; `none` only measures.
        cost: one of `tether.router.cost.COSTS`.
        lam: strength, finite, >= 0; useful from 0.003 to 0.03.

    Attributes:
        course: what the training's routing has been so far.

    Raises:
        ConfigError: on construction, options that are unknown, out of range or without effect; when the training
            begins, a model without experts, frozen routers, or an optimizer that does not know the experts; and at a
            step, a model that returns no loss, as where Trainer smooths labels or has a `compute_loss_func`.
    """

    def __init__(self, form: str = "balance", cost: str = "information", lam: float = 0.01) -> None:
        self.course = RoutingCourse(Shaping(form=form, cost=cost, lam=lam))
        self._hook: Any = None
        self._arguments: TrainingArguments | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        """Attach to the model and the optimizer.

        Args:
            args: of the training.
            state: of the training; one that is resumed brings what was saved.
            control: of the training.
            model: the mixture of experts.
            optimizer: that steps it.

        Raises:
            ConfigError: the routers cannot be shaped in this way.
        """  # noqa: DOC502 - raised by RoutingCourse
        self._detach()
        self.course.check(model)
        self.course.begin(model, optimizer)
        kept = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if isinstance(kept, dict) and kept.get("args") == self.course.settings and "saved" in kept:
            self.course.load_state_dict(kept["saved"])
        self._arguments = args
        self._hook = model.register_forward_hook(self._add, with_kwargs=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Note a step, and name the dead.

        Args:
            args: of the training.
            state: of the training.
            control: of the training.
        """
        self.course.after_step(state.global_step, state.global_step >= state.max_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write what became of the experts, and detach.

        Args:
            args: of the training.
            state: of the training.
            control: of the training.
        """
        self._detach()
        report = self.course.report()
        if report and state.is_world_process_zero:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_course(folder, report)
            self.course.say(describe(report))

    def state(self) -> dict[str, Any]:
        """Give what Trainer saves of a callback.

        Returns:
            JSON: the options, and what the shaper has learnt.
        """
        # Not among the attributes, which Trainer sets by itself, and only where it is asked to.
        saved = {} if self._hook is None else {"saved": self.course.state_dict()}
        return {"args": self.course.settings, "attributes": {}, **saved}

    def _add(self, model: nn.Module, _: Any, given: dict[str, Any], output: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return None
        loss = output.get("loss") if isinstance(output, dict) else None
        if loss is None:
            raise ConfigError(
                "the model returned no loss in a training step, so that no term can be added to it, as where labels "
                "are smoothed or a compute_loss_func is given: leave those out, or use RoutingShaper in your "
                "compute_loss"
            )
        mask = given.get("attention_mask")
        term = self.course.loss(mask if isinstance(mask, Tensor) and mask.dim() == 2 else None, loss)
        output["loss"] = loss + term * self._share(given)
        return output

    def _share(self, given: dict[str, Any]) -> float:
        # A loss that was divided by the labels of the whole step is neither averaged over the parts of it that are
        # accumulated nor over processes; the term is a mean over tokens, and has to be.
        args = self._arguments
        if args is None or given.get("num_items_in_batch") is None:
            return 1.0
        processes: int = args.world_size if args.average_tokens_across_devices else 1
        accumulated: int = args.gradient_accumulation_steps
        return 1 / (accumulated * processes)

    def _detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self.course.close()
