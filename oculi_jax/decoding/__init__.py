"""Generation: one token after another, with edits at every step."""
