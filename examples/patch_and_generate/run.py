"""Generate text with a dense model, and again after a GloBE checkpoint took the place of its experts.

python examples/compress/compress.py              first: makes out/compress
python examples/patch_and_generate/run.py
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import globe_kernels
from globe_kernels.units import format_bytes

SHIPPED = Path(__file__).resolve().parent.parent / "tiny_moe"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path, nargs="?", default=SHIPPED, help="the model that was compressed")
    parser.add_argument("--globe", type=Path, default=Path("out/compress"), help="directory of the GloBE checkpoint")
    parser.add_argument("--strategy", default="auto", help="auto, composed, bank_first, cached or scratch")
    parser.add_argument("--prompt", default="Return a new list containing")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype="auto")
    model.to(device)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(device)

    def generate() -> str:
        tokens = model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False)
        return tokenizer.decode(tokens[0], skip_special_tokens=True)

    print("dense:", generate())
    report = globe_kernels.patch(model, args.globe, strategy=args.strategy)
    print("GloBE:", generate())
    before, after, peak = map(format_bytes, (report.bytes_before, report.bytes_after, report.bytes_peak))
    print(f"Experts: {before} dense, {after} as GloBE, {peak} at the peak of a long call (predicted).")
    print(globe_kernels.explain(model, tokens=1))


if __name__ == "__main__":
    main()
