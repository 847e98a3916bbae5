"""Figures and self-contained HTML pages from what a run has measured."""
