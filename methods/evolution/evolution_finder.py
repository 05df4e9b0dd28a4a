"""The published name of evolutionary search. Other methods use the engine too, so it is in `methods.search`."""

from methods.search.evolution_finder import EvolutionConfig, EvolutionFinder, Found

__all__ = ["EvolutionConfig", "EvolutionFinder", "Found"]
