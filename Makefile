# `make demo` and `make test` are all you need, with python3 (3.10 or newer, with venv), make and git.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# N: notebooks, or files of unit tests, at a time, with one thread each. FLAGS: cells to run that are normally left out, e.g. FLAGS=slow. NB: notebooks for `make nbs`.
# QUICK=1: without the tests marked slow and the notebooks of tools/slowest.json.
N      ?= 2
FLAGS  ?=
NB     ?=
QUICK  ?=

export PATH := $(abspath $(BIN)):$(PATH)
unexport PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test nbtest unit kernels sync nbs readme house docs-check docs dist clean
help:            ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## */\1\t/p' $(MAKEFILE_LIST) | expand -t 14

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "Python 3.10 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment: on Debian or Ubuntu run 'apt install python3-venv'"; exit 1; }
	@touch $@

$(VENV)/.run: $(VENV)/.made settings.ini setup.py pyproject.toml
	$(BIN)/python -m pip install -q -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

demo: $(VENV)/.run       ## install the package and run its demonstration
	$(BIN)/robustnb demo

test: $(VENV)/.dev       ## test the notebooks, then run the unit tests, and count both
	@rc=0; $(MAKE) --no-print-directory nbtest || rc=1; $(MAKE) --no-print-directory unit || rc=1; exit $$rc

nbtest: $(VENV)/.dev     ## test the notebooks only: they run, and show what is saved in them
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python tools/nbtest.py --n_workers $(N) --flags "$(FLAGS)" $(if $(QUICK),--quick)

unit: $(VENV)/.dev       ## run the unit tests only
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(N) --dist loadfile --durations 20 $(if $(QUICK),-m 'not slow')

kernels: $(VENV)/.dev    ## run every notebook as a user does: all cells, in a fresh Jupyter kernel of its own
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} ROBUSTNB_NOTEBOOKS=all $(BIN)/python -m pytest -n $(N) tests/test_notebooks.py

SUMS = find nbs robustnb \( -name '*.ipynb' -o -name '*.py' \) -not -path '*/.*' | sort | xargs cksum
sync: $(VENV)/.dev       ## clean and export the notebooks; fails if that changed anything
	@before=$$($(SUMS)); $(BIN)/nbdev_clean && $(BIN)/nbdev_export && after=$$($(SUMS)) || exit 1; \
	if [ "$$before" = "$$after" ]; then echo "sync: notebooks are clean, the library follows them"; \
	else echo "sync: changed by 'make sync', commit the result:"; \
	  printf '%s\n%s\n' "$$before" "$$after" | sort | uniq -u | cut -d' ' -f3 | sort -u; exit 1; fi

nbs: $(VENV)/.dev        ## run the notebooks in place and save their outputs (NB=nbs/api/00_core.ipynb for one)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python tools/nbrun.py --n_workers $(N) --flags "$(FLAGS)" $(NB)

readme: $(VENV)/.dev     ## write README.md from nbs/index.ipynb, and nbs/llms.txt from the menu
	@$(BIN)/python -W ignore tools/readme.py
	@$(BIN)/python -W ignore tools/llms.py

house: $(VENV)/.dev      ## check the house limits (CONTRIBUTING.md)
	@$(BIN)/python tools/house.py

docs-check: $(VENV)/.dev ## build the docs without Quarto into _check/ and find what is wrong with them
	@$(BIN)/python -W ignore tools/docs_check.py

docs: $(VENV)/.dev       ## render the site with Quarto into _docs/
	@command -v quarto >/dev/null || { echo "Quarto is not installed: https://quarto.org"; exit 1; }
	@$(BIN)/python -W ignore tools/docs_build.py

dist: $(VENV)/.dev       ## build the source archive and the wheel into dist/
	@$(BIN)/python -m pip install -q build && $(BIN)/python -m build

clean:           ## delete everything that can be made again
	rm -rf $(VENV) _proc _docs _check build dist *.egg-info .pytest_cache
