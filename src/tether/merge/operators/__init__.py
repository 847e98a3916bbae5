"""The operators by name: one file each, pure functions from blocks of weights to merged values."""

from typing import Final

from tether.merge.operator import Operator
from tether.merge.operators.dare_ties import DARE_TIES
from tether.merge.operators.fisher_mean import FISHER_MEAN
from tether.merge.operators.lape_tefm import LAPE_TEFM
from tether.merge.operators.linear import LINEAR
from tether.merge.operators.regression_mean import REGRESSION_MEAN
from tether.merge.operators.slerp import SLERP
from tether.merge.operators.task_arithmetic import TASK_ARITHMETIC
from tether.merge.operators.ties import TIES_MERGEKIT

__all__ = ["OPERATORS"]

OPERATORS: Final[dict[str, Operator]] = {
    operator.name: operator
    for operator in (
        LINEAR,
        TASK_ARITHMETIC,
        TIES_MERGEKIT,
        DARE_TIES,
        SLERP,
        REGRESSION_MEAN,
        FISHER_MEAN,
        LAPE_TEFM,
    )
}
"""Every operator that a recipe can name."""
