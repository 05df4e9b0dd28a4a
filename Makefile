# Everything runs in .venv, made from setup.py on first use. `make demo` and `make test` are the two commands.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
SPACE ?= digits
CONSTRAINT ?= 0.03

.PHONY: demo test lint format models clean-models benchmarks gpu-benchmarks clean
.DELETE_ON_ERROR:

# On layers this small, threads wait for each other longer than they compute: on a busy machine ten times as long.
demo test models: export OMP_NUM_THREADS ?= 1

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[test,export,export-check]'
	touch $@

# Search -> finetune -> test -> export, with the shipped checkpoints.
demo: $(VENV)/installed
	$(PY) search.py --mode evolution --type latency --constraint $(CONSTRAINT) --exp_name demo --overwrite
	$(PY) quant_aware.py --exp_name demo
	$(PY) test.py --exp_dir exps/demo
	$(PY) export.py --exp_dir exps/demo --format onnx onnx-integer packed --check all

# One process for each core. The tests of a file share what they train, so a file stays in one process.
test: lint
	$(PY) -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Makes what models/SPACE lacks: supernet, pairs, predictors. A killed run continues. To start from nothing, make clean-models
# first.
NAME = $(if $(findstring /,$(SPACE)),,$(filter-out . ..,$(SPACE)))
MODELS = models/$(or $(NAME),$(error SPACE must name a space, not "$(SPACE)"))
ifeq (,$(filter qfa-%,$(SPACE)))
FIRST = $(PY) train.py --space $(SPACE)
FLOAT_ACC = test -e $(MODELS)/acc.pt || $(PY) search.py --prepare acc --acc_predictor_dir $(MODELS)
else  # mixed precision starts from a float supernet and needs no float predictor
FLOAT_MODELS = $(MODELS)-float
FIRST = { test -e $(FLOAT_MODELS)/supernet.pt || $(PY) train.py --space $(SPACE) --quantizer float; } && \
	$(PY) train.py --space $(SPACE) --start_from $(FLOAT_MODELS)
FLOAT_ACC = :
endif
models: $(VENV)/installed
	test -e $(MODELS)/supernet.pt || { $(FIRST); }
	$(FLOAT_ACC)
	test -e $(MODELS)/acc_quant.pt || $(PY) search.py --prepare acc_quant --acc_predictor_dir $(MODELS)

clean-models:
	rm -rf $(MODELS) $(FLOAT_MODELS) dataset/NetInfo/$(NAME)

benchmarks: $(VENV)/installed
	$(PY) benchmarks/startup.py
	$(PY) benchmarks/lut.py --wide
	$(PY) benchmarks/search.py
	$(PY) benchmarks/nsga2.py
	$(PY) benchmarks/loader.py --batch_size 8
	$(PY) benchmarks/reduced_decoding.py
	$(PY) benchmarks/train_step.py
	$(PY) benchmarks/train_step.py --space oqa-mbv2-glyphs --batch_size 64
	$(PY) benchmarks/train_step.py --space qfa-mbv3-glyphs --batch_size 64
	$(PY) benchmarks/ddpg.py

# What docs/measurements.md lacks of training steps on a GPU: tests of the kernels, then tables with and without them. The
# thousand random steps of oqa-mbv3 have a process of their own, in which all their shapes are new.
RANDOM_STEPS ?= 1000
STEP = $(PY) benchmarks/train_step.py --device cuda
gpu-benchmarks: $(VENV)/installed
	$(PY) -m pytest -m gpu
	$(STEP) --amp --batch_size 256 --steps 20
	$(STEP) --amp --batch_size 128 --steps 20
	$(STEP) --batch_size 128 --steps 20
	$(STEP) --amp --batch_size 128 --steps 20 --space oqa-mbv2
	$(STEP) --amp --batch_size 128 --steps 20 --space oqa-mbv3
	$(STEP) --amp --batch_size 128 --steps 20 --space qfa-mbv3
	$(STEP) --amp --batch_size 128 --steps $(RANDOM_STEPS) --space oqa-mbv3 --way kernels
	$(STEP) --amp --batch_size 128 --steps $(RANDOM_STEPS) --space oqa-mbv3 --way plans
	$(PY) benchmarks/convolution_plans.py --device cuda --amp

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
