# Every target makes its own virtual environment first; nothing else is needed but Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
DEMO ?= clip-batch-demo

.PHONY: demo test test-fast check docs bench browser clean
.DELETE_ON_ERROR:

$(STAMP): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[slurm,spark,hdfs,dev]'
	touch $@

demo: $(STAMP)          ## the whole line on embedded pictures, then the web page
	$(BIN)/clip-batch demo $(DEMO)

test: $(STAMP) check browser    ## everything
	$(BIN)/python -m pytest

browser:                ## Chromium for the page's test, where apt can install it; without it that test is skipped
	@command -v chromium chromium-browser >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
	  echo "no Chromium: the page's test will be skipped"

test-fast: $(STAMP)     ## without torch and long runs
	$(BIN)/python -m pytest -m "not slow"

check: $(STAMP)         ## style, types, generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m clip_batch.documents --check

docs: $(STAMP)          ## regenerate configs/reference.yaml and docs/config.md
	$(BIN)/python -m clip_batch.documents

bench: $(STAMP)         ## every benchmark; each prints JSON
	for script in tests/bench/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) $(DEMO)
