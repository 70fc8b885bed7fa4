#!/usr/bin/env bash
# Everything that is to be measured on one GPU, in about ten minutes of it. Raw JSON goes into benchmarks/results/<gpu>/ after each part, so
# that a run that is cut off keeps what it has; a part that fails is named at the end, and the others still run.
#
#   benchmarks/gpu.sh           runs all parts; PARTS="bench_64 share" runs these
#   benchmarks/gpu.sh --list    prints the parts and their commands, and runs nothing
#
# PYTHON names the interpreter (default: .venv/bin/python).
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-.venv/bin/python}
WORK=${WORK:-runs/gpu}

if [ "${1:-}" = --list ]; then
    gpu=GPU
elif [ $# -gt 0 ]; then
    echo "usage: $0 [--list]" >&2
    exit 2
else
    gpu=$("$PYTHON" -c '
import torch
from opensora_dist.plan.hardware import gpu_for_device
name = torch.cuda.get_device_name(0)
known = gpu_for_device(name)
print(known.name if known else "gpu")') || { echo "no GPU that torch can use" >&2; exit 1; }
fi
RESULTS=benchmarks/results/$gpu
OPENSORA="$PYTHON -m opensora_dist"
STEP="$OPENSORA bench step --device cuda --nproc 1 --size XL --dtype bfloat16 --rounds 5 --warmup 1 --steps 2"

# name | seconds it may take | what it writes, as left in $WORK/name | where that is kept | command
parts() {
    cat <<PARTS
tests|120|||$PYTHON -m pytest -q -p no:cacheprovider tests/gpu
kernels|120|||$PYTHON benchmarks/kernels.py --out benchmarks/results
bench_16_256|90|step.json|step_16x256x256.json|$STEP --clip 16x32x32 --batch 6 --forms eager compile ours --out $WORK/bench_16_256
bench_16_512|90|step.json|step_16x512x512.json|$STEP --clip 16x64x64 --batch 1 --forms eager compile ours --out $WORK/bench_16_512
bench_64|150|step.json|step_64x512x512.json|$STEP --clip 64x64x64 --batch 1 --forms eager compile ours --recompute full --out $WORK/bench_64
recompute|90|step.json|step_64x512x512_recompute.json|$STEP --clip 64x64x64 --batch 1 --forms ours --compare recompute=selective,full --out $WORK/recompute
no_recompute|90|step.json|step_64x512x512_no_recompute.json|$STEP --clip 64x64x64 --batch 1 --forms ours --out $WORK/no_recompute
dit|120|step.json|step_64x512x512_dit.json|$STEP --clip 64x64x64 --batch 1 --forms ours --recompute full --compare model=stdit,dit --out $WORK/dit
share|150|share.json|share_1080p_minute.json|$OPENSORA bench share --device cuda --form ours --memory-cap-gib 80 --out $WORK/share
PARTS
}

if [ "${1:-}" = --list ]; then
    parts | while IFS='|' read -r part limit _ kept command; do
        echo "$part (at most $limit s${kept:+, kept as $RESULTS/$kept}): $command"
    done
    exit 0
fi

mkdir -p "$RESULTS" "$WORK"
failed=""
while IFS='|' read -r part limit made kept command <&3; do
    case " ${PARTS:-$part} " in *" $part "*) ;; *) continue ;; esac
    echo "== $part: $command"
    # Words of a command are split on purpose: none has a space in it.
    # shellcheck disable=SC2086
    timeout --kill-after 10 "$limit" $command || failed="$failed $part"
    if [ -n "$made" ] && [ -f "$WORK/$part/$made" ]; then
        mv "$WORK/$part/$made" "$RESULTS/$kept" && echo "== kept $RESULTS/$kept"
    fi
done 3< <(parts)
"$PYTHON" benchmarks/roofline.py --page docs/roofline.md || failed="$failed roofline"
if [ -n "$failed" ]; then
    echo "== failed:$failed" >&2
    exit 1
fi
