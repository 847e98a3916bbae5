"""What a recipe chooses of LAPE-TEFM: every step as the document writes it, or corrected."""

from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import Field

from tether.errors import ConfigError
from tether.merge.operator import Settings

__all__ = ["ETA", "PRESETS", "Options", "Switches"]

ETA: Final = {"paper": 1e-4, "sam": 1e-3}
"""Length of the last step where none is given; the document says that it is small."""

_Share = Annotated[float, Field(ge=0)]


class Switches(NamedTuple):
    """Every choice of a merge, made; `Options` says what each means."""

    weighting: str
    gamma: float | None
    gradient: str
    hessian: str
    features: str
    affinity: str
    ensembles: int
    matching: str
    task_vector: str
    without_parent: str
    sigma: float
    interference: str
    mask: str
    beta: float
    direction: str
    rank: int
    rest: str
    update: str
    lambda_proj: float
    lambda_ortho: float


PRESETS: Final[dict[str, dict[str, Any]]] = {
    "literal": {
        "weighting": "paper", "gradient": "paper", "hessian": "paper",
        "features": "mean", "affinity": "cosine", "matching": "ensembles",
        "task_vector": "ensemble", "without_parent": "paper", "sigma": 1.0,
        "interference": "paper", "mask": "paper", "direction": "paper", "rest": "masked", "update": "ensemble",
        "lambda_proj": 0.5, "lambda_ortho": 0.5,
    },
    "corrected": {
        "weighting": "position", "gradient": "true", "hessian": "squared",
        "features": "samples", "affinity": "shifted", "matching": "rows",
        "task_vector": "row", "without_parent": "weights", "sigma": 0.0,
        "interference": "ensembles", "mask": "exponential", "direction": "inputs", "rest": "whole",
        "update": "symmetric", "lambda_proj": 0.5, "lambda_ortho": 0.7,
    },
}  # fmt: skip
"""What `form` stands for."""


class Options(Settings):
    """Options of ``lape_tefm``. What is left out is as `form` says."""

    form: Literal["literal", "corrected"] = "corrected"
    """``literal``: every step as the document writes it. ``corrected``: every step as docs/lape-tefm.md argues."""

    weighting: Literal["paper", "position", "self-normalised", "mean", "sum"] | None = None
    """Stage 1, weights of sampled paths: ``paper`` p(S) gamma^(len - 1), ``position`` position by position."""
    gamma: Annotated[float, Field(gt=0, le=1)] | None = None
    """Its discount; 0.99 for ``paper``, 0.9 for ``position`` if left out. The model was observed with it."""
    gradient: Literal["paper", "true"] | None = None
    """phi[1]: ``paper`` a (a - a_ref), ``true`` by backpropagation."""
    hessian: Literal["paper", "squared", "fisher"] | None = None
    """Curvature: ``paper`` g'^2 + phi[2], ``squared`` mean g^2 with a floor, ``fisher`` norms of rows' gradients."""

    features: Literal["mean", "samples"] | None = None
    """Stage 2, what neurons are compared by: their three numbers, or all samples, standardised."""
    affinity: Literal["cosine", "shifted"] | None = None
    """Of the spectral clustering: cos, or (1 + cos) / 2."""
    ensembles: Annotated[int, Field(ge=1)] = 8
    """K of each layer; the document does not say how many."""
    matching: Literal["ensembles", "rows"] | None = None
    """Whether ensembles of A and B are paired by TOS, or each row of B belongs to the same row of A."""

    task_vector: Literal["ensemble", "row"] | None = None
    """Stage 3, whether an ensemble has one task vector, or each row its own."""
    without_parent: Literal["paper", "weights"] | None = None
    """Task vector where the recipe has no base: ``paper`` the number phi_B[0] - phi_A[0], ``weights`` W_B - W_A."""
    sigma: float | None = None
    """Weight of g' in the task vector."""
    interference: Literal["paper", "ensembles", "rows"] | None = None
    """``paper`` of mean encodings as they are; else of standardised ones, shared by an ensemble or for each row."""
    mask: Literal["paper", "exponential", "none"] | None = None
    """``paper`` 1 - sigmoid(beta Int), ``exponential`` exp(-beta Int), or 1."""
    beta: _Share = 0.1
    """Strength of the mask, and of the difference in flatness in TOS."""
    direction: Literal["paper", "inputs"] | None = None
    """What is projected on: ``paper`` the number d_k as a constant vector, ``inputs`` leading directions of inputs."""
    rank: Annotated[int, Field(ge=1)] = 16
    """How many such directions."""
    rest: Literal["masked", "whole"] | None = None
    """Whether the rest is what the masked projection leaves, or what the projection leaves."""
    update: Literal["ensemble", "row", "symmetric"] | None = None
    """What the update is added to: mean rows of A's ensembles, A's rows, or, with both task vectors, the parent's."""
    both: _Share | None = Field(None, alias="lambda")
    """Weight of projection and rest alike, where they are not given on their own."""
    lambda_proj: _Share | None = None
    """Weight of the projection."""
    lambda_ortho: _Share | None = None
    """Weight of the rest."""

    eta: _Share | None = None
    """Stage 4, length of the last step: 1e-4 for the document's if left out, 1e-3 of the weights' norm for ``sam``."""
    step: Annotated[str, Field(min_length=1)] | None = None
    """A file of last steps, as a recipe's ``refine`` makes it on the merged model."""

    def chosen(self, *, parent: bool) -> Switches:
        """Make every choice.

        Args:
            parent: whether there is one.

        Returns:
            What is given, and for the rest what `form` says. The symmetric update needs a parent; without one,
            ``corrected`` adds to A's rows.

        Raises:
            ConfigError: The symmetric update is asked for without a parent.
        """
        if self.update == "symmetric" and not parent:
            raise ConfigError(
                "options.update is symmetric, which adds both task vectors to a parent, and there is none; give base, "
                "or choose row or ensemble"
            )
        preset = PRESETS[self.form] | ({} if parent or self.form == "literal" else {"update": "row"})
        if self.both is not None:
            preset = preset | {"lambda_proj": self.both, "lambda_ortho": self.both}
        given = {name: value for name in Switches._fields if (value := getattr(self, name)) is not None}
        return Switches(**({"gamma": None} | preset | given))
