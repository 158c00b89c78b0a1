"""Plugins for engines that serve a GloBE export from its compressed form.

    experts.py        for any engine: the experts of one process, their bank, the arrangement, the options
    vllm_plugin.py    the entry point that vLLM calls in each of its processes
    vllm_config.py    the quantization method "globe" of vLLM: which layers are GloBE's, which tensors its loader skips
    vllm_method.py    the experts of one layer of a vLLM model

Nothing of an engine is replaced or patched. No other part of GloBE imports an engine.
"""
