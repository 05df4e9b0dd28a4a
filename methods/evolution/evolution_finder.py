"""The published name of evolutionary search. The engine is in `methods.search`, because other methods use it too."""

from methods.search.evolution_finder import EvolutionConfig, EvolutionFinder, Found

__all__ = ["EvolutionConfig", "EvolutionFinder", "Found"]
