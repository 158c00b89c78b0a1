"""The entry point of group `vllm.general_plugins`."""


def register() -> None:
    """Let vLLM know the quantization method "globe"; vLLM may call this several times in a process."""
    from globe_kernels.serving import vllm_config

    vllm_config.register()
