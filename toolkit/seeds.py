"""Random numbers as pure functions of a seed and counters: no state is saved, and no rank waits for another."""

import numpy as np


def uniform(seed: int, *counters: int) -> float:
    """A number of U[0,1) that is a pure function of its arguments: 53 bits of Philox-4x64 (Salmon et al., SC 2011)."""
    return float(int(philox(seed, *counters).random_raw()) >> 11) * 2.0**-53


def philox(seed: int, *counters: int) -> np.random.Philox:
    """A fresh counter-based stream for (seed, counters); different arguments, their number included, never overlap.

    Raises ValueError for more than 3 counters or an argument outside [0, 2**64).
    """
    if len(counters) > 3 or not all(0 <= value < 2**64 for value in (seed, *counters)):
        raise ValueError(f"seed {seed} and counters {counters}: give at most 3 counters, all in [0, 2**64)")
    words = [0, *counters, 0, 0, 0][:4]  # word 0 is what the stream itself advances
    return np.random.Philox(key=np.array([seed, len(counters)], np.uint64), counter=np.array(words, np.uint64))
