"""Fuzz the files that GloBE reads: python -m tests.fuzz --count 10000 --seed 1, or one case by --kind and --case.

Cases run in a process of their own, chunk by chunk: a case that ends its process is a finding, and the run goes on.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections import Counter
from pathlib import Path

_CHUNK = 1000


def main() -> int:
    """Run the cases and print a line per kind, with the findings before it; returns 1 when there is a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--kind", action="append", help="a kind, or the start of the names of several (all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300, help="cases of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many seconds")
    parser.add_argument("--case", type=int, help="run this case alone, and keep its directory")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # a forked process has none of the threads of its parent, and would wait for them
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.dont_write_bytecode = True
    from tests.fuzz.kinds import KINDS

    wanted = {
        kind: None
        for start in given.kind or [""]
        for kind in KINDS
        if kind == start or start not in KINDS and kind.startswith(start)
    }
    if given.case is not None:
        return _reproduce(next(iter(wanted)), given.seed, given.case)
    until, found = time.monotonic() + given.seconds, 0
    for kind in wanted:
        found += _run(kind, given.seed, range(given.first, given.first + given.count), until)
    return 1 if found else 0


def _reproduce(kind: str, seed: int, number: int) -> int:
    from contextlib import nullcontext

    from tests.fuzz.cases import opened
    from tests.fuzz.kinds import remembered_outlines

    with opened(kind) as valid, remembered_outlines() if valid.kind.keeps_config else nullcontext():
        outcome = valid.run(seed, number, keep=True)
        print(outcome)
        kept = Path(f"/tmp/globe-fuzz-case-{os.getpid()}")
        os.system(f"cp -a '{valid.directory}' '{kept}'")
        print(f"The damaged input is in {kept}.")
    return 0 if outcome.finding is None else 1


def _run(kind: str, seed: int, numbers: range, until: float) -> int:
    from tests.fuzz.cases import opened

    began, counts, findings, done, peak = time.monotonic(), Counter(), 0, numbers.start, 0
    with opened(kind) as valid:
        while done < numbers.stop and time.monotonic() < until:
            chunk = range(done, min(done + _CHUNK, numbers.stop))
            for line in _in_a_process(valid, seed, chunk, until):
                if "peak" in line:
                    peak = max(peak, line["peak"])
                    continue
                done = line["number"] + 1
                counts[line["outcome"]] += 1
                if line["finding"] is not None:
                    findings += 1
                    print(line["text"], flush=True)
    seconds = time.monotonic() - began
    outcomes = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    print(
        f"{kind}: seed {seed}, cases {numbers.start} to {done - 1}, {findings} findings ({outcomes}), {seconds:.0f} s, "
        f"peak {peak >> 10} MiB",
        flush=True,
    )
    return findings


def _in_a_process(valid, seed: int, numbers: range, until: float):
    """Yield the outcomes of a forked process; its death is an outcome of the case that it was at."""
    from tests.fuzz.cases import Outcome, run_cases

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            with os.fdopen(writing, "w") as pipe:
                for outcome in run_cases(valid, seed, numbers):
                    text = str(outcome)
                    facts = {"number": outcome.number, "outcome": outcome.outcome, "finding": outcome.finding}
                    pipe.write(json.dumps(facts | {"text": text}) + "\n")
                    pipe.flush()
                    if time.monotonic() > until:
                        break
                pipe.write(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}) + "\n")
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    last = numbers.start - 1
    with os.fdopen(reading) as pipe:
        for line in map(json.loads, pipe):
            last = line.get("number", last)
            yield line
    _, status = os.waitpid(child, 0)
    if status != 0:
        ended = Outcome(valid.name, seed, last + 1, "?", "?", "ends the process", f"wait status {status}")
        yield {"number": last + 1, "outcome": ended.outcome, "finding": ended.finding, "text": str(ended)}
        valid.restore()


if __name__ == "__main__":
    sys.exit(main())
