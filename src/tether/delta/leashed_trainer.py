"""The mix-in that lets transformers' `Trainer` and TRL's trainers learn under a drift budget."""

from typing import Any

from torch import nn

from tether.delta.trainer_leash import TrainerLeash

__all__ = ["LeashedTrainer"]


class LeashedTrainer:
    """Mix-in, before a trainer: `class Leashed(LeashedTrainer, SFTTrainer): ...`.

    Args:
        args: of the trainer.
        leash: the budget.
        options: of the trainer.
    """

    def __init__(self, *args: Any, leash: TrainerLeash, **options: Any) -> None:
        super().__init__(*args, **options)
        self.leash = leash
        leash.attach(self)
        trainer: Any = self
        trainer.add_callback(leash)

    def training_step(self, model: nn.Module, *args: Any, **options: Any) -> Any:
        """Learn from a batch as the trainer does; at the end of an optimizer step, from base text too.

        Two backward passes, so that the graphs of both texts are never held at once.

        Args:
            model: as the trainer trains it.
            args: of the trainer.
            options: of the trainer.

        Returns:
            The trainer's own loss.
        """
        trainer: Any = self
        loss = super().training_step(model, *args, **options)  # type: ignore[misc]
        if trainer.accelerator.sync_gradients:
            with trainer.compute_loss_context_manager():
                pressed = self.leash.pressed(model)
            trainer.accelerator.backward(pressed)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Put drift and multiplier beside the trainer's own figures.

        Args:
            logs: figures.
            args: of the trainer.
            options: of the trainer.
        """
        if "loss" in logs and self.leash.ascent.drift is not None:
            logs |= {"leash_drift": self.leash.ascent.drift, "leash_multiplier": self.leash.ascent.multiplier}
        super().log(logs, *args, **options)  # type: ignore[misc]
