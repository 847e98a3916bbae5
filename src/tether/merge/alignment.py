"""Which units of one model do what another model's units do: index maps from activations on shared tokens."""

from collections.abc import Mapping
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from tether.errors import ConfigError
from tether.merge.axes import Sizes
from tether.merge.towers import find_tower
from tether.store.publish import publish_file

__all__ = ["Activations", "Alignment", "align_layers", "align_units", "assign", "record", "write_maps"]

Matrix = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]


class Activations(NamedTuple):
    """What the layers of a decoder do on some tokens; T tokens.

    Attributes:
        residual: the stream after each layer, shape (T, d) each.
        hidden: the inputs of each ``down_proj``, shape (T, m) each.
        heads: the inputs of each ``o_proj``, shape (T, heads * size) each.
    """

    residual: list[Tensor]
    hidden: list[Tensor]
    heads: list[Tensor]


class Alignment(NamedTuple):
    """Maps and how good they are.

    Attributes:
        maps: as ``tether.merge.maps`` describes them.
        similarity: space to the mean correlation (for layers, groups and query heads the CKA) of matched pairs.
        unmatched: space to how many of the target's units have no counterpart.
    """

    maps: dict[str, Index]
    similarity: dict[str, float]
    unmatched: dict[str, int]


def record(model: Any, input_ids: Tensor) -> Activations:
    """Run a model over tokens and keep what its layers do.

    Args:
        model: a transformers model.
        input_ids: shape (B, S); the same for both models that are to be aligned. B * S should be several
            times the width.

    Returns:
        The activations, on the CPU.
    """
    found = Activations([], [], [])
    handles = []

    def keep_input(into: list[Tensor], module: nn.Module) -> None:
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args: into.append(args[0].detach().flatten(0, -2).cpu())
            )
        )

    def keep_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        found.residual.append(stream.detach().flatten(0, -2).cpu())

    for layer in find_tower(model).layers:
        keep_input(found.hidden, layer.get_submodule("mlp.down_proj"))
        keep_input(found.heads, layer.get_submodule("self_attn.o_proj"))
        handles.append(layer.register_forward_hook(keep_output))
    try:
        with torch.no_grad():
            model(input_ids=input_ids.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def assign(similarity: Matrix, *, floor: float = 0.0) -> tuple[Index, float]:
    """Pair rows with columns so that the sum of similarities is largest.

    Args:
        similarity: shape (target units, source units), rectangular or square.
        floor: pairs below it are left unmatched.

    Returns:
        For each row its column or -1, and the mean similarity of the pairs (0 where there are none).

    Reference:
        Kuhn 1955, The Hungarian method for the assignment problem; Ainsworth et al. 2023, Git re-basin, section 3.1.

    Example:
        >>> assign(np.array([[0.1, 0.9], [0.2, 0.8], [0.7, 0.3]]))[0]
        array([ 1, -1,  0])
    """
    index = np.full(len(similarity), -1)
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    good = similarity[rows, columns] >= floor
    index[rows[good]] = columns[good]
    values = similarity[rows[good], columns[good]]
    return index.astype(np.int64), float(values.mean()) if len(values) else 0.0


def align_layers(similarity: Matrix) -> tuple[Index, float]:
    r"""Pair layers in order, so that the sum of similarities is largest.

    .. math:: S_{ij} = \max(S_{i-1,j},\ S_{i,j-1},\ S_{i-1,j-1} + s_{ij})

    Args:
        similarity: shape (target layers, source layers), not below 0.

    Returns:
        For each of the target's layers the source's or -1, increasing, and the mean similarity of the pairs.

    Reference:
        Needleman and Wunsch 1970, with no cost for gaps.

    Example:
        >>> align_layers(np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.7]]))[0]
        array([ 0, -1,  1])
    """
    rows, columns = similarity.shape
    best = np.zeros((rows + 1, columns + 1))
    for i in range(rows):
        for j in range(columns):
            best[i + 1, j + 1] = max(best[i, j + 1], best[i + 1, j], best[i, j] + similarity[i, j])
    index = np.full(rows, -1, np.int64)
    i, j = rows, columns
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            index[i] = j
    matched = index >= 0
    return index, float(similarity[matched, index[matched]].mean()) if matched.any() else 0.0


def align_units(target: Activations, source: Activations, want: Sizes, have: Sizes) -> Alignment:
    """Match every space of two decoders on shared tokens.

    Layers by the linear CKA of the residual streams where the depths differ; residual dimensions by their
    correlation, summed over matched layers; hidden units and value dimensions by correlation; key-value groups and the
    query heads in them by CKA, since their dimensions may be in any order.

    Args:
        target: of the model in whose coordinates the result will be.
        source: of the model that is brought there, on the same tokens.
        want: lengths of the target.
        have: lengths of the source.

    Returns:
        The maps; identities are left out.

    Raises:
        ConfigError: If the tokens differ in number, or heads cannot correspond.

    Reference:
        Kornblith et al. 2019, Similarity of neural network representations revisited, equation 4 (CKA).
    """
    if len(target.residual[0]) != len(source.residual[0]):
        raise ConfigError("the two models saw different numbers of tokens; expected the same tokens")
    if (want.rope, want.value) != (have.rope, have.value):
        raise ConfigError(
            f"heads have {want.rope} dimensions here and {have.rope} there; rotary positions make them "
            "incomparable. Expected equal head sizes"
        )
    found = Alignment({}, {}, {})
    layers = np.arange(len(target.residual))
    if len(target.residual) != len(source.residual):
        table = np.array([[_cka(a, b) for b in source.residual] for a in target.residual])
        layers, likeness = align_layers(table)
        _note(found, "layers", layers, likeness, len(source.residual))
    pairs = [(here, int(there)) for here, there in enumerate(layers) if there >= 0]
    total = sum(_correlation(target.residual[a], source.residual[b]) for a, b in pairs) / max(1, len(pairs))
    _note(found, "residual", *assign(np.asarray(total)), have.residual)
    for here, there in pairs:
        hidden = assign(_correlation(target.hidden[here], source.hidden[there]))
        _note(found, f"layers.{here}.mlp", *hidden, have.mlp)
        _align_heads(
            found, f"layers.{here}", _split(target.heads[here], want), _split(source.heads[there], have)
        )
    return found


# (T, groups * queries * values) -> (groups, queries, T, values)
def _split(heads: Tensor, lengths: Sizes) -> Tensor:
    split: Tensor = heads.unflatten(-1, (lengths.group, lengths.query, lengths.value))
    return split.permute(1, 2, 0, 3)


def _align_heads(found: Alignment, layer: str, target: Tensor, source: Tensor) -> None:
    table = [[_cka(*(each.transpose(0, 1).flatten(1) for each in (a, b))) for b in source] for a in target]
    groups, likeness = assign(np.array(table))
    _note(found, f"{layer}.group", groups, likeness, len(source))
    queries = np.full((len(target), target.shape[1]), -1, np.int64)
    values = np.tile(np.arange(target.shape[-1]), (len(target), 1))
    query_likeness, value_likeness = [], []
    for here, there in enumerate(groups):
        if there < 0:
            queries[here] = np.arange(target.shape[1]) if target.shape[1] <= source.shape[1] else -1
            continue
        ours, theirs = target[here], source[there]
        queries[here], likeness = assign(np.array([[_cka(a, b) for b in theirs] for a in ours]))
        query_likeness.append(likeness)
        paired = [(a, int(b)) for a, b in enumerate(queries[here]) if b >= 0]
        total = sum(_correlation(ours[a], theirs[b]) for a, b in paired)
        values[here], likeness = assign(np.asarray(total) / len(paired))
        value_likeness.append(likeness)
    _note(found, f"{layer}.query", queries, float(np.mean(query_likeness)), source.shape[1])
    _note(found, f"{layer}.value", values, float(np.mean(value_likeness)), source.shape[-1])


def _note(found: Alignment, space: str, index: Index, likeness: float, units: int) -> None:
    found.similarity[space] = likeness
    found.unmatched[space] = int((index < 0).sum())
    if index.shape[-1] != units or not (index == np.arange(units)).all():
        found.maps[space] = index


def _correlation(one: Tensor, other: Tensor) -> Matrix:
    def scaled(values: Tensor) -> Tensor:
        centred: Tensor = values.double() - values.double().mean(0)
        norms: Tensor = torch.linalg.vector_norm(centred, dim=0)
        return centred.div(norms.clamp(min=1e-12))

    matrix: Matrix = (scaled(one).T @ scaled(other)).numpy()
    return matrix


def _cka(one: Tensor, other: Tensor) -> float:
    x, y = (values.double() - values.double().mean(0) for values in (one, other))
    scale = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return float((x.T @ y).square().sum() / scale) if scale > 0 else 0.0


def write_maps(path: str | PathLike[str], maps: Mapping[str, Index]) -> None:
    """Write maps for a recipe's ``align``.

    Args:
        path: the file, published whole.
        maps: as ``tether.merge.maps`` describes them; none at all is the identity.
    """
    with publish_file(path) as temporary:
        temporary.write_bytes(
            save({name: np.ascontiguousarray(index) for name, index in sorted(maps.items())})
        )
