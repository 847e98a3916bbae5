"""transformers' pipeline for writing, with the numbers that a model reads and writes."""

import copy
from typing import Any

from torch import Tensor
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.text_generation import ReturnType, TextGenerationPipeline

from tether.causal.config import CausalQwenConfig
from tether.causal.encoding import VALUES
from tether.causal.numbers import NumericTokenizer
from tether.errors import ConfigError

__all__ = ["NumericTextGeneration"]

_TASK = "text-generation"
_PRECISION = 6
"""Significant digits of a written number, as `tether generate` prints it; the model computes with about seven."""


class NumericTextGeneration(TextGenerationPipeline):  # type: ignore[misc]
    """What `pipeline("text-generation", model)` gives for a model with `<NUM>` after `import tether`.

    The stock pipeline hands the model ids alone and prints ids alone, so the numbers of the prompt would all be 0 and
    those written would be lost. This one takes both along. For any other model `pipeline` gives transformers' own.

    Calls take one option more, `precision`: the significant digits of written numbers, 6 if it is left out. With
    `return_tensors=True` a record has the values of its tokens, `numeric_values`, beside `generated_token_ids`.

    Args:
        model: a model; for one without `<NUM>`, transformers' own pipeline is made.
        args: as in transformers.
        options: as in transformers. A plain `tokenizer` is made numeric.

    Raises:
        ConfigError: the tokenizer's `<NUM>` is not the model's, or a numeric tokenizer for a model without `<NUM>`.
    """

    def __new__(cls, model: Any = None, *args: Any, **options: Any) -> Any:
        """Make this pipeline for a model with `<NUM>`, and transformers' own for any other.

        Args:
            model: the model; None only where a pipeline is copied.
            args: as in transformers.
            options: as in transformers.

        Returns:
            The pipeline.

        Raises:
            ConfigError: a numeric tokenizer for a model without `<NUM>`.
        """
        if model is None or (
            isinstance(model.config, CausalQwenConfig) and model.config.num_token_id is not None
        ):
            return super().__new__(cls)
        if any(isinstance(each, NumericTokenizer) for each in (*args[:1], options.get("tokenizer"))):
            raise ConfigError(
                "a numeric tokenizer for a model without <NUM>: give its plain one (tokenizer.plain()), or a model "
                "that reads numbers (model.add_numbers(tokenizer))"
            )
        return TextGenerationPipeline(model, *args, **options)

    def __init__(self, model: Any, tokenizer: Any = None, *args: Any, **options: Any) -> None:
        tokenizer = None if tokenizer is None else model.add_numbers(tokenizer)
        super().__init__(model, tokenizer, *args, **options)

    def _sanitize_parameters(self, precision: int | None = None, **options: Any) -> Any:
        before, forward, after = super()._sanitize_parameters(**options)
        return before, forward, after if precision is None else {**after, "precision": precision}

    def _forward(self, model_inputs: Any, **options: Any) -> Any:
        # A prompt that was cut keeps its end.
        length = model_inputs["input_ids"].shape[1]
        if length:
            options[VALUES] = model_inputs[VALUES][:, -length:]
        given = options.get("generation_config")
        if given is None:
            options["return_dict_in_generate"] = True
        else:
            options["generation_config"] = copy.deepcopy(given)
            options["generation_config"].return_dict_in_generate = True
        return super()._forward(model_inputs, **options)

    def postprocess(
        self,
        model_outputs: Any,
        return_type: Any = ReturnType.FULL_TEXT,
        precision: int = _PRECISION,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Print what was written.

        Args:
            model_outputs: of one prompt, with the ids of each text that goes on from it and their values.
            return_type: what a record holds.
            precision: significant digits of written numbers.
            options: as in transformers.

        Returns:
            One record for each text.
        """
        records: list[dict[str, Any]] = []
        texts = {
            name: each
            for name, each in model_outputs.items()
            if isinstance(each, Tensor) and name not in (VALUES, "input_ids")
        }
        for row, values in enumerate(model_outputs[VALUES][0].tolist()):
            # Each text on its own: two may have the same tokens and differ in their numbers.
            own = {name: each[:, row : row + 1] for name, each in texts.items()}
            alone = copy.copy(self)
            ids = model_outputs["generated_sequence"][0, row].tolist()
            alone.tokenizer = _Reader(self.tokenizer, ids, values, precision)
            outputs = {name: each for name, each in model_outputs.items() if name != VALUES} | own
            records += super(NumericTextGeneration, alone).postprocess(
                outputs, return_type=return_type, **options
            )
            if return_type == ReturnType.TENSORS:
                records[-1][VALUES] = values
        return records


class _Reader:
    """The tokenizer of one text: it knows the values at the start and at the end of its ids."""

    def __init__(
        self, tokenizer: NumericTokenizer, ids: list[int], values: list[float], precision: int
    ) -> None:
        self.tokenizer, self.ids, self.values, self.precision = tokenizer, ids, values, precision

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def decode(self, ids: list[int], **options: Any) -> str:
        start = len(self.ids) - len(ids)
        values = self.values[start:] if ids == self.ids[start:] else self.values[: len(ids)]
        return str(self.tokenizer.decode(ids, values, precision=self.precision, **options))


# Not with register_pipeline, whose pipelines are saved as code that their checkpoints bring.
PIPELINE_REGISTRY.supported_tasks[_TASK]["impl"] = NumericTextGeneration
