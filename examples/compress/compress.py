"""Compress the experts of a Mixture-of-Experts model and save the GloBE checkpoint.

    python examples/compress/compress.py                                 the shipped model, in about two minutes
    python examples/compress/compress.py MODEL_DIR --out OUT --steps 1500

`examples/patch_and_generate/run.py` runs the result.
"""

import argparse
from pathlib import Path

from globe_fit import FitConfig, compress

SHIPPED = Path(__file__).resolve().parent.parent / "tiny_moe"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path, nargs="?", default=SHIPPED, help="local directory of a model")
    parser.add_argument("--out", type=Path, default=Path("out/compress"), help="directory for the checkpoint")
    parser.add_argument("--config", type=Path, help="TOML file of settings, such as examples/fast_preset/fast.toml")
    parser.add_argument("--steps", type=int, help="more steps lower the error (50, or the steps of --config)")
    parser.add_argument("--calibrate", default="auto", help="a text file; by default the model writes a text")
    args = parser.parse_args()

    if args.steps is None and args.config is None:
        args.steps = 50
    config = FitConfig.from_options(args.config, {"steps": args.steps})

    def on_step(record: dict) -> None:
        if record["step"] % 10 == 0:
            print(f"{record['family']}, step {record['step']}: relative error {record['relative_error']:.4f}")

    result = compress(args.model_dir, args.out, config, calibrate=args.calibrate, on_step=on_step)
    for family, report in result.report["families"].items():
        print(
            f"{family}: error {report['relative_error']:.4f}, {report['svd_equal_bytes']:.4f} of an SVD in equal bytes"
        )
    print(f"{result.status.advice} The checkpoint is in {args.out}.")


if __name__ == "__main__":
    main()
