#!/bin/sh
# From a model folder and a task file to a GGUF that skips layers, then what it holds and what skipping costs:
#
#   sh examples/train_your_own.sh MODEL_DIR my-task.jsonl OUT_DIR [options of first-train]
#
# after pip install '.[convert,train,eval]' in a clone of pyfirst. my-task.jsonl holds one {"prompt": ..., "response": ...} a line, and a "task" where there are several kinds.
set -eu
model=$1 data=$2 out=$3
shift 3
mkdir -p "$out"
first-train -m "$model" --data "$data" --out "$out/recipe" "$@"
first-convert "$model" --first "$out/recipe" --outfile "$out/model.gguf" --outtype q8_0
first-inspect "$out/model.gguf"
first-eval -m "$out/model.gguf" --data "$data" --compare dense routed --limit 4 -n 16
