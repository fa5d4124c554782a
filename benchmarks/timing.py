"""Times of calls, taken in turns, so that what slows the machine slows everyone.

The clock is the processor time of the process: with one thread at work it is the time
that passes, less what other programs take away.
"""

import statistics
import time
from collections.abc import Callable


ROUNDS, BLOCK, PATIENCE = 5, 0.04, 0.6


def once(call: Callable, clock: Callable = time.process_time) -> float:
    start = clock()
    call()
    return clock() - start


def samples(calls: dict[str, Callable]) -> dict[str, list[float]]:
    """Seconds per call, round by round.

    In every round each has a block of calls, long enough for the clock; who is slow
    sits out the last rounds, or all of them. The calls have been warmed up.
    """
    blocks, times = {}, {}
    for name, call in calls.items():
        seconds = once(call)
        slow = seconds > PATIENCE
        rounds = 0 if slow else max(3, round(PATIENCE / max(seconds, BLOCK)))
        times[name] = [seconds] if slow else []
        blocks[name] = max(1, round(BLOCK / seconds)), min(rounds, ROUNDS)
    for turn in range(ROUNDS):
        for name, call in calls.items():
            count, rounds = blocks[name]
            if turn < rounds:
                block = lambda: [call() for _ in range(count)]
                times[name].append(once(block) / count)
    return times


def alternate(calls: dict[str, Callable]) -> dict[str, float]:
    """Median seconds per call."""
    return {name: statistics.median(times) for name, times in samples(calls).items()}
