"""How often a verdict is wrong, and how late it is: simulated runs with known change points.

    python benchmarks/verdicts.py [--runs 400] [--out benchmarks/results/verdicts.txt]

Every reading of a run is judged as it comes, as in training. A false alarm is a run whose
evaluation loss never turns and which was called memorising or unstable at any of its readings. In
each, training loss falls at every reading, so that only the evaluation loss can prevent one. Noise:
"white" is independent at each reading; "drifting" keeps half of the last reading's.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import quantiles

from lorafit.run.overfit import Series, Setup, Verdict, judge

EVERY = 20
READINGS = (5, 10, 20, 40, 60)
Curve = Callable[[int], float]


def noise(count: int, deviation: float, *, kept: float, draw: random.Random) -> list[float]:
    """`count` deviations of which each keeps the share `kept` of the last."""
    made = [draw.gauss(0, deviation)]
    fresh = deviation * (1 - kept**2) ** 0.5
    while len(made) < count:
        made.append(kept * made[-1] + draw.gauss(0, fresh))
    return made


def judged(
    curve: Curve, count: int, *, deviation: float, kept: float, draw: random.Random
) -> list[Verdict]:
    """The verdict at each reading of one simulated run."""
    steps = tuple(EVERY * n for n in range(count))
    wobble = noise(count, deviation, kept=kept, draw=draw)
    losses = tuple(curve(n) + wobble[n] for n in range(count))
    trained = tuple(2 * 0.97**n for n in range(count))
    setup = Setup(steps=EVERY * (count - 1), epochs=10, learning_rate=2e-4)
    return [
        judge(
            Series(steps[:n], losses[:n]),
            Series(steps[:n], trained[:n]),
            setup=setup,
        )
        for n in range(1, count + 1)
    ]


def flat(_: int) -> float:
    """Nothing was ever learned, and nothing forgotten."""
    return 1.2


def settling(n: int) -> float:
    """A fast fall to a level."""
    return 1.2 + 1.8 * 2.718 ** (-n / 2)


def falling(n: int) -> float:
    """A slow fall that has not ended."""
    return 1.2 + 1.8 * 2.718 ** (-n / 8)


def turning(at: int, rise: float) -> Curve:
    """A fast fall to a level, and from reading `at` a rise by so much at each reading."""
    return lambda n: settling(n) + max(0, n - at) * rise


def alarmed(verdicts: Sequence[Verdict]) -> int | None:
    """The number of the first reading with an alarm."""
    kinds = [verdict.kind for verdict in verdicts]
    alarms = (n for n, kind in enumerate(kinds) if kind in ("memorising", "unstable"))
    return next(alarms, None)


def false_alarms(runs: int) -> list[str]:
    """The table of runs that never turn."""
    lines = [
        "False alarms, % of runs, up to the reading",
        f"{'evaluation loss':16}{'noise':10}{'nats':>7}"
        + "".join(f"{f'{count} readings':>14}" for count in READINGS),
    ]
    for curve in (flat, settling, falling):
        for kept in (0.0, 0.5):
            for deviation in (0.002, 0.01, 0.05):
                draw = random.Random(0)
                first = [
                    alarmed(judged(curve, READINGS[-1], deviation=deviation, kept=kept, draw=draw))
                    for _ in range(runs)
                ]
                shares = [
                    sum(n is not None and n < count for n in first) / runs for count in READINGS
                ]
                lines.append(
                    f"{curve.__name__:16}{'drifting' if kept else 'white':10}{deviation:7.3f}"
                    + "".join(f"{100 * share:14.1f}" for share in shares)
                )
    return lines


def delays(runs: int, *, at: int = 10, after: int = 30) -> list[str]:
    """The table of runs that turn at the reading `at`."""
    lines = [
        f"Runs that turn at reading {at}: readings until it is said (10%, half, 90% of the runs), "
        f"said within {after}, said before it,",
        "and how far from the true one the reading lies that is named as its beginning (half, 90%)",
        f"{'rise a reading':16}{'noise':10}{'nats':>7}{'delay':>18}{'said %':>10}{'early %':>10}"
        f"{'off by':>12}",
    ]
    for rise in (0.005, 0.01, 0.03, 0.1):
        for kept in (0.0, 0.5):
            for deviation in (0.002, 0.01, 0.05):
                draw, curve = random.Random(0), turning(at, rise)
                found, off, early = [], [], 0
                for _ in range(runs):
                    told = judged(curve, at + after, deviation=deviation, kept=kept, draw=draw)
                    first = alarmed(told)
                    if first is not None and first <= at:
                        early += 1
                    elif first is not None:
                        found.append(first - at)
                        off.append(abs((told[first].since or 0) // EVERY - at))
                cut = quantiles(found, n=10) if len(found) > 1 else [0.0] * 9
                far = quantiles(off, n=10) if len(off) > 1 else [0.0] * 9
                lines.append(
                    f"{rise:<16.3f}{'drifting' if kept else 'white':10}{deviation:7.3f}"
                    f"{f'{cut[0]:.0f} {cut[4]:.0f} {cut[8]:.0f}':>18}"
                    f"{100 * len(found) / runs:10.1f}{100 * early / runs:10.1f}"
                    f"{f'{far[4]:.0f} {far[8]:.0f}':>12}"
                )
    return lines


def main() -> None:
    """Simulate, print and write the two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    head = f"{given.runs} simulated runs a line, seed 0; python benchmarks/verdicts.py"
    text = "\n".join([head, "", *false_alarms(given.runs), "", *delays(given.runs)]) + "\n"
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
