"""The names of the format: its files, and the values that a configuration may have. Imports nothing heavy."""

# The two families of matrices that GloBE compresses; each has its own bank, adapters and codes.
FAMILIES = ("gate", "up")

CONFIG_NAME = "globe_config.json"
REPORT_NAME = "fit_report.json"
METRICS_NAME = "metrics.jsonl"
EVALUATION_NAME = "evaluation.json"  # of `globe eval`, beside a checkpoint
PAGE_NAME = "report.html"  # of `globe report`, beside a checkpoint
QUANT_METHOD = "globe"
BANK_NAME = "globe_bank"  # the bank's module, and its keys, at the root of a model
PHIS = ("identity", "silu", "tanh")
SCOPES = ("global", "layer")
# dtypes of an export, as a person names them
DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
LOCK_NAME = ".globe.lock"  # in a directory that is written to
STAGING_NAME = ".staging"  # of the files of a writer, before they take their places
PLACED_NAME = ".placed"  # in there: the names that are taking their places
SNAPSHOT_DIRECTORY = ".snapshot"  # of an unfinished fit, in the directory of its checkpoint
# of transformers: the configuration of a model, its weights in one file, the index of several files, an adapter beside
MODEL_CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"
LICENCES = ("*license*", "*licence*", "notice*", "use_policy*")
# The files and folders that a model needs to run, and its licence, in lower case: not its configuration, not weights of
# any format, no files of a training. A folder that holds code belongs to them too.
BESIDE_WEIGHTS = (
    "tokenizer*",
    "vocab*",
    "*vocab.json",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "sentencepiece*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates",
    "*.jinja",
    "generation_config.json",
    "custom_generate",
    "*processor_config.json",
    "assets",
    "*.py",
    *LICENCES,
)
CARD_NAME = "README.md"
CARD_MARK = "Compressed with GloBE"  # in the model card of an export

# transformers refuses a config.json whose `transformers_weights` names no safetensors file, and prints the value: these
# sentences. The quantizer of globe_kernels takes EXPORT_GUARD away before the weights are looked up.
GUARD_KEY = "transformers_weights"
EXPORT_GUARD = (
    "this directory is a model that GloBE compressed, and transformers alone would give it random experts; install "
    "GloBE and run `import globe_kernels` before from_pretrained"
)
CHECKPOINT_GUARD = (
    "a GloBE checkpoint, which has only the gate and up experts of its model; load the model itself and call "
    "globe_kernels.patch(model, this directory), or run `globe export` and load its output"
)
