"""Settings of the search for a front. This module imports neither torch nor pymoo."""

from __future__ import annotations

from dataclasses import dataclass

from apq.errors import UserError
from lut.costs import UNITS

ACCURACY = "accuracy"
OBJECTIVES = (ACCURACY, "latency")


@dataclass(frozen=True, kw_only=True)
class Nsga2Config:
    """Settings of a search. UserError where one is out of range.

    A child takes each gene from its second parent with probability `crossover_prob`; then each gene is redrawn with
    probability `mutation_prob`.
    """

    population: int = 500
    generations: int = 1000
    crossover_prob: float = 0.1
    mutation_prob: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if self.population < 2 or self.generations < 0:
            raise UserError("population must be at least 2, generations at least 0")
        if not (0 <= self.crossover_prob <= 1 and 0 < self.mutation_prob <= 1):
            raise UserError("crossover_prob lies from 0 to 1, mutation_prob above 0 and up to 1")


NSGA2S = {
    "default": Nsga2Config(),
    # The numbers of QFA's code (main of nsgaii_search.py), for the operators of this program.
    "published": Nsga2Config(population=500, generations=1000, crossover_prob=0.007, mutation_prob=0.02),
}


def parse_objectives(text: str | None) -> tuple[str, ...]:
    """Parse `--objectives`: accuracy and 1 to 3 different costs. Accuracy comes first in the result.

    UserError for other names and numbers of costs.
    """
    if text is None:
        return OBJECTIVES
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in (ACCURACY, *UNITS)]:
        raise UserError(f"--objectives: unknown {unknown[0]!r}; known: {', '.join((ACCURACY, *UNITS))}")
    costs = [name for name in names if name != ACCURACY]
    if len(set(names)) < len(names) or len(costs) == len(names) or not 1 <= len(costs) <= 3:
        raise UserError(f"--objectives {text}: give accuracy and 1 to 3 costs, each once")
    return (ACCURACY, *costs)
