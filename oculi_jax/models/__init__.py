"""Models: the networks, and the guide's object API over them."""
