# Everything runs in .venv, which `make` sets up once, and again when the dependencies change.
# Needed beforehand: make and Python 3.11 or newer.

PYTHON ?= python3
JOBS ?= 2
PORT ?= 8000
PY := .venv/bin/python
BENCH := .venv-bench/bin/python
BENCH_FLAGS ?=
READY := .venv/ready
SITE := book/_build/html
PYTEST := $(PY) -m pytest -n $(JOBS) --dist loadfile
BUILD := $(PY) -c 'from jupyter_book.cli.main import main; main()' build . --path-output book --all -W -n --keep-going -q

.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help setup data book site test lint types tests check-notebooks site-tests notebooks bench demo serve clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "no virtual environment could be made; on Debian and Ubuntu install python3-venv"; exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[book,test]"
	@touch $(READY)

setup: $(READY) ## make .venv and install everything into it

data: $(READY) ## fetch, once, the plays (5 MB) and a small pre-trained model (93 MB)
	@$(PY) -c 'from lmtutorial.corpora import load_corpus; load_corpus("shakespeare")'
	@$(PY) -c 'from lmtutorial.pretrained import fetch_pretrained; fetch_pretrained("smollm2-135m")'

book: data site ## set up, fetch the texts and a model, build the site

site: $(READY)
	$(BUILD)
	@echo "The book: open $(SITE)/index.html, or run: make serve"

test: lint types data tests check-notebooks site site-tests ## everything that CI checks

lint: $(READY) ## style of the code, form of the notebooks
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) tools/notebooks.py --check
	$(PY) tools/results_page.py --check

types: $(READY) ## types of the package
	$(PY) -m mypy

tests: $(READY) ## tests and doctests of the package, the tools and the book
	$(PYTEST) --ignore=tests/site

check-notebooks: $(READY) ## run every chapter and compare its outputs with the stored ones
	$(PYTEST) --nbval book

site-tests: $(READY) ## the built site in a browser
	$(PYTEST) --dist worksteal tests/site

notebooks: data ## run every chapter and store what changed
	$(PY) tools/notebooks.py

bench: data ## measure decoding beside its peers, about 40 minutes alone on the machine: every figure of part V
	@test -x $(BENCH) || $(PYTHON) -m venv .venv-bench
	$(BENCH) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BENCH) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench,gguf]"
	for question in decode quantize "speculative --smollm2" engine search; do \
	  $(BENCH) benchmarks/$${question%% *}.py $$(echo "$$question" | cut -s -d ' ' -f 2) $(BENCH_FLAGS) || exit 1; done

demo: data ## train an LSTM on Shakespeare for about a minute; it writes three passages
	$(PY) -m lmtutorial.cli train --overwrite
	$(PY) -m lmtutorial.cli generate

serve: $(READY) ## serve the built site on this machine
	@test -f $(SITE)/index.html || $(MAKE) book
	@echo "http://127.0.0.1:$(PORT)/"
	@$(PY) -m http.server $(PORT) --bind 127.0.0.1 --directory $(SITE)

clean: ## remove the built site; .venv and the texts stay
	rm -rf book/_build
