# make demo: Shakespeare out of noise in about five minutes on two CPU cores.   make test: the suite.
PYTHON ?= python3
PY = .venv/bin/python

demo: .venv/ready
	test -f data/shakespeare_char/meta.json || $(PY) data/shakespeare_char/prepare.py
	$(PY) train.py config/train_mdlm.py
	$(PY) sample.py --out_dir=out-mdlm --steps=64

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
