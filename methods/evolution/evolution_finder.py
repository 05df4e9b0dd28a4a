"""The published name of evolutionary search. Other methods use the engine too, so it is in `methods.search`."""

from methods.search.evolution_finder import EVOLUTIONS, EvolutionConfig, EvolutionFinder, Found

__all__ = ["EVOLUTIONS", "EvolutionConfig", "EvolutionFinder", "Found"]
