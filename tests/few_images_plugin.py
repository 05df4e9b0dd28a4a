"""For APQ_PLUGINS: the data set of digits has few images in this process."""

from few_images import FEW_DIGITS

from dataset.table import DATASETS

DATASETS["digits"] = FEW_DIGITS
