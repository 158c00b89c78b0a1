"""Run vLLM in this process, one engine after the other, and compare what two engines generate."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ |= ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # before vllm is imported

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402

PROMPTS = ("The king of the land", "Once upon a time", "He said that", "In the year", "A small house")


class Generated(NamedTuple):
    """The greedy tokens of a prompt, and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]


@contextmanager
def engine(directory: Path, *, strategy: str | None = None, **options: Any) -> Iterator[LLM]:
    """Start an engine in fp32, eager and on one core unless `options` say otherwise, and end it."""
    if strategy is not None:
        options["additional_config"] = {"globe": {"strategy": strategy}}
    usual = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "gpu_memory_utilization": 0.3}
    llm = LLM(str(directory), **usual | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def generate(llm: LLM, prompts: Sequence[Any] = PROMPTS, tokens: int = 24) -> list[Generated]:
    """Generate greedily from texts, or from {"prompt_token_ids": ids}."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, ignore_eos=True)
    found = [each.outputs[0] for each in llm.generate(list(prompts), sampling, use_tqdm=False)]
    logprobs = [[part[t].logprob for t, part in zip(f.token_ids, f.logprobs, strict=True)] for f in found]
    return [Generated(list(f.token_ids), of_tokens) for f, of_tokens in zip(found, logprobs, strict=True)]


def require_same(found: list[Generated], expected: list[Generated], within: float) -> float:
    """Assert equal tokens, and log-probabilities within a distance; return the largest difference."""
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    pairs = zip(found, expected, strict=True)
    largest = max(abs(a - b) for one, other in pairs for a, b in zip(one.logprobs, other.logprobs, strict=True))
    assert largest <= within, largest
    return largest


if __name__ == "__main__":  # in a process of its own, whose workers import this file again
    directory, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    with engine(directory, **options) as started:
        print(json.dumps([each._asdict() for each in generate(started)]))
