"""Other backends than JAX: each keeps the contract for its own kind of model, and is imported when a model asks for it."""
