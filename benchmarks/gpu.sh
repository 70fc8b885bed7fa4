#!/usr/bin/env bash
# Everything that is to be measured on one GPU. All parts take at most 20 minutes; where a command may take 10, there are two of them:
#
#   PARTS="bench_64 share bench_16_512 bench_16_256 recompute no_recompute" benchmarks/gpu.sh
#   PARTS="dit kernels tests" benchmarks/gpu.sh
#
#   benchmarks/gpu.sh           runs all parts, what matters most first
#   benchmarks/gpu.sh --list    prints the parts and their commands, and runs nothing
#
# Raw JSON goes into RESULTS/<gpu>/ after each part, and after each that timed a step docs/roofline.md is written anew, so that a run that is
# cut off keeps what it has. A part that fails is named at the end, and the others still run. Nothing needs to be installed but what the
# project needs. May be set, as seen from the repository: PYTHON, the interpreter (.venv/bin/python); RESULTS (benchmarks/results); WORK, a
# folder for what is not kept (runs/gpu).
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-.venv/bin/python}
RESULTS=${RESULTS:-benchmarks/results}
WORK=${WORK:-runs/gpu}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"

fail() {
    echo "$1" >&2
    exit "$2"
}

case "$PYTHON$RESULTS$WORK" in *[[:space:]\|]*) fail "PYTHON, RESULTS and WORK may have no space and no | in them" 2 ;; esac
OPENSORA="$PYTHON -m opensora_dist"
STEP="$OPENSORA bench step --device cuda --nproc 1 --size XL --dtype bfloat16"
FORMS="--forms eager compile ours"
LONG="$STEP --clip 64x64x64 --batch 1"

# name | seconds it may take | GiB that the GPU must have | what it writes, as left in WORK/name | where that is kept | command
parts() {
    cat <<PARTS
bench_64|150|0|step.json|step_64x512x512.json|$LONG $FORMS --recompute full --rounds 5 --warmup 1 --steps 1 --out $WORK/bench_64
share|150|0|share.json|share_1080p_minute.json|$OPENSORA bench share --device cuda --form ours --memory-cap-gib 80 --steps 1 --out $WORK/share
bench_16_512|75|0|step.json|step_16x512x512.json|$STEP --clip 16x64x64 --batch 1 $FORMS --rounds 5 --warmup 1 --steps 2 --out $WORK/bench_16_512
bench_16_256|75|0|step.json|step_16x256x256.json|$STEP --clip 16x32x32 --batch 6 $FORMS --rounds 5 --warmup 1 --steps 2 --out $WORK/bench_16_256
dit|240|0|step.json|step_64x512x512_dit.json|$LONG --forms ours --recompute full --compare model=stdit,dit --rounds 5 --warmup 0 --steps 1 --out $WORK/dit
recompute|70|0|step.json|step_64x512x512_recompute.json|$LONG --forms ours --compare recompute=selective,full --rounds 5 --warmup 1 --steps 1 --out $WORK/recompute
kernels|110|0|||$PYTHON benchmarks/kernels.py --out $RESULTS
tests|240|0|||$PYTHON -m pytest -q -p no:cacheprovider tests/gpu
no_recompute|60|135|step.json|step_64x512x512_no_recompute.json|$LONG --forms ours --rounds 5 --warmup 1 --steps 1 --out $WORK/no_recompute
PARTS
}

known=$(parts | cut -d '|' -f 1 | tr '\n' ' ')
for part in ${PARTS:-}; do
    case " $known" in *" $part "*) ;; *) fail "PARTS: $part is not known; use some of: $known" 2 ;; esac
done

if [ "${1:-}" = --list ]; then
    parts | while IFS='|' read -r part limit least _ kept command; do
        needs=$([ "$least" -gt 0 ] && echo ", only on a GPU of $least GiB or more")
        echo "$part (at most $limit s$needs${kept:+, kept as $RESULTS/GPU/$kept}): $command"
    done
    exit 0
fi
[ $# -eq 0 ] || fail "usage: $0 [--list]" 2

found=$("$PYTHON" -c '
import torch
from opensora_dist.plan.hardware import gpu_for_device
known = gpu_for_device(torch.cuda.get_device_name(0))
print(known.name if known else "gpu", torch.cuda.get_device_properties(0).total_memory >> 30)') || fail "no GPU that torch can use" 1
read -r gpu gib <<<"$found"

mkdir -p "$RESULTS/$gpu" "$WORK" || exit 1
failed=""
while IFS='|' read -r part limit least made kept command <&3; do
    case " ${PARTS:-$part} " in *" $part "*) ;; *) continue ;; esac
    if [ "$gib" -lt "$least" ]; then
        echo "== $part: left out, since it needs a GPU of $least GiB, and this one has $gib"
        continue
    fi
    echo "== $part: $command"
    [ -z "$made" ] || rm -f "$WORK/$part/$made"
    # Words of a command are split on purpose: none has a space in it.
    # shellcheck disable=SC2086
    timeout --kill-after 10 "$limit" $command || failed="$failed $part"
    if [ -n "$made" ] && [ -f "$WORK/$part/$made" ]; then
        mv "$WORK/$part/$made" "$RESULTS/$gpu/$kept" && echo "== kept $RESULTS/$gpu/$kept"
        if [ "$made" = step.json ]; then
            "$PYTHON" benchmarks/roofline.py --results "$RESULTS" --page docs/roofline.md || failed="$failed roofline"
        fi
    fi
done 3< <(parts)
[ -z "$failed" ] || fail "== failed:$failed" 1
