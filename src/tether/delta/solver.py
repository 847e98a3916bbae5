"""Weights with the least loss under a limit on the surrogate drift: a small smooth problem for SLSQP."""

import math
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from tether.delta.problem import Problem

__all__ = ["minimise_loss"]


def minimise_loss(
    problem: Problem, limit: float, most: float, start: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Minimise the loss under the surrogate's limit, from the given weights and from equal ones.

    Args:
        problem: linearised around some weights.
        limit: of the surrogate, nats.
        most: largest weight.
        start: weights, shape (N,).

    Returns:
        Weights in [0, most], shape (N,), within the limit.
    """

    def value(function: Any) -> Any:
        def evaluate(weights: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
            point = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
            found = function(point)
            (gradient,) = torch.autograd.grad(found, point)
            return float(found.detach()), gradient.numpy()

        return evaluate

    # In logarithms a constraint far above and far below its limit is of one size.
    def room(point: Tensor) -> Tensor:
        return math.log(limit) - torch.log(problem.surrogate(point) + 1e-3 * limit)

    loss, inside = value(problem.loss), value(room)
    best, best_loss = np.zeros_like(start), math.inf
    for begin in (start, np.full_like(start, 0.1)):
        point = np.clip(_inside(problem, begin, 0.9 * limit), 0, most)
        solver: Any = minimize
        found = solver(
            loss,
            point,
            jac=True,
            method="SLSQP",
            bounds=[(0.0, most)] * len(start),
            constraints={"type": "ineq", "fun": lambda w: inside(w)[0], "jac": lambda w: inside(w)[1]},
            options={"maxiter": 50, "ftol": 1e-8},
        )
        # SLSQP may end a little outside; the ray through it is what counts.
        weights = _inside(problem, np.clip(found.x, 0, most), limit)
        reached = loss(weights)[0]
        if reached < best_loss:
            best, best_loss = weights, reached
    return best


# Shrink weights until the surrogate is within its limit.
def _inside(problem: Problem, weights: np.ndarray[Any, Any], limit: float) -> np.ndarray[Any, Any]:
    low, high = 0.0, 1.0
    if float(problem.surrogate(torch.tensor(weights))) <= limit:
        return weights
    for _ in range(30):
        middle = (low + high) / 2
        fits = float(problem.surrogate(torch.tensor(middle * weights))) <= limit
        low, high = (middle, high) if fits else (low, middle)
    return low * weights
