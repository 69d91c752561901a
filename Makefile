# Every documented command. Targets hold no logic that the command line lacks: `make -n TARGET` shows it.
VENV  ?= .venv
GPUS  ?= 8
NODES ?= 1
IMAGE ?= 256
ARGS  ?=
DEVICE ?= cuda
PIP_ARGS ?=

PY     := $(VENV)/bin/python
SMALTO := $(VENV)/bin/smalto
READY  := $(VENV)/.smalto
OUT    ?= $(if $(SMALTO_OUTPUTS),$(SMALTO_OUTPUTS),outputs)
DATA   := $(OUT)/data

# Threads that spin while they wait cost milliseconds per operation on a busy CPU; sleeping ones do not.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-processors same-numbers gpu-check check unit smoke bench format mlflow notebooks clean resume sample evaluate \
	train-tokenizer-f16 train-tokenizer-f8 train-b train-l train-xl train-xxl train-3b \
	train-t2i-xl-stage1 train-t2i-xl-stage2 ablate-tokenizer sweep-scaling

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  VENV=DIR           virtual environment"
	@echo "  ARGS=\"key=value\"  passed on to smalto, as many as you like"
	@echo "  of train-*:        GPUS=N (of a machine; 8), NODES=N HEAD=HOST:PORT (machines, and the first one's address:"
	@echo "                     the same command on each), IMAGE=256|384, DRY=1 (print the config and the plan, run nothing)"

# --- set up -----------------------------------------------------------------------------------------

setup: $(READY) ## create .venv and install smalto with its development tools

$(READY): pyproject.toml
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q $(PIP_ARGS) -e ".[dev,notebooks]"
	touch $(READY)

# --- the demo: the whole chain on real images, two cores, no download ---------------------------------

demo: $(READY) ## images to tokenizer to generator to samples; half an hour on two cores
	@echo "[1/6] images to shards"
	@$(SMALTO) prepare source=fashion_mnist out=$(DATA)/fashion_mnist resize=pad image_size=32
	@echo "[2/6] tokenizer: images to 64 codes and back"
	@$(SMALTO) train experiment=demo_tokenizer
	@echo "[3/6] codes of ten crops of every image"
	@$(SMALTO) extract tokenizer_ckpt=$(OUT)/demo/tokenizer/checkpoints/last.ckpt data=fashion_mnist \
	  out=$(DATA)/fashion_mnist_codes crops=ten
	@echo "[4/6] generator: class to codes"
	@$(SMALTO) train experiment=demo_gpt
	@echo "[5/6] samples"
	@$(SMALTO) sample ckpt=$(OUT)/demo/gpt/checkpoints/last.ckpt out=$(OUT)/demo/samples sampling=demo
	@echo "[6/6] metrics"
	@$(SMALTO) evaluate ckpt=$(OUT)/demo/tokenizer/checkpoints/last.ckpt
	@$(SMALTO) evaluate ckpt=$(OUT)/demo/gpt/checkpoints/last.ckpt sampling=demo baselines=true
	@echo
	@echo "sheet of samples:  $(OUT)/demo/samples/sheet.png"
	@echo "every run:         make mlflow"
	@echo "draw your own:     $(SMALTO) sample ckpt=$(OUT)/demo/gpt/checkpoints/last.ckpt labels=[Sneaker,Bag] sampling.cfg_scale=4"
	@echo "next, a larger model on the same codes:  $(SMALTO) train experiment=demo_gpt model=micro hydra.run.dir=$(OUT)/demo/gpt_micro"

# --- checks -------------------------------------------------------------------------------------------

test: check unit smoke ## everything that must pass: check, unit tests, the commands on tiny data

check: $(READY) ## ruff, mypy, import rules
	$(VENV)/bin/ruff check src tests
	$(VENV)/bin/ruff format --check src tests
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# A process per core, one thread each: tests are small, threads would only wait for each other.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses=4 --dist loadfile

unit: $(READY) ## unit tests
	$(PYTEST) -m "not slow and not gpu and not chain"

smoke: $(READY) ## prepare, train, extract, train, sample, evaluate as commands, on tiny data
	$(PYTEST) -m chain

# Which kernels run, and with them the last bits of results, depends on the processor and on the number of threads.
COMPUTING = tests/nn tests/losses tests/models tests/tokenizers tests/sampling tests/metrics tests/evaluation tests/tasks

test-processors: $(READY) ## not in test: what computes, with each kind of kernels this processor has, one and two threads
	@failed=; for setting in $$($(PY) -c "import torch; \
	    kinds = ['default', 'avx2', 'avx512']; best = torch.backends.cpu.get_cpu_capability().lower(); \
	    print(*(f'ATEN_CPU_CAPABILITY={kind}' for kind in kinds[:kinds.index(best) + 1] if best in kinds))") \
	    ONEDNN_MAX_CPU_ISA=AVX2; do for threads in 1 2; do \
	  echo "== $$setting, $$threads threads"; \
	  env $$setting OMP_NUM_THREADS=$$threads $(PY) -m pytest -q -n auto --maxprocesses=4 --dist loadfile \
	    -m "not slow and not gpu and not chain" $(COMPUTING) || failed="$$failed $$setting:$$threads"; \
	done; done; test -z "$$failed" || { echo "failed with$$failed"; exit 1; }

same-numbers: $(READY) ## BASE=REVISION [ONLY=gpt]: does this tree compute what that one does, bit by bit? Two minutes
	@PYTHONPATH=tests $(PY) -m same_numbers base=$(or $(BASE),$(error BASE=REVISION is missing)) only=$(ONLY)

gpu-check: $(READY) ## two minutes on one or two GPUs: does all work there as it should? DEVICE=cpu: the same on the CPU
	@PYTHONPATH=tests $(PY) -m gpu_check device=$(DEVICE) out=$(OUT)/gpu_check/report.json
	@test "$(DEVICE)" = cpu || $(PY) -m pytest -n 0 -m gpu -k "not test_check_on_gpu"

bench: $(READY) ## table of speeds, under ten minutes; ARGS="parts=sampling,data peer=PATH rounds=9 threads=1"
	@PYTHONPATH=tests $(PY) -m benchmarks $(ARGS)

format: $(READY) ## let ruff rewrite the code
	$(VENV)/bin/ruff check --fix src tests
	$(VENV)/bin/ruff format src tests

# --- the paper's models with the authors' settings (conf/experiment, conf/recipe) -----------------------
# One machine: Lightning starts a process per GPU. Several: torchrun does, on each; under srun, SLURM has done it.

ifneq ($(filter-out 1,$(NODES)),)
ifndef SLURM_NTASKS
START = $(VENV)/bin/torchrun --nnodes=$(NODES) --nproc_per_node=$(GPUS) --rdzv_backend=c10d --rdzv_id=smalto \
  --rdzv_endpoint=$(or $(HEAD),$(error NODES=$(NODES) needs HEAD=HOST:PORT of the first machine, the same on each)) \
  -m smalto
endif
endif
START ?= $(SMALTO)
DEVICES = trainer.devices=$(GPUS) trainer.num_nodes=$(NODES)
ifdef DRY
train = $(SMALTO) train $(1) $(DEVICES) $(ARGS) --cfg job --resolve && $(SMALTO) plan $(1) $(DEVICES) $(ARGS)
else
train = $(START) train $(1) $(DEVICES) $(ARGS)
endif

train-tokenizer-f16: $(READY) ## VQ-16 on ImageNet
	$(call train,experiment=tokenizer_f16)

train-tokenizer-f8: $(READY) ## VQ-8 on ImageNet
	$(call train,experiment=tokenizer_f8)

train-b: $(READY) ## GPT-B, 111M, on ImageNet codes
train-l: $(READY) ## GPT-L, 343M
train-xl: $(READY) ## GPT-XL, 775M; the authors used 16 GPUs
train-b train-l train-xl: train-%:
	$(call train,experiment=c2i_$(IMAGE) model=$*)

train-xxl: $(READY) ## GPT-XXL, 1.4B, sharded; 32 GPUs
train-3b: $(READY) ## GPT-3B, 3.1B, sharded; 32 GPUs
train-xxl train-3b: train-%:
	$(call train,experiment=c2i_$(IMAGE) model=$* strategy=fsdp)

train-t2i-xl-stage1: $(READY) ## GPT-XL on texts, 256 px
	$(call train,experiment=t2i_stage1)

train-t2i-xl-stage2: $(READY) ## the same at 512 px; ARGS="init_from=CHECKPOINT" of stage 1
	$(call train,experiment=t2i_stage2)

ablate-tokenizer: $(READY) ## one demo tokenizer per named change, compared in MLflow
	$(SMALTO) train -m experiment=demo_tokenizer name=ablate_tokenizer \
	  ablation=null,no_gan,no_perceptual,no_entropy,no_l2_norm $(ARGS)

sweep-scaling: $(READY) ## laptop-sized generators of growing size on the demo's codes
	$(SMALTO) train -m experiment=demo_gpt sweep=scaling $(ARGS)

# --- using what was trained ---------------------------------------------------------------------------

resume: $(READY) ## RUN=outputs/...: continue a run, or a sweep, by its folder
	$(SMALTO) resume $(RUN)

sample: $(READY) ## CKPT=...: sheet, pictures, npz
	$(SMALTO) sample ckpt=$(CKPT) $(ARGS)

evaluate: $(READY) ## CKPT=...: table of metrics
	$(SMALTO) evaluate ckpt=$(CKPT) $(ARGS)

notebooks: $(READY) ## run the notebooks, on your runs in MLflow if there are enough of them, else on bundled numbers
	$(PY) -m pytest --nbmake --nbmake-timeout=120 notebooks

mlflow: $(READY) ## web page of all runs, on port 5000
	$(VENV)/bin/mlflow ui --backend-store-uri sqlite:///$(abspath $(OUT))/mlflow.db --port 5000 $(ARGS)

clean: ## remove caches; never outputs/
	rm -rf .pytest_cache .ruff_cache .mypy_cache .import_linter_cache build dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
