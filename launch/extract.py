"""Turn slides into frozen features with any encoder, once, for heads without an encoder.

  python launch/extract.py --stores A.lmdb B.lmdb --encoder r50 --out features
  python launch/extract.py --slides SLIDES --encoder uni encoder.weights=uni.bin --out features
  torchrun --nproc-per-node 4 launch/extract.py --stores 'data/*.lmdb' --encoder virchow2 --out features

Writes features/20x_256px_0px_overlap/features_r50/<slide>.h5 in TRIDENT's layout. Slides that are
there already are left as they are; features of another encoder, weights or size in the same place
are an error. Exit code 3: some slides could not be read; the others are done.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e2e.cohort.readers import store_files
from e2e.errors import exit_code
from e2e.runs import extract
from e2e.store.open import open_store
from e2e.wsi.tiling import Tiling


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument("--stores", nargs="+", metavar="FILE", help="patch stores, or globs")
    source.add_argument("--slides", type=Path, metavar="DIR", help="slides, cut as a grid first")
    made.add_argument("--encoder", required=True, help="r18, r50, uni ... or any timm name")
    made.add_argument("--out", type=Path, required=True, metavar="DIR")
    made.add_argument("--size", type=int, help="side the encoder sees (as stored, or its own)")
    made.add_argument("--batch", type=int, default=256, help="patches at once")
    made.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    made.add_argument("--dtype", choices=tuple(extract.DTYPES), default="float16")
    made.add_argument("--device", default="auto", help="cpu or cuda")
    made.add_argument("--coords", type=Path, metavar="DIR", help="h5 files, for stores without")
    made.add_argument("--mpp", type=float, default=0.5, help="--slides: um per pixel of patches")
    made.add_argument("--patch-size", type=int, default=256, help="--slides: side of a patch")
    made.add_argument("--mpp-override", type=Path, help="--slides: CSV slide,mpp")
    made.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="--slides: processes"
    )
    made.add_argument("options", nargs="*", metavar="encoder.key=value")
    return made


def main() -> int:
    """Parse and extract."""
    args = parser().parse_intermixed_args()
    options = extract.encoder_options(args.encoder, args.options)
    how = {key: getattr(args, key) for key in ("size", "batch", "precision", "dtype", "device")}
    if args.slides is not None:
        return extract.extract_slides(
            args.slides,
            args.encoder,
            options,
            args.out,
            tiling=Tiling(mpp=args.mpp, patch_px=args.patch_size),
            mpp_override=args.mpp_override,
            workers=args.workers,
            **how,
        )
    files = [file for entry in args.stores for file in store_files(entry)]
    stores = [open_store(file, args.coords) for file in files]
    return extract.extract(stores, args.encoder, options, args.out, **how)


if __name__ == "__main__":
    sys.exit(exit_code(main))
