"""Real tables as columns and as sentences that end in the number to predict."""

import csv
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_diabetes

from tether.causal.pairs import Pair
from tether.errors import ConfigError

__all__ = ["TABLES", "Table"]

Array = NDArray[np.float64]

TEST = 1 / 3
"""Share of the rows that nothing is chosen or fitted on."""


class Table(NamedTuple):
    """Rows of numbers.

    Attributes:
        name: of the table.
        columns: what each column is called in a sentence.
        features: the columns, shape (n, d).
        target: what the number to predict is called.
        values: the numbers to predict, shape (n,).
        ordered: whether rows are in the order of time, and tests must lie after what is learnt.
        transform: the `value_transform` that a validation split of the rows to learn prefers (docs/numbers.md).
    """

    name: str
    columns: list[str]
    features: Array
    target: str
    values: Array
    ordered: bool
    transform: str

    def split(self, share: float = TEST) -> "tuple[Table, Table]":
        """Part the rows: in the order of time, or in a shuffled order that is the same every time.

        Args:
            share: of the rows for the second part, in (0, 1).

        Returns:
            What to learn from, and what to test on.
        """
        count = len(self.values)
        order = np.arange(count) if self.ordered else np.random.default_rng(0).permutation(count)
        cut = count - round(share * count)
        return self.pick(order[:cut]), self.pick(order[cut:])

    def pick(self, rows: NDArray[np.int64]) -> "Table":
        """Keep some rows.

        Args:
            rows: their indices.

        Returns:
            The table of these rows, in this order.
        """
        return self._replace(features=self.features[rows], values=self.values[rows])

    def pairs(self) -> list[Pair]:
        """Write each row as a sentence; numbers have four significant digits at most, for every reader.

        Returns:
            The columns as the prompt, and the number to predict as the completion.
        """
        return [
            Pair(
                ", ".join(f"{name} {value:.4g}" for name, value in zip(self.columns, row, strict=True))
                + f": {self.target}",
                f" {value:.4g}",
            )
            for row, value in zip(self.features, self.values, strict=True)
        ]


def diabetes() -> Table:
    """442 patients: disease progression after one year (scikit-learn).

    Returns:
        The table, columns in their own units.
    """
    bunch = load_diabetes(scaled=False)
    body = ["age", "sex", "BMI", "blood pressure"]
    blood = ["cholesterol", "LDL", "HDL", "ratio", "log triglycerides", "glucose"]
    return Table(
        "diabetes", [*body, *blood], bunch.data, "progression", bunch.target, ordered=False, transform="raw"
    )


def tumours() -> Table:
    """569 tumours: area of their three largest nuclei from the mean over all nuclei (scikit-learn, breast cancer).

    The columns are the means, without area and perimeter: those are nearly the target's own square root and
    square. None of the other `worst` columns, which are of the same three nuclei, and not the diagnosis.

    Returns:
        The table; shares of one in thousandths, so that they are read with as many digits as the rest.
    """
    bunch = load_breast_cancer()
    columns = {
        "mean radius": ("radius", 1.0),
        "mean texture": ("texture", 1.0),
        "mean smoothness": ("smoothness", 1000.0),
        "mean compactness": ("compactness", 1000.0),
        "mean concavity": ("concavity", 1000.0),
        "mean concave points": ("concave points", 1000.0),
        "mean symmetry": ("symmetry", 1000.0),
        "mean fractal dimension": ("fractal dimension", 1000.0),
    }
    found = [str(name) for name in bunch.feature_names]
    features = np.stack([bunch.data[:, found.index(name)] * unit for name, (_, unit) in columns.items()], 1)
    names = [name for name, _ in columns.values()]
    values = bunch.data[:, found.index("worst area")]
    return Table("tumours", names, features, "worst area", values, ordered=False, transform="signed-log")


def economy() -> Table:
    """201 quarters of the United States: the unemployment rate one quarter later (statsmodels, macrodata).

    Returns:
        The table in the order of time; amounts as growth over the quarter before, in percent a year.

    Raises:
        ConfigError: statsmodels is not installed.
    """
    spec = find_spec("statsmodels")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "the package statsmodels is not installed: install it with 'pip install --no-deps -r "
            "requirements/data.txt' (make setup does)"
        )
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "macrodata" / "macrodata.csv"
    with path.open() as stream:
        rows = [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(stream)]

    def level(name: str) -> Array:
        return np.array([row[name] for row in rows])

    def growth(name: str) -> Array:
        return np.concatenate([[np.nan], 400 * np.diff(np.log(level(name)))])

    columns = {
        "unemployment": level("unemp"),
        "unemployment before": np.concatenate([[np.nan], level("unemp")[:-1]]),
        "inflation": level("infl"),
        "bill rate": level("tbilrate"),
        "GDP growth": growth("realgdp"),
        "consumption growth": growth("realcons"),
        "investment growth": growth("realinv"),
        "money growth": growth("m1"),
    }
    features = np.stack(list(columns.values()), axis=1)
    # The first quarter has no growth, the last no next one.
    return Table(
        "economy",
        list(columns),
        features[1:-1],
        "unemployment next",
        level("unemp")[2:],
        ordered=True,
        transform="raw",
    )


TABLES = (diabetes, tumours, economy)
