"""The shipped model by every strategy: vLLM gives the tokens of transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.serving.engine import PROMPTS, Generated, engine, generate, require_same

TOLERANCE = 2e-5  # of a log-probability in fp32


@pytest.fixture(scope="module")
def by_transformers(shipped) -> list[Generated]:
    model = AutoModelForCausalLM.from_pretrained(shipped.globe, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(shipped.globe)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        result = Generated([], [])
        for _ in range(24):
            with torch.no_grad():
                logprobs = model(ids).logits[0, -1].log_softmax(-1)
            result.tokens.append(int(logprobs.argmax()))
            result.logprobs.append(float(logprobs.max()))
            ids = torch.cat([ids, ids.new_tensor([[result.tokens[-1]]])], dim=1)
        found.append(result)
    return found


@pytest.mark.parametrize("strategy", [None, "composed", "bank_first", "cached", "scratch"])
def test_greedy_tokens_by_strategy(shipped, by_transformers, strategy, record_property):
    with engine(shipped.globe, strategy=strategy) as llm:
        record_property("largest", require_same(generate(llm), by_transformers, TOLERANCE))
