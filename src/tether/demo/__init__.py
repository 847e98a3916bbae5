"""The main job end to end, on real text that installed packages carry."""
