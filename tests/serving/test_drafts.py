"""The layers of a checkpoint that predict further tokens: dense in an export, loaded by vLLM after the model itself."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from globe_fit import ExpertSource, fit, save_fit
from globe_kernels import RequestError
from tests.conftest import TINY_FIT
from tests.serving.engine import engine, generate
from tests.serving.test_families import FAMILIES, PROMPTS, SMALL, save

HIDDEN = 64


@pytest.fixture(scope="module")
def with_draft(tmp_path_factory, export_both):
    """The exports of a model with a layer that predicts the token after the next."""
    folder = tmp_path_factory.mktemp("draft")
    save(FAMILIES["exaone_moe"], folder / "base")
    file, config_json = folder / "base" / "model.safetensors", folder / "base" / "config.json"
    tensors = load_file(file)
    layer = {key: tensor for key, tensor in tensors.items() if key.startswith("model.layers.0.")}
    tensors |= {key.replace("model.", "mtp.", 1): tensor.clone() for key, tensor in layer.items()}
    tensors |= {f"mtp.{name}.weight": torch.ones(HIDDEN) for name in ("norm", "pre_fc_norm_hidden")}
    tensors |= {"mtp.pre_fc_norm_embedding.weight": torch.ones(HIDDEN), "mtp.fc.weight": torch.eye(HIDDEN, 2 * HIDDEN)}
    save_file(tensors, file, {"format": "pt"})
    config_json.write_text(json.dumps(json.loads(config_json.read_text()) | {"num_nextn_predict_layers": 1}))
    source = ExpertSource(folder / "base")
    save_fit(fit(source, TINY_FIT), source, folder / "checkpoint")
    return export_both(folder / "checkpoint", folder / "base", dtype=torch.float32)


def test_speculation_gives_the_same_tokens(with_draft):
    prompts = [{"prompt_token_ids": each.tolist()} for each in PROMPTS]
    with engine(with_draft.dense, **SMALL) as llm:
        expected = generate(llm, prompts)
    draft = {"method": "mtp", "num_speculative_tokens": 1}
    with engine(with_draft.globe, **SMALL, speculative_config=draft) as llm:
        assert [each.tokens for each in generate(llm, prompts)] == [each.tokens for each in expected]
        with pytest.raises(RequestError, match="loads weights into a model that runs"):
            llm.llm_engine.vllm_config.quant_config.get_checkpoint_weight_mapper()
