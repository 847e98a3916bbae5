"""Cauchy geometry as pure tensor functions: the law of the individual cause U."""

from tether.cauchy import charts, divergence, functional

__all__ = ["charts", "divergence", "functional"]
