# pyright: reportMissingImports=false
"""The quantization method "globe" of vLLM."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed.parallel_state import get_world_group
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index

from globe_kernels.errors import RequestError
from globe_kernels.format.exported import Export, ExportedConfig
from globe_kernels.format.hub import at_revision, local_directory
from globe_kernels.format.names import BANK_NAME, QUANT_METHOD
from globe_kernels.serving.experts import Experts, options_of
from globe_kernels.serving.vllm_method import GlobeMoEMethod

_OLDEST_CARD = 80  # compute capability 8.0, from which cards have bf16
_DTYPES = [torch.bfloat16, torch.float16, torch.float32]
_OWN = r"(gate|up)_(adapter|code_index|code_value|bias)|down_(proj|bias)|\d+\.\w+\.weight"


class GlobeQuantization(QuantizationConfig):
    """The `quantization_config` of an export: its experts run from GloBE factors, all other layers as they are."""

    def __init__(self, data: Mapping[str, Any] | None = None):
        super().__init__()
        if data is None:
            raise RequestError(
                "--quantization globe is for a directory that `globe export` wrote and this model has no such "
                "quantization_config; leave the option out, vLLM finds it by itself."
            )
        self._globe = ExportedConfig(dict(data), "quantization_config in config.json").globe
        self._name, self._experts = "", None
        self.is_loading_draft = False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_experts": None}  # for another process, which has experts of its own

    def __deepcopy__(self, memo: Any) -> "GlobeQuantization":
        return self  # the parts of one model share the bank

    def get_name(self) -> str:
        """Return the name of the method in config.json."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes that a model may run in."""
        return _DTYPES

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest compute capability, times ten."""
        return _OLDEST_CARD

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no names: the configuration is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GlobeQuantization":
        """Parse `quantization_config`. Raises GlobeError for another version of the format and for damage."""
        return cls(config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Take the directory, or the id on the Hub, and open it once so that damage is told before vLLM starts."""
        if Path(model_name).is_dir():  # without a network vLLM gives the snapshot of an id, and its revision too
            self._name = model_name
            Export(Path(model_name), verify=False)
        else:
            self._name = at_revision(model_name, revision)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return the method of the routed experts of a compressed layer; other layers stay as they are.

        A layer that is made when all experts are arranged is of a draft model, such as the layers of a checkpoint that
        predict further tokens. These are dense in an export, and may have the numbers of compressed layers.
        """
        if self._experts is None:  # the first layer of a model
            _refuse_options(get_current_vllm_config(), self._globe.base.intermediate_size)
        is_of_draft = self._experts is not None and self._experts.is_arranged
        if isinstance(layer, LinearBase):
            self.is_loading_draft |= is_of_draft
            return _DraftLinearMethod(self) if is_of_draft else UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts) and not is_of_draft:
            number = extract_layer_index(prefix)
            if number in self._globe.base.num_experts:
                return GlobeMoEMethod(layer.moe_config, self._globe.base, number, self._of_this_process())
        return None

    def _of_this_process(self) -> Experts:
        if self._experts is None:
            vllm_config = get_current_vllm_config()
            is_dummy = vllm_config.load_config.load_format == "dummy"
            options = options_of(vllm_config.additional_config)
            self._experts = Experts(self._globe, options, None if is_dummy else self._open)
        return self._experts

    def _open(self) -> Export:
        """Open the export, which vLLM has downloaded by now."""
        return Export(local_directory(self._name), verify=get_world_group().local_rank == 0)  # one process of a host

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Let the loader of vLLM leave out the tensors that `Experts` reads; it asks when all layers are made.

        Raises RequestError when the model has not asked for the experts of every layer, and when weights are loaded
        again into experts that are arranged.
        """
        if self.is_loading_draft:
            return WeightsMapper(orig_to_new_regex={re.compile(rf"^{BANK_NAME}\."): None})
        experts = self._of_this_process()
        self._require_all(experts)
        layers = "|".join(map(str, self._globe.base.num_experts))
        own = re.compile(rf"(^|\.)layers\.({layers})\.([\w.]+\.)?experts\.({_OWN})$|^{BANK_NAME}\.")
        return WeightsMapper(orig_to_new_regex={own: None})

    def _require_all(self, experts: Experts) -> None:
        if experts.is_arranged:
            raise RequestError(
                "vLLM loads weights into a model that runs, as after sleep level 2 or for reinforcement learning, and "
                "GloBE experts cannot be replaced; start the engine again, and use sleep level 1."
            )
        parallel = get_current_vllm_config().parallel_config
        missing = self._globe.base.num_experts.keys() - experts.layers
        if not missing or parallel.pipeline_parallel_size > 1:
            return
        if experts.layers:
            raise RequestError(
                f"vLLM has made {len(experts.layers)} layers of experts and the export has {len(missing)} more, the "
                f"first is layer {min(missing)}; serve the directory as it was exported, without --hf-overrides."
            )
        raise RequestError(
            f"This vLLM runs the experts of a {self._globe.base.model_type} model by code that takes no quantization "
            "method; serve the dense export of this model (globe export --dense)."
        )


class _DraftLinearMethod(UnquantizedLinearMethod):
    """Runs a dense layer of a draft model, and says when the model is loaded."""

    def __init__(self, config: GlobeQuantization):
        super().__init__()
        self._config = config

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        self._config.is_loading_draft = False


def _refuse_options(vllm_config: Any, rows: int) -> None:
    """Raise RequestError for options of vLLM that GloBE experts of so many rows cannot follow."""
    parallel, model, load = vllm_config.parallel_config, vllm_config.model_config.model, vllm_config.load_config
    processes = parallel.tensor_parallel_size * parallel.data_parallel_size
    if rows % processes and not parallel.enable_expert_parallel:
        raise RequestError(
            f"Experts of {rows} rows cannot be split over {processes} processes; give a --tensor-parallel-size that "
            "divides them, or add --enable-expert-parallel."
        )
    if load.download_dir is not None and not Path(model).is_dir():
        raise RequestError(
            f"--download-dir is not followed for the experts of {model}; run `hf download {model} --local-dir "
            "DIRECTORY` and give the directory, or set HF_HOME."
        )
    if parallel.enable_eplb:
        raise RequestError(
            "--enable-eplb moves experts between processes and GloBE experts stay where they were loaded; leave "
            "--enable-eplb out."
        )
    lora = vllm_config.lora_config
    if lora is not None and (lora.target_modules is None or any("expert" in name for name in lora.target_modules)):
        raise RequestError(
            "--enable-lora puts adapters on the experts too and GloBE experts take none; name the layers around the "
            "experts with --lora-target-modules, such as q_proj k_proj v_proj o_proj."
        )
