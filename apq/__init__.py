"""The vocabulary of the toolkit: spaces, subnets, genes, layers, policies, and their files."""

__version__ = "0.2.0"
