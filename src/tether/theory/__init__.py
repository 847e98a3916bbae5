"""How drift adds up: the statements about fused Cauchy deltas, and their constants."""

from tether.theory import bounds

__all__ = ["bounds"]
