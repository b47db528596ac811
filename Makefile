# make demo: Shakespeare out of noise, at once and then by a model of your own, in some six minutes on a CPU.
# make test: the suite.
PYTHON ?= python3
PY = .venv/bin/python

demo: .venv/ready
	$(PY) -m tools.demo

test: .venv/ready-test
	$(PY) -m pytest -q -n auto tests

.venv/ready: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-test: .venv/ready requirements-test.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

.PHONY: demo test
