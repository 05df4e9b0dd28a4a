"""The image files in a folder of classes, as torchvision lists them. Imports torchvision, which is slow."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import torch
from torchvision.datasets import ImageFolder

from dataset.class_names import HIDDEN, class_folders
from dataset.image_file import image_suffixes, read_image


class ClassFolders(ImageFolder):
    """The images in ROOT/CLASS, at any depth. Hidden folders and files are left out, like files that are no images.

    `broken` marks images that could not be read, in memory that all worker processes share. `outputs` has the label of
    each class: the number of the network's output, by default its number among the classes of the folder.
    """

    def __init__(self, root: Path) -> None:
        self.suffixes, self.ignored = image_suffixes(), Counter()
        super().__init__(str(root), loader=read_image, is_valid_file=self._is_image, allow_empty=True)
        self.outputs = list(range(len(self.classes)))
        self.broken = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """The names of the classes, each with its number. UserError where there are none."""
        names, found = class_folders(Path(directory)), list(os.scandir(directory))
        self.ignored["hidden"] += sum(entry.name.startswith(HIDDEN) for entry in found)
        loose = [entry for entry in found if not entry.is_dir() and not entry.name.startswith(HIDDEN)]
        self.ignored["outside of class folders"] += len(loose)
        return names, {name: number for number, name in enumerate(names)}

    def tell_ignored(self) -> None:
        """Print one line to stderr if files were left out, and one if classes have no images."""
        if any(self.ignored.values()):
            counts = ", ".join(f"{n} {what}" for what, n in self.ignored.most_common() if n)
            print(f"ignored in {self.root}: {counts}", file=sys.stderr)
        if empty := len(self.classes) - len(set(self.targets)):
            print(f"warning: {empty} of {len(self.classes)} classes in {self.root} have no images", file=sys.stderr)

    def _is_image(self, path: str) -> bool:
        inside = Path(path).relative_to(self.root)
        suffix, hidden = inside.suffix.lower(), any(name.startswith(HIDDEN) for name in inside.parts)
        if hidden or suffix not in self.suffixes:
            self.ignored["hidden" if hidden else suffix or "without an ending"] += 1
            return False
        return True
