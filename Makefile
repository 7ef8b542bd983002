# Everything a person or CI runs. `make` with no target lists the targets.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test interpreted pages docs site slow format lint types imports check wheel clean

# what renders the formulas of the site, from npm
MATHJAX := mathjax@3.2.2
SCRIPT  := docs/_build/static/mathjax/tex-svg.js

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

setup: $(READY) ## make .venv with everything in it, pinned by constraints.txt

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "xent needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version). Name another: make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: it lacks ensurepip. Install it: sudo apt-get install python3-venv"; exit 1; }
	@echo "Installing xent and what developing it needs into $(VENV): a few minutes; 3.1 GB of disk, with CUDA in torch 6.3 GB."
	@echo "1/3  $(VENV), an empty environment of $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "2/3  pip, which knows dependency groups from 25.1 on"
	@$(PIP) --upgrade pip
	@echo "3/3  the package, its extras and the group dev of pyproject.toml, in the versions of constraints.txt"
	@$(PIP) -e '.[all]' --group dev
	@touch $(READY)

demo: setup ## fit handwritten digits, predict those held out, audit that; all of it lands in demo/
	$(BIN)/xent fit --demo --out demo
	$(BIN)/xent predict demo/model.safetensors demo/held-out.parquet -o demo/predictions.parquet --keep digit
	$(BIN)/xent audit demo/predictions.parquet --kind probs --label digit --html demo/audit.html

# as many processes as cores, each on one thread: small products on threads that share a core wait for each other
test: setup ## run all tests but the slow ones and the pages
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not pages and not site"

# the variable is read where a kernel is made, so this is a process of its own
interpreted: setup ## run the laws on the kernels of Triton in its interpreter, in float32 and half types
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests/laws -k "triton and not float64 and not nonsense" -m "not slow"

pages: setup ## run what the pages of the docs print
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m pages tests/test_how_to.py tests/auditing/test_page.py

docs: setup $(SCRIPT) ## build the site into docs/_build/html; its examples, tutorial and links are checked
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build/html
	@echo "the site: docs/_build/html/index.html"

$(SCRIPT):
	@command -v npm >/dev/null || { echo "the site's formulas need MathJax from npm. Install it: sudo apt-get install npm"; exit 1; }
	@mkdir -p $(@D)
	npm pack --silent --pack-destination docs/_build $(MATHJAX)
	tar -xzOf docs/_build/$(subst @,-,$(MATHJAX)).tgz package/es5/tex-svg.js > $@.part && mv $@.part $@

site: docs ## open the site in headless Chromium: no error, no dead link, nothing loaded from elsewhere
	$(BIN)/python -m pytest -m site tests/test_site.py

slow: setup ## the long soak tests
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

format: setup ## ruff: put imports in order, format
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

lint: setup ## ruff: style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## mypy, strict on the core
	$(BIN)/mypy

imports: setup ## the direction of imports: towards core, never up
	$(BIN)/lint-imports

wheel: setup ## build the wheel, install it into an empty environment, import it there
	sh .ci/wheel $(BIN)/python

check: lint types imports wheel test interpreted pages docs site ## what CI runs

clean: ## remove what these targets made
	rm -rf docs/_build docs/reference/api $(VENV) .venv-wheel dist build demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
