"""Many variants of a run, planned: what they share is run once."""
