"""A finetuned network as constants, and the files that other programs run."""
