"""Gram matrices of every linear layer's inputs, one decoder layer in memory at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tether.errors import CheckpointError, ConfigError
from tether.merge.packing import Pack
from tether.merge.towers import FAMILIES, find_linears, find_tower
from tether.store.reader import CheckpointReader
from tether.store.writer import write_safetensors

__all__ = ["LayerGrams", "gram_file", "gram_location", "load_grams", "save_grams", "stream_grams"]


class LayerGrams(NamedTuple):
    """Input statistics of one decoder layer.

    Attributes:
        layer: which layer, from 0.
        grams: full module name to ``sum_t w_t x_t x_t^T`` over the weighted tokens, shape (d_in, d_in),
            float32; modules that read the same input share one tensor.
    """

    layer: int
    grams: dict[str, Tensor]


class _Stopped(Exception):  # noqa: N818 - it ends a pass, it is no error
    """Raised at the end of the tower: what follows is not needed."""


@torch.no_grad()
def stream_grams(
    model: Any,
    packs: Iterable[Pack],
    *,
    weights: Callable[[Pack], Tensor] | None = None,
    families: Sequence[str] = FAMILIES,
    head: bool = False,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> Iterator[LayerGrams]:
    """Accumulate Gram matrices layer by layer.

    All packs go through the embeddings first; then each decoder layer runs on all of them with its own
    arguments (mask, positions) before the next one does. Held at a time: the hidden states of all packs, the
    Gram matrices of one layer.

    Args:
        model: in evaluation mode.
        packs: sequences; see `tether.merge.packing`.
        weights: weight of each position of a pack, shape (S,), non-negative; None counts each position once.
        families: which linear layers.
        head: also the output head, whose inputs pass the decoder's last norm; it comes after the layers.
        on_step: called with `done` and `total` layers.

    Yields:
        The layers in order.

    Raises:
        ConfigError: no packs, or families that name nothing.

    Reference:
        Jin et al. 2023 (RegMean), equation 2.
    """
    linears = find_linears(model, families)
    layers = find_tower(model).layers
    states, arguments, scales = [], [], []
    for pack in packs:
        hidden, per_layer = _entered(model, layers, pack)
        states.append(hidden)
        arguments.append(per_layer)
        scale = torch.ones(hidden.shape[1]) if weights is None else weights(pack).float()
        scales.append(scale.to(hidden.device))
    if not states:
        raise ConfigError("no sequences were given; expected at least one pack")
    for number, layer in enumerate(layers):
        sums = _Sums(linears[number])
        with sums:
            for i, hidden in enumerate(states):
                sums.scale = scales[i]
                args, kwargs = arguments[i][number]
                output = layer(hidden, *args, **kwargs)
                states[i] = output[0] if isinstance(output, tuple) else output
                arguments[i][number] = ((), {})
        yield LayerGrams(number, sums.grams)
        if on_step:
            on_step({"done": number + 1.0, "total": float(len(layers))})
    if head:
        output_layer = model.get_output_embeddings()
        name = next(name for name, module in model.named_modules() if module is output_layer)
        norm = model.get_decoder().norm
        total = sum(_weighted_gram(norm(hidden), scale) for hidden, scale in zip(states, scales, strict=True))
        yield LayerGrams(len(layers), {name: torch.as_tensor(total)})


def _weighted_gram(inputs: Tensor, scale: Tensor) -> Tensor:
    scaled = inputs.reshape(-1, inputs.shape[-1]).float() * scale.sqrt().unsqueeze(-1)
    return scaled.T @ scaled


# The hidden states that enter the first layer and the arguments that each layer is called with: every layer
# is replaced by the identity for one pass, so that this costs no more than the embeddings.
def _entered(
    model: Any, layers: nn.ModuleList, pack: Pack
) -> tuple[Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    entering: list[Tensor] = []

    def note(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        entering.append(hidden_states)
        seen.append((args, kwargs))
        if len(seen) == len(layers):
            raise _Stopped
        return hidden_states

    for layer in layers:
        layer.forward = note
    try:
        model(**pack.inputs, use_cache=False)
    except _Stopped:
        pass
    finally:
        for layer in layers:
            del layer.forward
    return entering[0], seen


class _Sums:
    """Hooks that add up the Gram matrices of one layer's modules, once for modules with the same input."""

    def __init__(self, modules: dict[str, nn.Linear]) -> None:
        self.grams: dict[str, Tensor] = {}
        self.scale = torch.ones(0)
        self._modules = modules
        self._leader: dict[str, str] = {}
        self._last: tuple[str, Tensor] | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name)))

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._last = None
        for name, leader in self._leader.items():
            self.grams[name] = self.grams[leader]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            del module
            x = args[0]
            if self._last is not None and self._last[1] is x:
                self._leader[name] = self._last[0]
                return
            self._last = (name, x)
            gram = _weighted_gram(x, self.scale)
            total = self.grams.setdefault(name, gram)
            if total is not gram:
                total += gram

        return add


def gram_file(folder: str | Path, layer: int) -> Path:
    """Name the file of one layer.

    Args:
        folder: of the matrices.
        layer: which layer; the number of layers for the head.

    Returns:
        The path.
    """
    return Path(folder) / f"gram-{layer:05d}.safetensors"


def save_grams(folder: str | Path, layers: Iterable[LayerGrams]) -> None:
    """Write Gram matrices, a file a layer, as they are made; layers that are there are kept.

    Args:
        folder: where to; made if missing.
        layers: from `stream_grams`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, grams in layers:
        if gram_file(folder, number).is_file():
            continue
        unique: dict[int, str] = {}
        aliases = {name: unique.setdefault(id(tensor), name) for name, tensor in grams.items()}
        tensors = {name: tensor for name, tensor in grams.items() if aliases[name] == name}
        metadata = {name: leader for name, leader in aliases.items() if leader != name}
        write_safetensors(gram_file(folder, number), tensors, metadata)


def load_grams(folder: str | Path, layer: int) -> LayerGrams:
    """Read the Gram matrices of one layer.

    Args:
        folder: that `save_grams` filled.
        layer: which layer.

    Returns:
        The matrices.

    Raises:
        CheckpointError: the file is missing or damaged, a matrix that it names is not in it, or one is not square or
            not of finite numbers.
    """
    file = gram_file(folder, layer)
    reader, aliases = _opened(file)
    if lost := sorted(set(aliases.values()) - set(reader.names)):
        raise CheckpointError(f"{file}: no Gram matrices of {', '.join(lost)}; accumulate them again")
    grams = {name: reader.tensor(name) for name in reader.names}
    for name, gram in grams.items():
        square = gram.dim() == 2 and gram.shape[0] == gram.shape[1] and gram.is_floating_point()
        if not square or not bool(gram.isfinite().all()):
            raise CheckpointError(
                f"{file}: {name} of {gram.dtype} and shape {tuple(gram.shape)} is no square matrix of finite numbers; "
                "accumulate them again"
            )
    return LayerGrams(layer, grams | {name: grams[leader] for name, leader in aliases.items()})


def gram_location(folder: str | Path, layer: int, module: str) -> tuple[Path, str]:
    """Say where the Gram matrix of a module lies, for readers that take one tensor.

    Args:
        folder: that `save_grams` filled.
        layer: the module's decoder layer.
        module: its full name.

    Returns:
        The safetensors file and the tensor's name in it.

    Raises:
        CheckpointError: the file is missing or damaged, or has no such module.
    """
    file = gram_file(folder, layer)
    reader, aliases = _opened(file)
    name = aliases.get(module, module)
    if name not in reader.names:
        raise CheckpointError(
            f"{file}: no Gram matrix of {module}; it has {', '.join(sorted({*reader.names, *aliases}))}"
        )
    return file, name


def _opened(file: Path) -> tuple[CheckpointReader, dict[str, str]]:
    try:
        reader = CheckpointReader(file)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: no Gram matrices ({error}); accumulate them again") from error
    return reader, reader.metadata()
