"""A text to calibrate on where there is none: what the dense model itself writes.

Windows of tokens sampled from the model one by one, at temperature 1 and without any cut of the distribution, each from
a first token drawn evenly from the vocabulary. An end-of-text token does not end a window: as in the texts a model is
trained on, another document follows.
"""

from collections.abc import Callable
from typing import Any

import torch

WINDOWS = 320  # of evaluate.WINDOW tokens: about as many as docs/log.md has figures of; other numbers were not tried
AT_ONCE = 64  # a batch, whose keys and values are kept


@torch.inference_mode()
def sample_windows(
    model: Any,
    length: int,
    device: str,
    *,
    count: int = WINDOWS,
    seed: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """(count, length) int64 tokens on the CPU that `model`, on `device`, writes; one seed gives one text on a CPU."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().num_embeddings
    written = torch.empty(count, length, dtype=torch.int64)
    parts = written.split(AT_ONCE)
    for number, part in enumerate(parts):
        part[:, :1] = torch.randint(vocabulary, (len(part), 1), generator=generator)
        cache = None
        for place in range(1, length):
            output = model(part[:, place - 1 : place].to(device), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            # sampled on the CPU: the generator of a GPU draws other numbers on other cards
            probabilities = output.logits[:, -1].float().softmax(-1).cpu()
            part[:, place : place + 1] = torch.multinomial(probabilities, 1, generator=generator)
            if on_batch is not None:
                on_batch(number * (length - 1) + place, len(parts) * (length - 1))
    return written
