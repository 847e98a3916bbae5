"""What is trained and on which loss: options, the parts of the model, a step's loss."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tether.causal.dataset import count_labels
from tether.causal.losses import IGNORE, ovr_loss
from tether.causal.modeling import CausalOutput, CausalQwenForCausalLM
from tether.causal.offloading import refuse_offloaded
from tether.causal.quantising import refuse_packed
from tether.causal.term import Term
from tether.errors import ConfigError

__all__ = ["Objective", "TrainOptions", "half_backbone", "parameter_groups", "select"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """Options of a training.

    Attributes:
        part: `head` learns abduction, value head, a class weight that is the head's own, the bias of classes
            and the direction of numbers, on a frozen backbone; `all` learns the backbone too. A class weight
            tied to the embedding belongs to the backbone.
        mode: `softmax` learns by cross-entropy of softmax(loc_S), `deterministic` by the one-vs-rest loss; None takes
            the model's (`CausalQwenConfig.mode`).
        untie: give the head a class weight of its own first, a copy of the embedding, so that `head` learns it.
        learn_threshold: learn C_k and the class noise too; mode `deterministic` only.
        fit_values: after the last step, fit the value head to the text's numbers in closed form, see
            `tether.causal.readout`; costs a pass over the text.
        samples: classes drawn for the sampled one-vs-rest loss; None takes the exact one.
        steps: optimizer steps; None takes `epochs`.
        epochs: passes over the text, where `steps` is None.
        batch: windows a step, over all processes and accumulated parts.
        accumulate: parts that each process computes a step's gradient in.
        window: tokens a window.
        packed: whether windows may hold several documents, which do not see each other, see `make_examples`.
        lr: peak learning rate; for thresholds and class noise, relative to their size at the start.
        warmup: share of the steps in which the rate rises, in [0, 1); then it falls as a cosine, to 0.
        weight_decay: of the backbone's matrices. The head starts as the identity and is not pulled to 0.
        clip: largest norm of the gradient.
        mixed_precision: `bf16` runs the backbone under autocast; the head and all losses stay in float32.
        seed: of orders, dropout and drawn classes.
        save_every: steps between saved states.
    """

    part: Literal["head", "all"] = "head"
    mode: Literal["softmax", "deterministic"] | None = None
    untie: bool = False
    learn_threshold: bool = False
    fit_values: bool = False
    samples: int | None = None
    steps: int | None = None
    epochs: int = 1
    batch: int = 8
    accumulate: int = 1
    window: int = 256
    packed: bool = False
    lr: float = 1e-4
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    mixed_precision: Literal["no", "bf16"] = "no"
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        for field, known in (
            ("part", ("head", "all")),
            ("mode", (None, "softmax", "deterministic")),
            ("mixed_precision", ("no", "bf16")),
        ):
            if getattr(self, field) not in known:
                raise ConfigError(
                    f"{field}={getattr(self, field)!r}: expected one of {', '.join(map(str, known))}"
                )
        counts = ("steps", "epochs", "batch", "accumulate", "save_every")
        given = {field: getattr(self, field) for field in counts}
        if low := [f"{field}={count}" for field, count in given.items() if count is not None and count < 1]:
            raise ConfigError(f"{', '.join(low)}: expected at least 1")
        sizes = (self.lr, self.clip, self.weight_decay)
        if not (
            all(map(math.isfinite, sizes))
            and min(sizes) >= 0
            and self.lr
            and self.clip
            and 0 <= self.warmup < 1
        ):
            raise ConfigError(
                f"lr={self.lr}, clip={self.clip}, weight_decay={self.weight_decay}, warmup={self.warmup}: expected "
                "lr and clip > 0, weight_decay >= 0, warmup in [0, 1)"
            )
        if self.mode == "softmax" and (self.learn_threshold or self.samples is not None):
            raise ConfigError(
                "learn_threshold or samples with mode 'softmax', whose loss has no threshold and no sampled form: "
                "take mode 'deterministic', or leave them out"
            )
        if self.samples is not None and self.samples < 2:
            raise ConfigError(f"samples={self.samples}: expected at least 2, or none for the exact loss")

    def on(self, model: CausalQwenForCausalLM) -> "TrainOptions":
        """Settle what the model decides.

        Args:
            model: to be trained.

        Returns:
            The options with a mode.

        Raises:
            ConfigError: the model's own mode has no loss, or does not go with the other options.
        """
        mode = self.mode or model.config.mode
        if mode == "causal":
            raise ConfigError(
                "the model's mode is 'causal', in which individuals act and nothing is learnt: give mode 'softmax' or "
                "'deterministic'"
            )
        return replace(self, mode=mode)

    def total(self, windows: int) -> int:
        """Count the optimizer steps.

        Args:
            windows: how many windows the text has.

        Returns:
            `steps`, or what `epochs` come to.
        """
        return self.steps or math.ceil(self.epochs * windows / self.batch)

    def rate(self, step: int, steps: int) -> float:
        """Give the learning rate of a step as a share of the peak.

        Args:
            step: from 0.
            steps: of the training.

        Returns:
            A share in (0, 1].

        Example:
            >>> options = TrainOptions(warmup=0.5)
            >>> [round(options.rate(step, 4), 3) for step in range(4)]
            [0.5, 1.0, 1.0, 0.5]
        """
        rising = math.floor(self.warmup * steps)
        if step < rising:
            return (step + 1) / rising
        return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / max(steps - rising, 1))


def select(model: CausalQwenForCausalLM, options: TrainOptions) -> dict[str, nn.Parameter]:
    """Mark what is trained, and untie the class weight where that is asked for.

    Args:
        model: changed: `requires_grad` of all parameters, and the class weight.
        options: see there.

    Returns:
        The trained parameters by name; tied ones once.

    Raises:
        ConfigError: the model is fused, or a trained weight is of half precision.
    """
    if model.fusion is not None:
        raise ConfigError(
            "a model with fused deltas, which are bound to the weights they were learnt on: train the base, then "
            "learn deltas on it"
        )
    refuse_packed(model, "a training")
    refuse_offloaded(model, "a training")
    tied = model.action.weight is model.get_input_embeddings().weight
    if options.untie and tied:
        model.action.weight = nn.Parameter(model.action.weight.detach().clone())
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    backbone = {id(parameter) for parameter in model.backbone.parameters()}
    trained = {}
    for name, parameter in model.named_parameters():
        wanted = options.part == "all" if id(parameter) in backbone else True
        if name.startswith("numeric."):
            wanted = model.config.num_token_id is not None
        if name in {"action.threshold", "action.class_noise"}:
            wanted = options.learn_threshold
        parameter.requires_grad_(wanted)
        if wanted:
            trained[name] = parameter
    if half := [name for name, parameter in trained.items() if parameter.dtype.itemsize < 4]:
        raise ConfigError(
            f"{len(half)} trained parameters are {trained[half[0]].dtype}, such as {half[0]}: small steps would be "
            "lost in them; load the model with dtype=torch.float32 (mixed_precision='bf16' keeps the speed)"
        )
    return trained


def parameter_groups(
    model: CausalQwenForCausalLM, trained: dict[str, nn.Parameter], options: TrainOptions
) -> list[dict[str, Any]]:
    """Group parameters by learning rate and decay, as `torch.optim` takes them.

    Args:
        model: whose parameters they are.
        trained: from `select`.
        options: see there.

    Returns:
        One group a parameter, with its peak rate under `peak`.
    """
    embedding = model.get_input_embeddings().weight
    groups = []
    for name, parameter in trained.items():
        matrix = name.startswith("backbone.") and parameter.dim() > 1 and parameter is not embedding
        # A threshold is thousands of logits: a step of `lr` logits would not move it.
        limit = name in {"action.threshold", "action.class_noise"}
        size = max(float(parameter.detach().abs().mean()), 1.0) if limit else 1.0
        groups.append(
            {
                "params": [parameter],
                "lr": options.lr * size,
                "peak": options.lr * size,
                "weight_decay": options.weight_decay if matrix else 0.0,
            }
        )
    return groups


@contextmanager
def half_backbone(model: CausalQwenForCausalLM, device: str, precision: str) -> Iterator[None]:
    """Run the backbone, and nothing after it, under autocast: the tails of Cauchy laws need float32.

    Args:
        model: its backbone is changed inside the block.
        device: type of the device.
        precision: `bf16`, or `no` for no change.

    Yields:
        Nothing.
    """
    if precision == "no":
        yield
        return
    forward = model.backbone.forward

    def cast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, torch.bfloat16):
            outputs = forward(*args, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state.float()
        return outputs

    model.backbone.forward = cast
    try:
        yield
    finally:
        del model.backbone.forward


class Objective(nn.Module):
    """A part's share of a step's loss: sums over its labels, divided by the counts of the whole step.

    So the shares of all parts and processes add up to the loss of the step taken in one piece, whatever
    the labels of each part.

    Args:
        model: the model.
        options: see `TrainOptions`.
        term: what is added beside the losses, or None.
        share: what the term's mean over a part counts in the step.
    """

    def __init__(
        self,
        model: CausalQwenForCausalLM,
        options: TrainOptions,
        term: Term | None = None,
        share: float = 1.0,
    ) -> None:
        super().__init__()
        self.model, self.mode, self.samples = model, options.mode or model.config.mode, options.samples
        self.term, self.share = term, share

    def forward(self, batch: dict[str, Tensor], labels: int, numbers: int) -> tuple[Tensor, Tensor]:
        """Compute the share.

        Args:
            batch: from `Examples.collate`.
            labels: labels of the whole step.
            numbers: labels of the whole step that are `<NUM>`.

        Returns:
            The share, in nats, and a record of its class part, its value part and the term, shape (3,), without
            gradients.
        """
        if self.samples is None:
            out = self.model(**batch, mode=self.mode, use_cache=False, return_logits=False)
            class_loss, value_loss = out.class_loss, out.value_loss
        else:
            out, class_loss, value_loss = self._sampled(batch)
        own, numeric = count_labels(batch["labels"], self.model.config.num_token_id)
        class_share = class_loss * (own / max(labels, 1))
        total = class_share
        if out.aux_loss is not None:
            # Routing of a mixture-of-experts backbone, where its config asks for it: a mean over tokens.
            total = total + self.model.config.router_aux_loss_coef * out.aux_loss * (own / max(labels, 1))
        value_share = added = class_share.new_zeros(())
        if value_loss is not None:
            value_share = value_loss * (numeric / max(numbers, 1))
            total = total + self.model.config.value_loss_weight * value_share
        if self.term is not None:
            added = self.share * self.term.loss(batch.get("attention_mask"), total)
            total = total + added
        return total, torch.stack([part.detach() for part in (class_share, value_share, added)])

    def _sampled(self, batch: dict[str, Tensor]) -> tuple[CausalOutput, Tensor, Tensor | None]:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        out = self.model(**inputs, use_cache=False, return_logits=False)
        targets = batch["labels"][:, 1:]
        kept = targets != IGNORE
        loc, scale = out.latent_loc[:, :-1][kept], out.latent_log_scale[:, :-1][kept].exp()
        action, targets = self.model.action, targets[kept]
        noise = action.noise_scale
        class_loss = ovr_loss(
            loc,
            scale,
            action.weight,
            targets,
            threshold=self.model._threshold(loc),
            class_noise=noise if len(noise) > 1 else noise.squeeze(),
            bias=action.bias,
            impl="sampled",
            samples=self.samples or 2,
        )
        if "numeric_values" not in batch:
            return out, class_loss, None
        here = targets == self.model.config.num_token_id
        values = batch["numeric_values"][:, 1:][kept][here]
        return out, class_loss, self.model._value_loss(self.mode, loc[here], scale[here], values)
