"""How drift adds up: the statements about fused Cauchy deltas, their refutations, proofs and constants.

``bounds`` holds what certificates use; ``catalogue`` every claim with its verdict; ``search``, ``sweep``,
``witness`` and ``precise`` refute; ``constants`` computes; ``balls``, ``cover``, ``rigor``, ``any_number`` and
``two_deltas`` prove (they need python-flint); ``experiments`` repeats the source's; ``plan`` looks ahead.
"""

from tether.theory import bounds

__all__ = ["bounds"]
