# make demo: set up and see a model learn.  make test: the same environment with the tests' needs, all tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := smollm2-135m-instruct
STRESS := tests/unit/test_store_verify.py $(addprefix tests/e2e/test_,store_kill.py store_ranks.py store_sharded.py \
	store_hangs.py docs_checkpoints.py)

.PHONY: demo test stress lint clean

demo: $(VENV)/.installed
	@echo "== downloading the demo model"
	$(BIN)/python -m zoo download $(DEMO)
	@echo
	@echo "== answering a question"
	$(BIN)/python -m zoo chat $(DEMO) --prompt "What is the capital of France?" --temperature 0
	@echo
	@echo "== learning a task, about five minutes on two cores"
	$(BIN)/python -m zoo quickstart
	@echo
	@echo "Next:"
	@echo "  source $(BIN)/activate      then 'zoo' is on your PATH"
	@echo "  zoo chat $(DEMO)      talk with it"
	@echo "  zoo download | grep pythia            what else there is"
	@echo "  zoo --help                            all commands"

# The demo model is part of the tests; without a network those few are skipped.
test: $(VENV)/.installed-dev
	-$(BIN)/python -m zoo download $(DEMO)
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

# The long forms of the tests that kill, corrupt, interrupt and reshard: an hour of a small machine rather than a minute.
stress: $(VENV)/.installed-dev
	ZOO_STRESS=1 $(BIN)/python -m pytest $(STRESS) $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@ $(VENV)/.installed
