"""The five prompts on which parity with Hugging Face is measured, in the tests and in the benchmark."""

FRANCE = "The capital of France is"
IOI = "When Mary and John went to the store, {} gave a drink to"
LONG = (  # 98 tokens
    "The library at the end of the street had been closed for years, but every evening a light went on in the reading "
    "room. Nobody in the village could say who lit it. The baker thought that it was the old librarian; the children "
    "were sure that it was a ghost who missed her books. One autumn night Anna took a torch and a piece of bread, climbed "
    "over the wall, and knocked at the tall green door, which opened before her hand had touched it a second time."
)
# Text, and how many padding tokens go before it.
PROMPTS = (
    (FRANCE, 0),
    (IOI.format("John"), 0),
    ("def fib(n):\n    return n if n < 2 else fib(n - 1) +", 0),
    ("Paris is to France as Rome is to", 5),
    (LONG, 0),
)
