"""Commands on the model itself: convert, generate."""

from pathlib import Path
from typing import Annotated

import typer

from tether.cli.output import emit, quiet_libraries

__all__ = ["convert", "generate"]


def convert(
    base: Annotated[str, typer.Argument(help="Alias (smollm2-135m), path or hub id of a causal LM.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; must be new or empty.")],
    preset: Annotated[
        str, typer.Option(help="Start of the causal head: calibrated or paper.")
    ] = "calibrated",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make a CausalQwen checkpoint of a causal LM; in softmax mode it equals the base."""
    quiet_libraries()
    from tether.causal.loading import load_backbone
    from tether.causal.modeling import CausalQwenForCausalLM
    from tether.delta.fusion import check_free, save_checkpoint

    check_free(out)
    backbone, tokenizer = load_backbone(base)
    model = CausalQwenForCausalLM.from_backbone(backbone, preset=preset)
    save_checkpoint(model, tokenizer, out)
    result = {"path": str(out), "base": base, "preset": preset, "fingerprint": model.config.base_fingerprint}
    emit(result, as_json, f"{base} -> {out} (preset {preset}, {model.config.base_fingerprint[:19]}...)")


def generate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, alias, path or hub id.")],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    mode: Annotated[str, typer.Option(help="softmax (logits) or deterministic (one-vs-rest).")] = "softmax",
    new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy; softmax mode only.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Write text."""
    quiet_libraries()
    import torch

    from tether.causal.config import MODES
    from tether.causal.loading import load
    from tether.errors import ConfigError

    if mode not in MODES:
        raise ConfigError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    if not prompt:
        raise ConfigError("the prompt is empty: expected at least one token of text")
    if temperature and mode != "softmax":
        raise ConfigError(
            f"temperature={temperature} with mode {mode}: only softmax mode samples; leave it out"
        )
    writer, tokenizer = load(model)
    encoded = tokenizer(prompt, return_tensors="pt")
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    )
    with torch.random.fork_rng():
        # transformers' sampler takes no generator; the global state is set here and restored after.
        torch.random.manual_seed(seed)
        output = writer.generate(
            **encoded, mode=mode, max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
        )
    typer.echo(
        prompt + tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    )
