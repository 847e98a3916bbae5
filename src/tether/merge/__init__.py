"""Whole models merged: planned on headers, streamed in fixed buffers, checked before they are published."""
