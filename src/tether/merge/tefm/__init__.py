"""LAPE-TEFM, stage by stage: what is known of neurons, which belong together, the update, the last step."""
