# Two commands for a newcomer: `make demo` and `make test`. Both set up what they need.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
# Modules rather than console scripts: the first line of a script cannot hold every path.
RUN := "$(VENV)/bin/python" -m
# A file of tests stays with one worker, since its tests share what is costly to make.
TEST := $(RUN) pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder

# Of `make studies`: lines of the log, seeds, further options of `dqrm study`.
ROWS ?= 100000
SEEDS ?= 1
OPTIONS ?=
STUDIES := $(sort $(basename $(notdir $(wildcard src/dqrm/studies/shipped/*.yaml))))

.PHONY: setup demo studies test test-slow test-products lint docs clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv "$(VENV)"
	$(RUN) pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(RUN) pip install --quiet --constraint constraints.txt --no-deps torchrec
	touch "$@"

demo: setup  ## INT4 against FP32 on a generated click log, at most 5 minutes
	$(RUN) dqrm demo --output demo

studies: studies/data  ## the shipped studies on a generated log, one seed; what was stopped or killed goes on
	failed=0; for name in $(STUDIES); do \
		$(RUN) dqrm study "$$name" studies/data -o "studies/$$name" --seeds $(SEEDS) --jobs $(WORKERS) --resume $(OPTIONS) \
			|| { code=$$?; test $$code = 1 || exit $$code; failed=1; }; \
	done; exit $$failed

studies/data: | $(VENV)/.installed
	mkdir -p studies
	$(RUN) dqrm generate --rows $(ROWS) -o studies/log.txt
	$(RUN) dqrm prepare studies/log.txt --layout criteo-kaggle -o studies/data

test: setup  ## all that is quick, 10 to 15 minutes on 2 cores
	$(TEST) -m 'not slow and not product'

test-slow: setup  ## what takes seconds each: processes that are killed, a browser, large tables
	$(TEST) -m slow

test-products: setup  ## what takes minutes: full products of parameters, of which the others have each pair; each step of a preparation killed often
	$(TEST) -m product

lint: setup
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) codespell_lib
	$(RUN) mypy

docs: $(VENV)/.docs  ## the site, in site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict --quiet

$(VENV)/.docs: $(VENV)/.installed
	$(RUN) pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch "$@"

clean:
	rm -rf demo studies build dist site .pytest_cache .ruff_cache .mypy_cache
