# make test: sets up .venv, then lints and tests. Nothing else is needed first but Python 3.10 or newer.
PYTHON ?= python3

.PHONY: test slow clean

# Idle threads of one process leave the cores to another.
export OMP_WAIT_POLICY = PASSIVE

test: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/python -m pytest

slow: .venv/installed
	.venv/bin/python -m pytest -m slow

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -r requirements.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
