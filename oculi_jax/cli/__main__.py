"""`python -m oculi_jax.cli`, which is `oculi`."""

from . import main

if __name__ == "__main__":
    main()
