"""Makes the index of a data file, and counts tokens: what training would do at its first use.

In front of `index.py` and `lengths.py` on the data's path.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np

from sqllava.conversation import TEMPLATES
from sqllava.data.index import open_index
from sqllava.data.lengths import count_lengths
from sqllava.data.view import open_view


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("file", type=Path, help="records: LLaVA JSON, JSON lines or Parquet")
    parser.add_argument(
        "--model", help="adapter directory or language model; with it, true lengths are counted"
    )
    parser.add_argument("--template", default="v1_sq", choices=list(TEMPLATES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that count")
    parser.add_argument("--cache-dir", type=Path, help="where the index is kept")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    start = time.perf_counter()
    index = open_index(args.file, args.cache_dir)
    images = int((index.images > 0).sum())
    lines = [
        f"{len(index)} records, {images} of them with images: {index.path} "
        f"({time.perf_counter() - start:.1f} s)"
    ]
    if args.model:
        measure = open_view(args.model).measure(args.template)
        lengths = count_lengths(index, measure, args.jobs)
        middle, most = np.median(lengths), lengths.max()
        lines.append(f"{int(lengths.sum(dtype=np.int64))} tokens, median {middle:.0f}, most {most}")
    sys.stdout.write("\n".join([*lines, ""]))
    return 0
