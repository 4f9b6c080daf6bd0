"""What tests of the engine share."""

import random

from llama.engine.engine import Engine


def prompts_of(lengths: list[int], vocab: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[1] + [rng.randrange(3, vocab) for _ in range(length - 1)] for length in lengths]


def is_clean(engine: Engine) -> bool:
    """Whether every slot is free and nothing is queued."""
    scheduler = engine.scheduler
    return engine.idle and sorted(scheduler.free) == list(range(scheduler.slots)) and not scheduler.running
