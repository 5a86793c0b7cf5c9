#!/usr/bin/env bash
# gpu_check.sh OUT: everything that only a GPU can tell, on a machine without network, in under 9 minutes.
#
# Needs an NVIDIA GPU, Python, torch and Triton; uses python/tilefuse/_cuda.abi3.so if it is there and loads, else
# builds it where nvcc is. Nothing is installed and nothing outside OUT is changed, but for
# python/tilefuse/verified.json. What matters most comes first, and every phase has a time limit of its own, so a
# run that is cut off has left its results in OUT already:
#
#   00_summary.txt     one line per phase, renewed after each
#   01_environment.*   devices, versions, what is missing
#   02_native.log      the CUDA library: used as it is, or built
#   verified.json      which kernels passed on this architecture
#   03_verify.*        every op against its float64 oracle, one process each
#   04_tests_*.log     pytest -m gpu
#   results/           benchmark lines (JSONL) and plots
#   05_bench_*.log     the same as tables
#   06_sanitizer_*.log compute-sanitizer on a few tiny cases, with what time is left
#
# GPU_CHECK_SECONDS   time for everything (default 520)
# GPU_CHECK_DRY=1     the same phases on a CPU, in miniature, to test this script
# TILEFUSE_COMMIT     the commit, where the tree has no git
# PYTHON              default python3
set -u
if [ $# -ne 1 ]; then
    echo "usage: $0 OUT" >&2
    exit 2
fi
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}
TOTAL=${GPU_CHECK_SECONDS:-520}
DRY=${GPU_CHECK_DRY:-0}
START=$SECONDS
JOBS=$(( $(nproc) > 8 ? 8 : $(nproc) ))
cd "$ROOT" || exit 2

# the package as an install would lay it out, without installing: triton_kernels and benchmarks live beside python/
STAGE=$(mktemp -d)
trap 'rm -rf "$STAGE"' EXIT
mkdir "$STAGE/tilefuse"
ln -s "$ROOT"/python/tilefuse/* "$STAGE/tilefuse/"
ln -s "$ROOT/triton_kernels" "$ROOT/benchmarks" "$STAGE/tilefuse/"
export PYTHONPATH="$STAGE${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_CACHE_DIR="$STAGE/triton" TORCHINDUCTOR_CACHE_DIR="$STAGE/inductor" PYTHONUNBUFFERED=1
if [ -z "${TILEFUSE_COMMIT:-}" ]; then
    if commit=$(git rev-parse HEAD 2>/dev/null); then
        git diff --quiet HEAD -- ':!benchmarks/results' ':!python/tilefuse/verified.json' || commit="$commit-dirty"
        export TILEFUSE_COMMIT=$commit
    fi
fi
if [ "$DRY" = 1 ]; then
    DEVICE=cpu
    FAMILIES=(rope)
else
    DEVICE=cuda
    FAMILIES=()
    for folder in "$ROOT"/python/tilefuse/ops/*/; do
        name=$(basename "$folder")
        [ "$name" != __pycache__ ] && FAMILIES+=("$name")
    done
fi

left() { echo $(( TOTAL - (SECONDS - START) )); }

# the time a phase may take: its own limit, or what is left
allowed() {
    local rest
    rest=$(left)
    echo $(( $1 < rest ? $1 : (rest > 1 ? rest : 1) ))
}

declare -a LINES=()
FAILED=0
note() {
    LINES+=("$(printf '%4d s  %-28s %s' $((SECONDS - START)) "$1" "$2")")
    {
        echo "tilefuse GPU check of ${TILEFUSE_COMMIT:-an unknown commit} on $DEVICE"
        printf '%s\n' "${LINES[@]}"
    } >"$OUT/00_summary.txt"
    echo "${LINES[-1]}"
}

# phase NAME LIMIT LOG COMMAND...: runs it, notes how it went
phase() {
    local name=$1 limit log=$3 code
    limit=$(allowed "$2")
    shift 3
    if [ "$(left)" -lt 5 ]; then
        note "$name" "not run: no time left"
        return 1
    fi
    timeout --kill-after=5 "$limit" "$@" >"$OUT/$log" 2>&1
    code=$?
    case $code in
        0) note "$name" "ok" ;;
        124 | 137) note "$name" "cut off after $limit s, see $log"; FAILED=1 ;;
        *) note "$name" "failed with $code, see $log"; FAILED=1 ;;
    esac
    return $code
}

# what machine this is
{
    date -u
    nvidia-smi || true
    nvcc --version || true
    "$PYTHON" -m pip list 2>/dev/null | grep -iE '^(torch|triton|numpy|pytest|rich|matplotlib|ml|flash|liger|deep|cuda|nvidia)' || true
} >"$OUT/01_environment.txt" 2>&1
if [ "$DRY" != 1 ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>>"$OUT/01_environment.txt"; then
    note environment "failed: torch sees no GPU (GPU_CHECK_DRY=1 tries the script without one)"
    exit 1
fi

# the CUDA library
loads() {
    "$PYTHON" -c 'import sys; from tilefuse import native; m = native.load(sys.argv[1]).missing; print(m or "loads"); sys.exit(bool(m))' "$1"
}
if loads cuda >"$OUT/02_native.log" 2>&1; then
    note "CUDA library" "ok: the prebuilt one"
elif command -v nvcc >/dev/null && [ "$DRY" != 1 ]; then
    arch=$("$PYTHON" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}.{b}" + ("a" if a >= 9 else ""))')
    phase "build of the CUDA library" 110 02_native_build.log \
        env TORCH_CUDA_ARCH_LIST="$arch" TILEFUSE_BUILD_NATIVE=1 MAX_JOBS="$JOBS" "$PYTHON" setup.py -q build_ext --inplace
    # a library that appeared after staging
    ln -sf "$ROOT"/python/tilefuse/*.so "$STAGE/tilefuse/" 2>/dev/null
    loads cuda >>"$OUT/02_native.log" 2>&1
else
    note "CUDA library" "not there: $(tail -1 "$OUT/02_native.log")"
fi
phase doctor 40 01_environment.json "$PYTHON" -m tilefuse doctor --json

# is every kernel right?
if [ "$DRY" = 1 ]; then
    phase verify 120 03_verify.log "$PYTHON" -m tilefuse verify --quick --device cpu --family rope
else
    phase verify 170 03_verify.log "$PYTHON" -m tilefuse verify --record --jobs "$JOBS" --seconds 70 --timeout 110
fi
cp "$ROOT/python/tilefuse/verified.json" "$OUT/"

# how fast? one family per process: what breaks one does not break the next
share=$(( $(allowed 190) / ${#FAMILIES[@]} ))
for family in "${FAMILIES[@]}"; do
    if [ "$DRY" = 1 ]; then
        options=(--limit 3 --seconds 0.1 --compile-seconds 0)
    else
        options=(--each-backend --limit $((share > 12 ? share - 8 : 4)) --seconds 0.6 --compile-seconds $((share / 3)))
    fi
    phase "benchmark of $family" $((share + 25)) "05_bench_$family.log" \
        "$PYTHON" -m tilefuse bench --device "$DEVICE" --suite quick --family "$family" --out "$OUT/results" "${options[@]}"
done

# the tests that need a GPU, families side by side
if "$PYTHON" -c 'import pytest' 2>/dev/null; then
    limit=$(allowed 120)
    # a file that needs a package which is not installed here must not take its family's other tests with it
    PYTEST_OPTIONS=(-m gpu -q -p no:cacheprovider --continue-on-collection-errors)
    declare -a PIDS=() NAMES=()
    for family in "${FAMILIES[@]}"; do
        [ -d "tests/$family" ] || continue
        timeout --kill-after=5 "$limit" "$PYTHON" -m pytest "tests/$family" "${PYTEST_OPTIONS[@]}" \
            >"$OUT/04_tests_$family.log" 2>&1 &
        PIDS+=($!)
        NAMES+=("$family")
    done
    timeout --kill-after=5 "$limit" "$PYTHON" -m pytest tests/*.py "${PYTEST_OPTIONS[@]}" >"$OUT/04_tests_common.log" 2>&1 &
    PIDS+=($!)
    NAMES+=(common)
    for i in "${!PIDS[@]}"; do
        wait "${PIDS[$i]}"
        code=$?
        case $code in
            0) note "tests of ${NAMES[$i]}" "ok: $(tail -1 "$OUT/04_tests_${NAMES[$i]}.log")" ;;
            5) note "tests of ${NAMES[$i]}" "none need a GPU" ;;
            *)
                note "tests of ${NAMES[$i]}" "failed with $code, see 04_tests_${NAMES[$i]}.log"
                FAILED=1
                ;;
        esac
    done
else
    note tests "not run: pytest is not installed"
fi

# races and stray accesses, slow, with what is left
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1)
if [ -n "$sanitizer" ] && [ "$DRY" != 1 ]; then
    for tool in memcheck racecheck; do
        for op in rope_qk moe_route fp8_quantize; do
            if [ "$(left)" -lt 30 ]; then
                note "$tool of $op" "not run: no time left"
                continue
            fi
            phase "$tool of $op" 60 "06_sanitizer_${tool}_$op.log" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
                "$sanitizer" --tool "$tool" --error-exitcode 3 --target-processes all \
                "$PYTHON" -m tilefuse verify --quick --op "$op" --backend cuda
        done
    done
else
    note compute-sanitizer "not run: $([ "$DRY" = 1 ] && echo a dry run || echo not installed)"
fi

note total "$((SECONDS - START)) s of $TOTAL"
cat "$OUT/00_summary.txt"
exit $FAILED
