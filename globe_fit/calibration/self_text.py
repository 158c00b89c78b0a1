"""Let the dense model write the text of a calibrated fit.

Windows of tokens are sampled from the model token by token, at temperature 1 and without any cut of the distribution,
each from a first token drawn evenly from the vocabulary. An end-of-text token does not end a window: as in the texts
that a model is trained on, another document follows.
"""

from collections.abc import Callable
from typing import Any

import torch

from globe_fit.data.model import predictor, running

WINDOWS = 320  # of evaluate.WINDOW tokens: about as many as docs/log.md has figures of; other numbers were not tried
AT_ONCE = 160  # windows of a batch, whose keys and values stay in memory


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
    """Sample tokens (count, length) int64, on the CPU, from `model` on `device`; a seed fixes the text on a CPU."""
    generator = torch.Generator().manual_seed(seed)
    model = predictor(model)
    vocabulary = model.get_input_embeddings().num_embeddings
    written = torch.empty(count, length, dtype=torch.int64)
    parts = written.split(AT_ONCE)
    for number, part in enumerate(parts):
        part[:, :1] = torch.randint(vocabulary, (len(part), 1), generator=generator)
        cache = None
        for position in range(1, length):
            with running("The model"):
                output = model(part[:, position - 1 : position].to(device), past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                # on the CPU: the generator of a GPU draws other numbers on other cards
                probabilities = output.logits[:, -1].float().softmax(-1).cpu()
                part[:, position : position + 1] = torch.multinomial(probabilities, 1, generator=generator)
            if on_batch is not None:
                on_batch(number * (length - 1) + position, len(parts) * (length - 1))
    return written
