# Every target makes its own virtual environment first; nothing else is needed but Python 3.11 or newer. PYTHON=python3.13 makes
# and uses one beside it, .venv-python3.13.
PYTHON ?= python3
PEERS_PYTHON ?= python3
VENV ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
DEMO_STAMP = $(VENV)/.demo
DEMO ?= clip-batch-demo
SIDE_BY_SIDE = --numprocesses 2 --dist loadfile
# Installed without what they pin: autofaiss and embedding_reader numpy<2 and pandas<3, cn_clip an lmdb that nothing here needs.
UNPINNED = --no-deps --constraint constraints.txt autofaiss embedding_reader fire termcolor cn_clip

.PHONY: demo test test-fast lowest check docs bench services spark35 clip-retrieval img2dataset clean
.DELETE_ON_ERROR:

$(DEMO_STAMP): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[serve]'
	touch $@

$(STAMP): $(DEMO_STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,heif,dev]'
	$(BIN)/python -m pip install --quiet $(UNPINNED)
	touch $@

demo: $(DEMO_STAMP)     ## the whole line on embedded pictures, then the web page
	$(BIN)/clip-batch demo $(DEMO)

test: $(STAMP) check services spark35 clip-retrieval img2dataset ## everything; the fast tests measure branch coverage
	$(BIN)/python -m pytest -m "not slow" $(SIDE_BY_SIDE) --cov
	$(BIN)/python -m pytest -m slow

services:               ## Chromium, SLURM, Java, HDFS's libraries, databases: where apt cannot install what is missing, its tests are skipped
	@PATH="$$PATH:/usr/sbin"; for need in chromium:chromium slurmctld:slurm-wlm java:default-jre-headless mariadbd:mariadb-server-core my_print_defaults:mariadb-client-core pg_ctlcluster:postgresql \
	  jersey1-server.jar:libjersey1-core-java,libjersey1-server-java,libjersey1-servlet-java,libjersey1-json-java,libjsr311-api-java \
	  jetty9-server.jar:libjetty9-java servlet-api.jar:libservlet-api-java commons-daemon.jar:libcommons-daemon-java commons-codec.jar:libcommons-codec-java \
	  jackson-databind.jar:libjackson2-databind-java,libjackson2-annotations-java,libjackson2-core-java; do \
	  name=$${need%:*} packages=$$(echo $${need#*:} | tr , ' '); \
	  { command -v $$name || command -v $$name-browser || ls /usr/share/java/$$name; } >/dev/null 2>&1 || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$packages >/dev/null; } || \
	  echo "no $$name: its tests will be skipped"; \
	done

spark35: .spark35/pyspark ## Spark 3.5 beside Spark 4, for its test
.spark35/pyspark: $(STAMP)
	$(BIN)/python -m pip install --quiet --target .spark35 'pyspark>=3.5,<4'

clip-retrieval: .clip-retrieval/.installed ## clip-retrieval in an environment of its own, for the tests of moving over
.clip-retrieval/.installed: tests/clip-retrieval.txt
	$(PEERS_PYTHON) -m venv .clip-retrieval
	.clip-retrieval/bin/python -m pip install --quiet --no-compile --no-deps -r tests/clip-retrieval.txt
	touch $@

img2dataset: .img2dataset/.installed ## img2dataset likewise, for the tests of end2end
.img2dataset/.installed: tests/img2dataset.txt
	$(PEERS_PYTHON) -m venv .img2dataset
	.img2dataset/bin/python -m pip install --quiet --no-compile --no-deps -r tests/img2dataset.txt
	touch $@

test-fast: $(STAMP)     ## without torch and long runs
	$(BIN)/python -m pytest -m "not slow" $(SIDE_BY_SIDE)

lowest: .lowest/.installed ## on the oldest versions that setup.cfg allows, whose own warnings are none of ours; TESTS="tests/encoders/test_encoders.py" for others
	PATH="$(CURDIR)/.lowest/bin:$$PATH" .lowest/bin/python -m pytest -W default $(or $(TESTS),-m "not slow")

.lowest/.installed: setup.cfg
	$(PYTHON) -m venv --clear .lowest
	.lowest/bin/python -m pip install --quiet uv
	VIRTUAL_ENV=.lowest .lowest/bin/uv pip install --quiet --resolution lowest-direct --editable '.[all,dev]'
	VIRTUAL_ENV=.lowest .lowest/bin/uv pip install --quiet $(UNPINNED)
	touch $@

check: $(STAMP)         ## style, types, generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m docs.generate --check

docs: $(STAMP)          ## regenerate configs/reference.yaml, docs/config.md, the table in docs/architecture.md and docs/benchmarks.md
	$(BIN)/python -m docs.generate

BENCHES ?= tar text data_path dataset engines embed worker slow_worker scaling plan merge memory metadata metadata_provider remote serve status sweep two_tower compare laion
bench: $(STAMP)         ## the benchmarks, some hours of them; each prints JSON; BENCHES="tar text" for some
	for name in $(BENCHES); do $(BIN)/python -m tests.bench.$$name || exit 1; done

clean:
	rm -rf .venv* .lowest .spark35 .clip-retrieval .img2dataset $(DEMO)
