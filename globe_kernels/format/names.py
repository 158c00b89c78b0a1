"""The names of the format: its files, and the values that a configuration may have. Imports nothing heavy."""

# The two families of matrices that GloBE compresses; each has its own bank, adapters and codes.
FAMILIES = ("gate", "up")

CONFIG_NAME = "globe_config.json"
REPORT_NAME = "fit_report.json"
METRICS_NAME = "metrics.jsonl"
QUANT_METHOD = "globe"
BANK_NAME = "globe_bank"  # the bank's module, and its keys, at the root of a model
PHIS = ("identity", "silu", "tanh")
SCOPES = ("global", "layer")
# dtypes of an export, as a person names them
DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
