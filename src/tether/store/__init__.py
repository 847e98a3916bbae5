"""Bytes on disk: read lazily, published whole or not at all."""
