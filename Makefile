# The two commands that matter:
#   make quickstart   set up, train a small model, see its loss against the floor
#   make test         set up, run every notebook and every test
# and for the book: make book (HTML and PDF), make html, make pdf.

PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PY := $(BIN)/python
STAMP := $(VENV)/installed

.PHONY: help setup quickstart test fast book html pdf check export clean \
	distclean constraints wheel

help:
	@sed -n '1,5s/^# \{0,1\}//p' Makefile
	@echo "also: setup fast export check wheel clean distclean constraints"

# The set-up runs again only when what it installs has changed.
$(STAMP): settings.ini constraints.txt setup.py tools/set_up.py
	$(PYTHON) tools/set_up.py $(VENV)
	@touch $(STAMP)

setup: $(STAMP)

quickstart: $(STAMP)
	$(PY) -m minillm quickstart

test: $(STAMP)
	$(PY) tools/run_tests.py

# Everything but the notebooks: seconds instead of minutes.
fast: $(STAMP)
	$(PY) tools/run_tests.py --no-notebooks

export: $(STAMP)
	$(BIN)/nbdev_export
	$(PY) tools/clean_notebooks.py

html: $(STAMP)
	$(PY) tools/build_book.py html

pdf: $(STAMP)
	$(PY) tools/build_book.py pdf

book: $(STAMP)
	$(PY) tools/build_book.py all

check: $(STAMP)
	$(PY) tools/check_book.py

wheel: $(STAMP)
	$(BIN)/pip wheel --no-deps -w dist .

constraints: $(STAMP)
	$(PY) tools/make_constraints.py

clean:
	rm -rf _build dist build minillm.egg-info .pytest_cache .ruff_cache \
		.hypothesis
	find nbs minillm tests tools -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
