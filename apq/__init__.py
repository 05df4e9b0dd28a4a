"""The vocabulary of the toolkit: spaces, subnets, genes, layers, policies, and the files they are kept in."""

__version__ = "0.2.0"
