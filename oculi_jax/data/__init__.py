"""Whole data sets: run chunk by chunk, kept in files that are whole or not there, and read back."""

from .batches import Batch
from .dataset import Dataset
from .jobs import capture_dataset, map_dataset
from .store import Rows, Store
from .streams import order
from .sums import sum_dataset

__all__ = ["Batch", "Dataset", "Rows", "Store", "capture_dataset", "map_dataset", "order", "sum_dataset"]
