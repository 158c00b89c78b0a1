"""A short run of the fuzzer over every kind, and cases that the fuzzer itself must find."""

import os

SEED = int(os.environ.get("GLOBE_FUZZ_SEED", "0"))
# A few hundred cases of the kinds that take a millisecond, fewer of the kinds that build a model or draw figures.
FEW = {"page": 2, "page of an unfinished fit": 4}
