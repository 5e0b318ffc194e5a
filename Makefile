# Every target makes its own virtual environment when it is absent; nothing is installed by hand.
# More than one torch process on few cores: two OpenMP threads each run far slower than one.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
AUDIT ?= .venv-audit
BIN := $(VENV)/bin
PIP_ARGS := --quiet --disable-pip-version-check
STAMP_INPUTS := pyproject.toml constraints.txt
PEER ?= benchmarks/peers/.venv-llmcompressor

.PHONY: demo test coverage test-slow test-oldest quality style bench peers audit clean

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found %d.%d; set PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV)

# torch first: its pin decides which build the rest resolves against.
$(VENV)/.core: $(STAMP_INPUTS) | $(VENV)/bin/python
	@start=$$(date +%s); echo "installing hf_mlopt into $(VENV) ..."; \
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt torch && \
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e . && \
	echo "installation took $$(( $$(date +%s) - start )) s" && touch $@

$(VENV)/.dev: $(STAMP_INPUTS) $(VENV)/.core | $(VENV)/bin/python
	@start=$$(date +%s); echo "installing the test and quality extras ..."; \
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev]' && \
	echo "installation of the extras took $$(( $$(date +%s) - start )) s" && touch $@

demo: $(VENV)/.core
	$(BIN)/hf-mlopt demo --output demo_output

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests

# As `test`, half as long again; fails under nine lines in ten.
coverage: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term-missing tests

test-slow: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests

test-oldest: $(STAMP_INPUTS)
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@grep -v -i -E '^(transformers|huggingface_hub)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install $(PIP_ARGS) -c $(OLDEST)/constraints.txt torch
	$(OLDEST)/bin/python -m pip install $(PIP_ARGS) -c $(OLDEST)/constraints.txt -e '.[test]' 'transformers==5.17.*'
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist loadfile tests

quality: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/short_forms.py

# What the benchmarks compare with has versions of its own.
peers: $(PEER)/.ready

$(PEER)/.ready: benchmarks/peers/llmcompressor.txt
	@test -x $(PEER)/bin/python || $(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install $(PIP_ARGS) -r $< && touch $@

# Known vulnerabilities of all that is installed. Needs a network; in an environment of its own, for its packages are not
# ours.
audit: $(VENV)/.dev
	@test -x $(AUDIT)/bin/python || $(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install $(PIP_ARGS) pip-audit
	$(AUDIT)/bin/pip-audit --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

clean:
	rm -rf $(VENV) $(OLDEST) $(AUDIT) $(PEER) demo_output dist build
