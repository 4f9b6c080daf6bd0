# Everything runs in .venv, which the first command makes. PYTHON chooses the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
BIN = .venv/bin
# The tests of the most important laws, without processes of their own: what `make quick` runs.
QUICK = tests/test_layout.py tests/test_request.py tests/test_chat.py tests/test_tokenizer.py tests/test_gate.py \
	tests/test_docs.py tests/model/test_transformer.py tests/model/test_attention.py tests/model/test_kv_cache.py \
	tests/engine/test_scheduler.py tests/engine/test_engine.py tests/test_build.py tests/checkpoint/test_resharding.py \
	tests/quantization/test_quantize.py tests/kernels/test_ops.py tests/cli/test_arguments.py
# Two processes, each with files of its own, in the order of tests/conftest.py: on two cores that takes two thirds of the
# time.
WORKERS = -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test quick lint check-install clean

help: ## lists the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: .venv/installed ## runs both example scripts on the bundled demo checkpoint
	$(BIN)/python example_text_completion.py
	$(BIN)/python example_chat_completion.py

test: .venv/installed ## runs every test
	$(BIN)/python -m pytest -q $(WORKERS)

quick: .venv/installed ## runs the tests of the most important laws, in under a minute
	$(BIN)/python -m pytest -q $(WORKERS) $(QUICK)

lint: .venv/installed ## checks style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-install: ## checks the set-up on every Python that is here
	$(PYTHON) tools/check_install.py

clean: ## removes .venv and what was built
	rm -rf .venv build *.egg-info
