"""The models of a recipe, opened: headers, configs, structure.

No weights are read, but for a head that is stored although the config ties it: whether it is a copy of the
embedding is to be seen in the bytes alone.
"""

from dataclasses import dataclass
from typing import Final

from tether.errors import CheckpointError, TetherError
from tether.merge.axes import Sizes, Tower, find_tower, sizes
from tether.merge.companions import Folder, differing_tokens, locate, read_folder
from tether.merge.floats import BYTES
from tether.merge.inputs import Coordinates
from tether.merge.maps import check_maps, read_maps
from tether.merge.recipe import Recipe
from tether.store.hashing import file_chunks, unreadable
from tether.store.reader import CheckpointReader

__all__ = ["COUNTING", "Opened", "align", "compare_vocabularies", "few", "open_model", "open_models"]

COUNTING: Final = frozenset({"I64", "BOOL"})
"""Types of buffers such as position numbers, which are kept and not merged."""

_BUFFERS: Final = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Ends of the names of tables that old checkpoints hold; transformers computes them from the config."""

_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """One model of a recipe.

    Attributes:
        name: in the recipe.
        folder: its weights and what lies beside them.
        reader: its headers.
        tower: its language model; all tensors under their own names where no structure was recognised.
        recognised: whether it was.
        tied: whether its head is its embedding.
        names: of its tensors, but for rotary tables, sorted.
        copied_head: names of a stored head and of the embedding that it is a copy of; None where it has none.
    """

    name: str
    folder: Folder
    reader: CheckpointReader
    tower: Tower
    recognised: bool
    tied: bool
    names: tuple[str, ...]
    copied_head: tuple[str, str] | None = None

    @property
    def buffers(self) -> int:
        """How many rotary tables are stored; they are hashed with the rest, and not merged."""
        return len(self.reader.names) - len(self.names)

    @property
    def untied(self) -> bool:
        """Whether its config ties a head that is stored and is not the embedding."""
        return self.recognised and not self.tied and bool(_ties(self.folder))

    def tensor_for(self, canonical: str) -> str | None:
        """Name the tensor that a canonical name stands for.

        Args:
            canonical: a name inside the language tower.

        Returns:
            The checkpoint's name, that of the embedding for a tied head; None where there is none.
        """
        if canonical == _HEAD and self.tied:
            return self.tower.names.get(_EMBEDDING)
        return self.tower.names.get(canonical)

    @property
    def inside(self) -> frozenset[str]:
        """Canonical names of the language tower; a tied head is not among them, even where it is stored."""
        return frozenset(self.tower.names) - ({_HEAD} if self.tied else set())

    def sizes(self) -> Sizes:
        """Read the lengths of its axes.

        Returns:
            The lengths.

        Raises:
            CheckpointError: If its config and shapes do not agree.
        """  # noqa: DOC502 - raised by sizes
        shapes = {canonical: self.reader.shape(name) for canonical, name in self.tower.names.items()}
        return sizes(self.folder.config, shapes, self.name)


def open_models(recipe: Recipe) -> tuple[dict[str, Opened], list[str]]:
    """Open every model of a recipe.

    Args:
        recipe: the recipe.

    Returns:
        Those that could be opened, and what is wrong, one sentence each.
    """
    opened, problems = {}, []
    for name, model in recipe.inputs.items():
        try:
            folder = read_folder(locate(model.path))
            reader = CheckpointReader(folder.weights)
        except TetherError as error:
            problems.append(f"{name}: {error}")
            continue
        if quantised := _quantised(folder, reader):
            problems.append(f"{name}: {model.path} is quantised ({quantised}); dequantise it first")
            continue
        try:
            opened[name] = open_model(name, folder, reader)
        except TetherError as error:
            problems.append(f"{name}: {error}")
            continue
        if doubles := [each for each in opened[name].names if reader.dtype(each) == "F64"]:
            problems.append(f"{name}: {few(doubles)} are float64; convert them to float32")
    return opened, problems


def open_model(name: str, folder: Folder, reader: CheckpointReader | None = None) -> Opened:
    """Look at the structure of one model.

    Args:
        name: what to call it.
        folder: its files.
        reader: its headers, if they are read already.

    Returns:
        The model.

    Raises:
        CheckpointError: If its weights are missing or damaged.
    """  # noqa: DOC502 - raised by CheckpointReader
    reader = reader or CheckpointReader(folder.weights)
    names = tuple(each for each in reader.names if not each.endswith(_BUFFERS))
    tower = find_tower(names)
    recognised = tower is not None
    tower = tower or Tower({each: each for each in names}, (), 0)
    tied = _ties(folder)
    if tied is None:
        tied = recognised and _HEAD not in tower.names
    stored = (tower.names[_HEAD], tower.names[_EMBEDDING]) if recognised and _HEAD in tower.names else None
    copied = stored if stored and tied and _equal(reader, *stored) else None
    return Opened(
        name=name,
        folder=folder,
        reader=reader,
        tower=tower,
        recognised=recognised,
        tied=bool(tied) and (stored is None or copied is not None),
        names=names,
        copied_head=copied,
    )


# What the config says of the head; None where it says nothing.
def _ties(folder: Folder) -> bool | None:
    text = folder.config.get("text_config") or {}
    tied: bool | None = folder.config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    return tied


def _equal(reader: CheckpointReader, one: str, other: str) -> bool:
    if (reader.dtype(one), reader.shape(one)) != (reader.dtype(other), reader.shape(other)):
        return False
    file, *_ = reader.span(one)
    try:
        chunks = (file_chunks(*reader.span(name)) for name in (one, other))
        return all(mine == theirs for mine, theirs in zip(*chunks, strict=True))
    except OSError as error:
        raise CheckpointError(unreadable(file, error)) from error


def _quantised(folder: Folder, reader: CheckpointReader) -> str:
    for config in (folder.config, folder.config.get("text_config") or {}):
        if quantisation := config.get("quantization_config"):
            return f"quant_method {quantisation.get('quant_method', 'unknown')} in config.json"
    for name in reader.names:
        dtype = reader.dtype(name)
        if name.endswith(_BUFFERS):
            continue
        if dtype not in BYTES and dtype not in COUNTING and dtype != "F64":
            return f"{name} is {dtype}"
    return ""


def compare_vocabularies(recipe: Recipe, opened: dict[str, Opened]) -> tuple[list[str], list[str]]:
    """Compare every model's tokenizer with that of the result.

    Args:
        recipe: the recipe.
        opened: its models.

    Returns:
        Problems and notes, one sentence each.
    """
    donor = recipe.tokenizer or recipe.skeleton
    problems, unknown = [], []
    for name, model in opened.items():
        # Maps of the vocabulary are made for two vocabularies that differ.
        if name == donor or donor not in opened or _maps_vocabulary(recipe.inputs[name].align):
            continue
        try:
            difference = differing_tokens(opened[donor].folder, model.folder)
        except TetherError as error:
            problems.append(str(error))
            continue
        if difference == "":
            unknown.append(name)
        elif difference:
            problems.append(
                f"the vocabularies of {donor} and {name} differ: {difference}; rows of their embeddings stand for "
                "different tokens. Merge models of one tokenizer, or give align with a map vocab"
            )
    notes = (
        [f"vocabularies not compared, no tokenizer beside the weights: {', '.join(unknown)}"]
        if unknown
        else []
    )
    return problems, notes


def _maps_vocabulary(file: str | None) -> bool:
    try:
        return file is not None and "vocab" in read_maps(file)[0]
    except TetherError:
        return True  # `align` says what is wrong with the file


def align(recipe: Recipe, opened: dict[str, Opened]) -> tuple[dict[str, Coordinates], list[str]]:
    """Read and check the index maps of models that have some.

    Args:
        recipe: the recipe.
        opened: its models.

    Returns:
        Model name to how it is brought into the coordinates of ``into``, and what is wrong.
    """
    coordinates, problems = {}, []
    target = opened.get(recipe.skeleton)
    for name, model in opened.items():
        file = recipe.inputs[name].align
        if file is None or target is None:
            continue
        if not (target.recognised and model.recognised):
            problems.append(
                f"{name}: align needs the structure of a Llama- or Qwen-like decoder in both models"
            )
            continue
        try:
            (maps, sha256), have, want = read_maps(file), model.sizes(), target.sizes()
            check_maps(
                maps, want, have, (target.tower.layers, model.tower.layers), f"{name}: index maps {file}"
            )
        except TetherError as error:
            problems.append(str(error))
        else:
            coordinates[name] = Coordinates(maps, want, have, sha256)
    return coordinates, problems


def few(names: list[str]) -> str:
    """Name a few of many.

    Args:
        names: all of them.

    Returns:
        The first four, and how many more there are.

    Example:
        >>> few(list("abcdef"))
        'a, b, c, d and 2 more'
    """
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
