"""Commands on the model itself: convert, generate, counterfactual."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from tether.cli.output import emit, quiet_libraries, say
from tether.cli.placing import load, load_backbone
from tether.cli.texts import open_text

__all__ = ["convert", "counterfactual", "generate"]


def convert(
    base: Annotated[str, typer.Argument(help="Alias (smollm2-135m), path or hub id of a causal LM.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; must be new or empty.")],
    preset: Annotated[
        str, typer.Option(help="Start of the causal head: calibrated or paper.")
    ] = "calibrated",
    calibrate: Annotated[
        str | None, typer.Option(help="Text to fit latent scale, class noise and threshold on.")
    ] = None,
    numbers: Annotated[
        bool,
        typer.Option("--numbers", help="Add a token <NUM> where the vocabulary has no reserved row for it."),
    ] = False,
    constants: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A constant of the model, in place of the preset's. Can be repeated.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make a CausalQwen checkpoint of a causal LM; in softmax mode it equals the base."""
    quiet_libraries()
    from tether.causal.calibration import calibrate as fit
    from tether.causal.checkpoint import save_checkpoint
    from tether.causal.constants import CONSTANTS, read_constants
    from tether.causal.modeling import CausalQwenForCausalLM
    from tether.delta.windows import window_text
    from tether.errors import ConfigError
    from tether.report.frontier import frontier_png
    from tether.store.place import check_free
    from tether.store.publish import publish_file, write_json

    check_free(out)
    overrides = read_constants(constants or ())
    documents = None if calibrate is None else open_text(calibrate)
    if documents and preset == "paper":
        raise ConfigError(
            "--calibrate with --preset paper: the numbers of that preset are fixed; leave one out"
        )
    backbone, tokenizer = load_backbone(base)
    model = CausalQwenForCausalLM.from_backbone(backbone, preset=preset, **overrides)
    record = None
    if documents:
        windows = window_text(documents, tokenizer, length=128, tokens=4000, name="the calibration text")
        ends = windows.starts.tolist()
        record = fit(model, [windows.input_ids[a:b] for a, b in pairwise(ends)])
    if numbers:
        tokenizer = model.add_numbers(tokenizer)
    file = None if documents is None else documents.path
    save_checkpoint(model, tokenizer, out, inputs={"calibration": file} if file and file.is_file() else {})
    result = {
        "path": str(out),
        "base": base,
        "preset": preset,
        "constants": {name: getattr(model.config, name) for name in CONSTANTS},
        "fingerprint": model.config.base_fingerprint,
        "num_token_id": model.config.num_token_id,
        "calibration": model.config.calibration,
    }
    said = f"{base} -> {out} (preset {preset}, {model.config.base_fingerprint[:19]}...)"
    if record is not None:
        write_json(out / "calibration.json", record)
        with publish_file(out / "calibration.png") as target:
            frontier_png(record, target)
        chosen = record["chosen"]
        said += (
            f"\nscale of U {record['latent_scale']:.4f}: causal sampling is greedy at {record['causal_share']:.1%}, "
            f"softmax at {record['softmax_share']:.1%} of {record['positions']} positions"
            f"\nargmax P_k is the base's choice at {chosen['agreement']:.1%}, one-vs-rest loss "
            f"{chosen['ovr_loss']:.1f}, normalised NLL {chosen['normalised_nll']:.2f} nats; "
            f"see {out / 'calibration.png'}"
        )
    emit(result, as_json, said)


def generate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, alias, path or hub id.")],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    mode: Annotated[
        str | None,
        typer.Option(
            help="softmax (logits), deterministic (one-vs-rest) or causal (an individual acts); the model's own if "
            "left out."
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy; softmax mode only.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling, or of the individual.")] = 0,
    shared_noise: Annotated[
        bool, typer.Option("--shared-noise", help="One noise for the whole text; causal mode only.")
    ] = False,
    common_noise: Annotated[
        float,
        typer.Option(
            help="Part of each position's noise that the whole text has in common, in [0, 1); causal mode only."
        ),
    ] = 0.0,
    truncation: Annotated[
        float, typer.Option(help="Least density of U, as a share of its peak; causal mode only.")
    ] = 0.0,
    noise: Annotated[
        Path | None, typer.Option(help="File of the individual: read, or else written; causal mode only.")
    ] = None,
) -> None:
    """Write text; numbers too, where the model has them."""
    quiet_libraries()
    import torch

    from tether.causal.config import MODES
    from tether.causal.noise import Noise, check_share
    from tether.errors import ConfigError
    from tether.store.place import check_place

    def check_mode(mode: str) -> None:
        if mode not in MODES:
            raise ConfigError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
        if temperature and mode != "softmax":
            raise ConfigError(
                f"temperature={temperature} with mode {mode}: only softmax mode takes one; leave it out"
            )
        if mode != "causal" and (shared_noise or common_noise or truncation or noise is not None):
            raise ConfigError(
                f"--shared-noise, --common-noise, --truncation or --noise with mode {mode}: only causal mode samples "
                "an individual; leave them out, or take --mode causal"
            )

    if not prompt:
        raise ConfigError("the prompt is empty: expected at least one token of text")
    if mode is not None:
        check_mode(mode)
    check_share(truncation)
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed={seed}: expected a number from 0 to 2^63 - 1")
    if noise is not None and not noise.exists():
        check_place(noise)
    individual = Noise.load(noise) if noise is not None and noise.exists() else None
    if individual is not None and shared_noise and not individual.shared:
        raise ConfigError(
            f"--shared-noise with {noise}: the individual in it has a noise for each position; leave it out, or "
            "name a new file"
        )
    if individual is not None and common_noise and individual.common != common_noise:
        raise ConfigError(
            f"--common-noise {common_noise:g} with {noise}: the individual in it has {individual.common:g} in common; "
            "leave it out, or name a new file"
        )
    drawn: dict[str, Any] = {"shared": shared_noise, "common": common_noise}
    Noise.draw(1, 1, seed=seed, **drawn)  # a part out of range is found before the model is loaded
    writer, tokenizer = load(model)
    if mode is None:
        mode = str(writer.config.mode)
        check_mode(mode)
    numeric = None if writer.config.num_token_id is None else writer.add_numbers(tokenizer)
    encoded = (numeric or tokenizer)(prompt, return_tensors="pt")
    options: dict[str, Any] = {"do_sample": bool(temperature)}
    if temperature:
        options |= {"temperature": temperature, "top_k": 0}
    if mode == "causal":
        fresh = individual is None
        individual = individual or Noise.draw(1, writer.latent_size, seed=seed, **drawn)
        options |= {"noise": individual, "truncation": truncation}
    with torch.random.fork_rng():
        # transformers' sampler takes no generator; the global state is set here and restored after.
        torch.random.manual_seed(seed)
        output = writer.generate(
            **encoded,
            mode=mode,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
            **options,
        )
    if individual is not None and noise is not None and fresh:
        individual.save(noise)
    start = encoded["input_ids"].shape[1]
    ids = output["sequences"][0, start:]
    if numeric is None:
        written = tokenizer.decode(ids, skip_special_tokens=True)
    else:
        values = output["numeric_values"][0, start:]
        written = numeric.decode(ids, values, skip_special_tokens=True, precision=6)
    say(prompt + written)


def counterfactual(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, alias, path or hub id.")],
    factual: Annotated[str, typer.Option(help="The context in which something was written.")],
    intervene: Annotated[str, typer.Option(help="The changed context.")],
    observed: Annotated[
        str | None, typer.Option(help="What was written after it; left out, the model's own greedy text.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Individuals to abduct.")] = 8,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 8,
    shared_noise: Annotated[
        bool, typer.Option("--shared-noise", help="One noise for the whole text instead of one a token.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sampler.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Ask what the individuals who wrote this would have written in another context."""
    quiet_libraries()
    import torch

    from tether.causal.counterfactual import replay
    from tether.errors import ConfigError

    for name, text in (("--factual", factual), ("--intervene", intervene), ("--observed", observed)):
        if text is not None and not text.strip():
            raise ConfigError(f"{name} is empty: expected at least one token of text")
    writer, plain = load(model)
    numeric = writer.add_numbers(plain) if writer.config.num_token_id is not None else None

    def encode(text: str, special: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        encoded = (numeric or plain)(text, return_tensors="pt", add_special_tokens=special)
        return encoded["input_ids"], encoded.get("numeric_values")

    def decode(ids: torch.Tensor, values: torch.Tensor | None) -> str:
        if numeric is None:
            return str(plain.decode(ids, skip_special_tokens=True))
        return str(numeric.decode(ids, values, skip_special_tokens=True, precision=6))

    context, context_values = encode(factual)
    if observed is None:
        written = writer.generate(
            context,
            attention_mask=torch.ones_like(context),
            numeric_values=context_values,
            mode="deterministic",
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
        )
        ids, values = written["sequences"], written.get("numeric_values")
    else:
        more, more_values = encode(observed, special=False)
        ids = torch.cat([context, more], dim=1)
        values = None
        if context_values is not None and more_values is not None:
            values = torch.cat([context_values, more_values], dim=1)
    start = context.shape[1]
    generator = torch.Generator().manual_seed(seed)
    abducted = writer.abduct(
        ids, start, numeric_values=values, shared=shared_noise, samples=samples, generator=generator
    )
    again = replay(writer, abducted, context, numeric_values=context_values, seed=seed)
    same = (again["sequences"][:, start:] == ids[0, start:]).all(-1).float().mean()
    changed, changed_values = encode(intervene)
    what_if = replay(
        writer, abducted, changed, numeric_values=changed_values, new_tokens=new_tokens, seed=seed
    )
    begin = changed.shape[1]
    rows = what_if["sequences"][:, begin:]
    numbers = what_if.get("numeric_values")
    texts = [
        decode(row, None if numbers is None else numbers[index, begin:]) for index, row in enumerate(rows)
    ]
    posterior = abducted.posterior
    worth = float(posterior.effective_sample_size.min())
    result = {
        "observed": decode(ids[0, start:], None if values is None else values[0, start:]),
        "replayed": float(same),
        "effective_sample_size": {
            "min": worth,
            "median": float(posterior.effective_sample_size.median()),
        },
        "acceptance": float(posterior.acceptance.mean()),
        "texts": texts,
    }
    counted = sorted(((texts.count(text), text) for text in set(texts)), reverse=True)
    said = [
        f"observed after {factual!r}: {result['observed']!r}",
        f"replayed without intervention: {float(same):.0%} of {samples} individuals "
        f"(effective sample size {worth:.1f} at least, acceptance "
        f"{float(posterior.acceptance.mean()):.0%})",
        f"after {intervene!r}:",
        *(f"  {count:4d}x {text!r}" for count, text in counted),
    ]
    emit(result, as_json, "\n".join(said))
