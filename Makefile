# Everything runs in .venv, which the first command makes. PYTHON chooses the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint check-install clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: .venv/installed
	$(BIN)/python example_text_completion.py
	$(BIN)/python example_chat_completion.py

test: .venv/installed
	$(BIN)/python -m pytest -q

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check-install:
	$(PYTHON) tools/check_install.py

clean:
	rm -rf .venv build *.egg-info
