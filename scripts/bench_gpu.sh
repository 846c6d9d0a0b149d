#!/bin/sh
# What a quantized training step costs on this machine's GPU, beside full precision: about ten minutes for
#   scripts/bench_gpu.sh --results results/bench.csv
# Options go to each call of bench_step.py: --rounds 3 --steps 2 is a short try, with --device cpu one without a GPU.
set -eu
cd "$(dirname "$0")/.."

step() {
    "${PYTHON:-.venv/bin/python}" scripts/bench_step.py "$@"
}

# ResNet-20 with its teacher, live and from its kept answers, and the quantizers.
step "$@"
step --no-eager --variants cifar10/shootout "select=[lsq-w4a4,lsq_plus-w4a4,pact-w4a4,apot-w4a4,lq_nets-w4a4]" "$@"
# Networks for ImageNet, the student against full precision.
alone="teacher=none objective=hard model=timm"
for case in "resnet18 64 256" "mobilenetv2_100 64 256" "deit_tiny_patch16_224 224 64"; do
    # shellcheck disable=SC2086 # words of their own
    set -- $case "$@"
    name=$1 size=$2 batch=$3
    shift 3
    # shellcheck disable=SC2086
    step --no-eager --size "$size" --batch "$batch" $alone model.name="$name" "$@"
done
