"""A text that the model writes follows the distribution of the model, and a fit to the text beats a fit without."""

from types import SimpleNamespace

import pytest
import torch

from globe_fit import ExpertSource, FitConfig, VarProConfig, fit
from globe_fit.calibration import metric as calibration
from globe_fit.calibration.metric import calibrate
from globe_fit.calibration.offload import plan_run
from globe_fit.calibration.self_text import AT_ONCE, sample_windows
from globe_fit.cli.demo import shipped_model
from globe_fit.config import SELF
from globe_fit.data.model import load_model, token_windows, with_experts
from globe_fit.fitting import open_snapshots
from globe_fit.measure.evaluate import evaluate
from globe_fit.result import reconstruct
from globe_kernels.errors import RequestError


class Bigrams:
    """A "model" of four tokens whose next token depends on the last alone, and which counts the tokens that it gets."""

    def __init__(self):
        self.probabilities = torch.tensor([[0.1, 0.2, 0.3, 0.4], [1, 0, 0, 0], [0, 0.5, 0.5, 0], [0.25] * 4])
        self.seen = 0

    def get_input_embeddings(self):
        return SimpleNamespace(num_embeddings=4)

    get_output_embeddings = get_input_embeddings

    def forward(self, tokens, past_key_values, use_cache):
        assert tokens.shape[1] == 1 and use_cache and (past_key_values or 0) < 63
        self.seen += tokens.numel()
        return SimpleNamespace(logits=self.probabilities[tokens].log(), past_key_values=(past_key_values or 0) + 1)

    __call__ = forward


def test_tokens_follow_the_distribution_of_the_model():
    model, done = Bigrams(), []
    windows = sample_windows(model, 64, "cpu", count=2 * AT_ONCE + 5, on_batch=lambda *counts: done.append(counts))
    assert windows.shape == (2 * AT_ONCE + 5, 64) and windows.dtype == torch.int64
    assert model.seen == (2 * AT_ONCE + 5) * 63
    assert done == [(number, 3 * 63) for number in range(1, 3 * 63 + 1)]
    counts = torch.zeros(4, 4)
    counts.index_put_((windows[:, :-1].flatten(), windows[:, 1:].flatten()), torch.ones(1), accumulate=True)
    found = counts / counts.sum(1, keepdim=True)
    assert (found - model.probabilities).abs().max() < 0.03  # four standard deviations of the rarest token
    assert torch.equal(found == 0, model.probabilities == 0)
    firsts = windows[:, 0].bincount(minlength=4) / len(windows)
    assert (firsts - 0.25).abs().max() < 0.15
    assert torch.equal(windows, sample_windows(Bigrams(), 64, "cpu", count=2 * AT_ONCE + 5))
    assert not torch.equal(windows, sample_windows(Bigrams(), 64, "cpu", count=2 * AT_ONCE + 5, seed=1))


def test_the_shipped_model_writes_what_it_finds_likely():
    model = load_model(shipped_model())
    windows = sample_windows(model, 48, "cpu", count=8)
    with torch.no_grad():
        log_probs = model(windows).logits[:, :-1].float().log_softmax(-1)
    written = -log_probs.gather(2, windows[:, 1:, None]).mean()
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    assert written == pytest.approx(entropy.item(), rel=0.1)  # of the full distribution: no temperature, no cut
    uniform = torch.tensor(float(model.config.vocab_size)).log()
    assert written < 0.8 * uniform


@pytest.mark.slow
def test_a_fit_to_what_the_model_writes_is_closer_to_the_model(tmp_path, monkeypatch):
    source, config = ExpertSource(shipped_model()), FitConfig(varpro=VarProConfig(steps=30, warmup_steps=5))
    monkeypatch.setattr(calibration, "sample_windows", lambda *args, **kw: sample_windows(*args, **kw, count=24))
    done = []
    self_text = calibrate(
        source,
        SELF,
        snapshots=open_snapshots(tmp_path, source, config, calibrated_on=SELF),
        on_batch=lambda *counts: done.append(counts),
    )
    assert self_text.facts == {"text": "self", "sha256": None, "tokens": 24 * 256}
    assert done[0] == (1, 2 * 255) and done[-1] == (2 * 255, 2 * 255) and done == sorted(done)
    with pytest.raises(RequestError, match="calibration was self and is None"):
        open_snapshots(tmp_path, source, config)
    spans = {layer.layer: span for layer, span in source.layer_spans}
    models = {"dense": load_model(shipped_model())}
    for name, metric in (("free", None), ("self", self_text)):
        result = fit(source, config, calibration=metric)

        def weights(layer, family, result=result):
            factors = result.families[family]
            return reconstruct(factors.at(spans[layer.layer]), factors.bank, "identity")

        models[name] = with_experts(source, weights)
    quality = evaluate(models, token_windows(shipped_model(), shipped_model() / "heldout.txt")[:12])
    assert quality["self"].kl < 0.8 * quality["free"].kl


def test_a_model_that_does_not_fit_cannot_write():
    source = ExpertSource(shipped_model())
    over_a_text, writing = plan_run(source, "cpu"), plan_run(source, "cpu", writes=True)
    assert not writing.offload and over_a_text.in_memory_bytes < writing.in_memory_bytes <= writing.peak_bytes
    with pytest.raises(RequestError, match=r"would take [\d.]+ MB to write a text and [\d.]+ MB may be used; give a"):
        plan_run(source, "cpu", 0.01 * 2**30, writes=True)
