"""The largest networks that files may describe, far above any in use: what is larger is a damaged or hostile file.

A description of a few bytes could otherwise ask for more memory and time than any machine has.
"""

from __future__ import annotations

MOST_CLASSES = 1 << 20
MOST_CHANNELS = 1 << 16  # of a layer between blocks
MOST_PIXELS = 1 << 12  # side of an image
MOST_KERNEL = 63
MOST_STRIDE = 64
MOST_EXPANSION = 64
MOST_BITS = 32
MOST_CHOICES = 128  # of one kind, such as resolutions
MOST_SLOTS = 1024
MOST_WEIGHTS = 1 << 30  # of the largest subnet of a space
MOST_TABLE = 1 << 26  # combinations of kernel, mid channels and bits, over all slots of a space
LARGEST_LAYER = 1 << 20  # any size of a layer that is priced; exact in float64
