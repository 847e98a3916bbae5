"""How drift adds up: the statements about fused Cauchy deltas, their refutations, proofs and constants.

``bounds`` holds what certificates use; ``catalogue`` every claim with its verdict, those about sums itself and those
about anything else from ``claims``; ``search``, ``sweep``, ``witness`` and ``precise`` refute; ``constants`` computes;
``balls``, ``cover``, ``rigor``, ``any_number`` and ``two_deltas`` prove (they need python-flint); ``experiments``
repeats the source's; ``plan`` looks ahead. ``local`` is about small moves, ``mixtures``, ``fisher``, ``multivariate``
and ``stable`` about what is not a sum of independent Cauchy moves, and ``laws`` compares other laws.
"""

from tether.theory import bounds

__all__ = ["bounds"]
