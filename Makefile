# make demo: the whole method in a world of drawn scenes, two minutes on two cores.
# make test: lints and tests.   make gpu: what a GPU makes of it.
# All set up .venv first; nothing else is needed but Python 3.10 or newer.
PYTHON ?= python3

.PHONY: demo test slow gpu clean

# Idle threads of one process leave the cores to another.
export OMP_WAIT_POLICY = PASSIVE

demo: .venv/installed
	PATH="$(CURDIR)/.venv/bin:$$PATH" toy/demo.sh

test: .venv/tested
	.venv/bin/ruff check .
	.venv/bin/python -m pytest -n auto

gpu: .venv/tested
	.venv/bin/python -m tools.gpu

slow: .venv/tested
	.venv/bin/python -m pytest -m slow

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -r requirements.txt
	touch $@

.venv/tested: .venv/installed tests/requirements.txt
	.venv/bin/pip install -r tests/requirements.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
