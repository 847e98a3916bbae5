"""Adapters put into a twin of a model's backbone: their states, strengths and weights."""

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tether.causal.offloading import refuse_offloaded
from tether.causal.quantising import packed, scales_of
from tether.delta.adapter import Adapter
from tether.delta.adapter_scaling import fold, set_strength
from tether.errors import CheckpointError

__all__ = ["Attached", "frozen_twin"]


class Attached:
    """A twin of a model's backbone with adapters in it; weights are shared, and the model stays as it is.

    Args:
        model: the base.
        name: of the first adapter.
        config: its `LoraConfig`; its weights start as PEFT starts them, drawn from `generator`.
        generator: of the start.

    Attributes:
        peft: PEFT's model around the twin.
    """

    def __init__(self, model: Any, name: str, config: Any, generator: torch.Generator | None = None) -> None:
        from peft import get_peft_model

        refuse_offloaded(model, "an adapter")
        self.slots: dict[str, str] = {}
        self._learnt: dict[Any, Tensor] = {}
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(model.backbone.config, trust_remote_code=False)
        if (packing := packed(model)) is not None:
            # By these PEFT knows that layers are packed.
            shell.is_loaded_in_4bit, shell.is_loaded_in_8bit = packing.bits == 4, packing.bits == 8
        copies: dict[int, Any] = {}
        setattr(shell, shell.base_model_prefix, frozen_twin(model.backbone, copies))
        self._shared = [(module, copies[id(module)]) for module in model.backbone.modules()]
        # PEFT draws from the global generator; it is put back, and the draw is replaced.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5.23 for a property under its old name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            # An adapter with biases has them in layers too whose base has none: what that keeps PEFT from is merging.
            warnings.filterwarnings("ignore", message="`lora_bias=True` was passed but")
            self.peft = get_peft_model(shell, _bare(config), adapter_name=self.slot(name)).eval()
        self.backbone: nn.Module = getattr(shell, shell.base_model_prefix)
        if generator is not None:
            for key, values in sorted(self.peft.named_parameters()):
                if f"lora_A.{self.slot(name)}" in key:
                    # Drawn on the CPU, so that a seed gives the same start on every device.
                    start = torch.empty(values.shape)
                    nn.init.kaiming_uniform_(start, a=5**0.5, generator=generator)
                    with torch.no_grad():
                        values.copy_(start)

    @staticmethod
    def of(model: Any, adapters: Mapping[str, Adapter]) -> "Attached":
        """Put learnt adapters into a twin of a model's backbone.

        Args:
            model: the base.
            adapters: by the name they get.

        Returns:
            The twin with all of them.

        Raises:
            CheckpointError: an adapter's weights do not fit the backbone.
        """
        from peft import set_peft_model_state_dict

        first, *others = adapters
        made = Attached(model, first, adapters[first].config)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`lora_bias=True` was passed but")
            for name in others:
                made.peft.add_adapter(made.slot(name), _bare(adapters[name].config))
        for name, adapter in adapters.items():
            # Shapes are checked here, since PEFT's own message names neither file nor way out.
            expected = {key: values.shape for key, values in made.weights(name).items()}
            if {key: values.shape for key, values in adapter.tensors.items()} != expected:
                raise CheckpointError(
                    f"adapter {adapter.name!r}: its weights do not fit this backbone "
                    f"({len(adapter.tensors)} tensors, {len(expected)} expected); learn it again on this base"
                )
            set_peft_model_state_dict(made.peft, adapter.tensors, adapter_name=made.slot(name))
        made.peft.eval().requires_grad_(False)
        return made

    def follow(self, move: Callable[[Tensor], Tensor]) -> None:
        """Move with the backbone, whose weights have just been moved: share them again, and move the adapters.

        Args:
            move: what was done to each tensor, for example to bring it to a device.
        """
        for module, twin in self._shared:
            for name, values in module.named_parameters(recurse=False):
                own = (
                    nn.Parameter(values.detach(), requires_grad=False)
                    if values.is_floating_point()
                    else values
                )
                twin.register_parameter(name, own)
            for name, values in module.named_buffers(recurse=False):
                setattr(twin, name, values)
        for module in self.peft.modules():
            for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
                if isinstance(adapters := getattr(module, part, None), nn.ModuleDict):
                    adapters._apply(move)

    def slot(self, name: str) -> str:
        """Give the name that PEFT knows an adapter under: a domain's own may hold dots, or letters of PEFT's.

        Args:
            name: of the adapter.

        Returns:
            The same each time.
        """
        return self.slots.setdefault(name, f"domain_{len(self.slots)}")

    def rescale(self, name: str, factor: float) -> None:
        """Let an adapter act by a factor of what its weights say.

        Args:
            name: of the adapter.
            factor: any finite number.
        """
        set_strength(self.peft, self.slot(name), factor, self._learnt)

    def fold(self, name: str, factor: float) -> None:
        """Make a factor part of an adapter's weights.

        Args:
            name: of the adapter.
            factor: any finite number.
        """
        self.rescale(name, 1.0)
        fold(self.peft, self.slot(name), factor)
        self._learnt = {}

    def weights(self, name: str) -> dict[str, Tensor]:
        """Give an adapter's weights under PEFT's names.

        Args:
            name: of the adapter.

        Returns:
            Its state dict.
        """
        from peft import get_peft_model_state_dict

        with warnings.catch_warnings():
            # PEFT 0.21 takes the bias of B for a matrix that has lost a side.
            warnings.filterwarnings("ignore", message="Adapter .* LoRA tensor.* have invalid shape")
            kept = get_peft_model_state_dict(
                self.peft, adapter_name=self.slot(name), save_embedding_layers=False
            )
        return dict(kept)

    def states(self, name: str, input_ids: Tensor | None = None, **options: Any) -> Any:
        """Run the backbone with one adapter.

        Args:
            name: which.
            input_ids: shape (B, T); or `inputs_embeds` among the options.
            options: for the backbone; without a cache unless given.

        Returns:
            The backbone's output.
        """
        if self.peft.active_adapter != self.slot(name):
            self.peft.set_adapter(self.slot(name), inference_mode=True)
        return self.backbone(input_ids=input_ids, **{"use_cache": False, **options})


def _bare(config: Any) -> Any:
    # PEFT warns where the model's name is not the one that an adapter was learnt under; the fingerprint is checked.
    config = copy.deepcopy(config)
    config.base_model_name_or_path = None
    return config


def frozen_twin(module: nn.Module, copies: dict[int, Any] | None = None) -> Any:
    """Copy a module without its weights: own Parameter objects, which need no gradient, on the same storage.

    What is done to the twin, frozen, trained around or given adapters, does not reach the module.

    Args:
        module: any module.
        copies: is filled with what was made of each part, by the part's `id`.

    Returns:
        The twin.
    """
    shared = {} if copies is None else copies
    # Weights that are packed in whole numbers never ask for a gradient, and know what they were packed with.
    shared |= {
        id(p): nn.Parameter(p.detach(), requires_grad=False) if p.is_floating_point() else p
        for p in module.parameters()
    }
    shared |= {id(buffer): buffer for buffer in module.buffers()}
    shared |= {id(each): each for part in module.modules() for each in scales_of(part)}
    return copy.deepcopy(module, shared)
