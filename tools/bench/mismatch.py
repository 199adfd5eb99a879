"""Time that it takes to explain a label table whose ids follow another naming scheme than the slides.

    python -m tools.bench.mismatch --rows 20000

Prints the message a user would see, its number of lines and the seconds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from e2e.cohort.load import load_cohort
from e2e.cohort.spec import CohortSpec
from e2e.errors import UserError
from e2e.tasks.base import TASKS

SCHEMES = {
    "path and suffix": "/data/wsi/{}.svs",
    "letter case": "slide-{}",
    "near misses": "SLIDE_{}",
    "no relation": "patient {}",
}
"""Name -> how the table writes the number of the slide; the data have ``SLIDE-<number>``."""


def main() -> int:
    """Print the message, its lines and the seconds for each naming scheme."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    num_rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        data, labels = Path(folder, "features.h5"), Path(folder, "labels.csv")
        with h5py.File(data, "w") as file:
            for k in range(num_rows):
                file.create_dataset(f"SLIDE-{k:06d}/feat", (1, 1), np.float32)
        for name, form in SCHEMES.items():
            number = "SLIDE-{:06d}" if "path" in name else "{:06d}"
            rows = [f"{form.format(number.format(k))},c{k},{'ab'[k % 2]}" for k in range(num_rows)]
            labels.write_text("\n".join(["slide,case,label", *rows]))
            spec = CohortSpec(labels=str(labels), features=(str(data),), val_share=0.2)
            task = TASKS.build("classification", classes=["a", "b"])
            start = time.perf_counter()
            try:
                load_cohort(spec, task, features=True, problems_file=Path(folder, "problems.csv"))
            except UserError as error:
                seconds = time.perf_counter() - start
                lines = str(error).splitlines()
                print(f"{name}: {seconds:.1f} s, {len(lines)} lines")
                print("\n".join(f"    {line}" for line in lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
