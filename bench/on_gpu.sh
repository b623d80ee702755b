#!/usr/bin/env bash
# bench/on_gpu.sh FOLDER: build, test, sanitize and time everything on this machine's GPU.
#
# Needs one NVIDIA GPU, a CUDA build of torch, Triton, nvcc and pytest, and transformers for the
# benchmark of a whole model; no network. Takes less than ten minutes: every phase has its share,
# and a later one runs also where an earlier one failed. Leaves at most eight files in FOLDER, of
# which SUMMARY.md is to be read first. The exit status is the number of phases that failed.
#   PYTHON  the Python that has torch (python3)
#   WHEELS  a folder of wheels to install for this run alone; .whl/ here, if it is there
#   COMMIT  what the record says where there is no git repository
#   SECONDS_IN_ALL  the time for everything (570)
#   PARTS  what of "tests sanitizer benchmarks" to do; environment and build always (all three)
#   BENCHMARKS  which (all: "phases focus decode importance kmeans merge llava sweeps")
set -uo pipefail
[ $# -eq 1 ] || { sed -n '2,15s/^# \{0,1\}//p' "$0" >&2; exit 64; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
budget=${SECONDS_IN_ALL:-570}
begin=$SECONDS
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONUNBUFFERED=1
failed=0
parts=" ${PARTS:-tests sanitizer benchmarks} "
benchmarks=" ${BENCHMARKS:-phases focus decode importance kmeans merge llava sweeps} "
wanted() { [[ $parts == *" $1 "* ]]; }
# what the parts that are not wanted would have had of the reserves
spared=0
wanted tests || spared=$((spared + 130))
wanted sanitizer || spared=$((spared + 60))
if ! wanted benchmarks; then
    spared=$((spared + 130))
    benchmarks=
elif [[ $benchmarks != *" llava "* ]]; then
    spared=$((spared + 55))
fi

# phase NAME LIMIT RESERVE LOG COMMAND...: LIMIT seconds at most, and RESERVE kept for what follows
phase() {
    local name=$1 limit=$2 reserve=$3 log=$folder/$4 started=$SECONDS status=0
    shift 4
    ((reserve = reserve > spared ? reserve - spared : 0))
    local left=$((budget - (SECONDS - begin) - reserve))
    ((left < limit)) && limit=$left
    if ((limit < 5)); then
        status=124
        echo "$name: no time left" >>"$log"
    else
        echo "== $name, $limit s at most" | tee -a "$log"
        # pytest writes its report when it is interrupted
        timeout -k 10 -s INT "$limit" "$@" >>"$log" 2>&1 </dev/null || status=$?
    fi
    printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - started))" | tee -a "$scratch/phases"
    ((status)) && failed=$((failed + 1))
    return 0
}

export PYTHONPATH=$scratch/site${PYTHONPATH:+:$PYTHONPATH}
wheels=${WHEELS:-.whl}
if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$scratch/site" \
        "$wheels"/*.whl || failed=$((failed + 1))
fi
# an installed package knows where the Triton kernels are; a bare checkout is told here
if ! "$python" -c 'import vmtc_kernels.triton_kernels' 2>/dev/null; then
    mkdir -p "$scratch/site"
    cat >"$scratch/site/sitecustomize.py" <<END
import importlib.util, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "vmtc_kernels.triton_kernels":
            return importlib.util.spec_from_file_location(
                name, "$PWD/triton_kernels/__init__.py",
                submodule_search_locations=["$PWD/triton_kernels"])
sys.meta_path.append(Finder)
END
fi

environment() {
    nvidia-smi
    nvcc --version
    "$python" --version
    git rev-parse HEAD && git status --short
    for tool in ncu compute-sanitizer; do
        command -v "$tool" || echo "missing: $tool"
    done
    "$python" -m bench.missing
}
export -f environment
export python
phase environment 40 445 machine.log bash -c environment

# where nvcc is on the path by a link, its headers are elsewhere
if [ -z "${CUDA_HOME:-}" ] && [ -e /usr/local/cuda/include/cuda_runtime_api.h ]; then
    export CUDA_HOME=/usr/local/cuda
fi
# only for the GPU that is here, unless told otherwise: a quarter of the time
if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
    [ "$capability" = 9.0 ] && capability=9.0a
    export TORCH_CUDA_ARCH_LIST=$capability
fi
VMTC_BUILD=cuda MAX_JOBS=$(nproc) phase build 150 355 machine.log \
    "$python" setup.py build_ext --inplace --force

# where a backend cannot run its tests are skipped, which is no success
phase backends 20 345 machine.log "$python" -c '
import sys, vmtc_kernels
missing = {k: v for k, v in vmtc_kernels.available_backends().items() if v}
sys.exit(f"cannot run: {missing}" if missing else 0)'

# a process that is lost, to a test that hangs or to an illegal access, is replaced by the next
jobs=() alone=() limits=()
"$python" -c 'import xdist' 2>/dev/null && jobs=(-n 8) && alone=(-n 1)
"$python" -c 'import pytest_timeout' 2>/dev/null && limits=(--timeout=40 --timeout-method=thread)
pytest() {
    local name=$1 limit=$2 reserve=$3
    shift 3
    # the tests ask torch for deterministic algorithms, and cuBLAS has them on this condition
    CUBLAS_WORKSPACE_CONFIG=:4096:8 phase "$name" "$limit" "$reserve" tests.log \
        "$python" -m pytest -v -p no:cacheprovider "${limits[@]}" \
        --junitxml="$scratch/$name.xml" "$@"
}
if wanted tests; then
    pytest gpu-tests 90 285 "${alone[@]}" -k 'test_gpu or triton or cuda' tests/test_gpu.py tests/test_limits.py
    # opcheck, compilation and export ask little of a kernel and take much of the time: they come last
    operators=(tests/test_{token_importance,kmeans,merge_tokens,triton}.py)
    operators+=(tests/test_{focus_scores,focus_mask,masked_attention,focus_attention}.py)
    operators+=(tests/test_paged_focus_attention.py)
    slow='opcheck or compiles or exports'
    pytest operator-tests 120 225 "${jobs[@]}" -k "(triton or cuda) and not ($slow)" "${operators[@]}"
    pytest compile-tests 75 195 "${jobs[@]}" -k "(triton or cuda) and ($slow)" "${operators[@]}"
fi

if wanted sanitizer; then
    # compiles what they need that no test has, which under the sanitizer would take its time
    phase sanitizer-cases 40 215 sanitizer.log "$python" bench/sanitize_cases.py
    # each allocation by itself, so that what lies behind it is nobody's
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    sanitize() {
        # what a library asks the driver for and does not get is no fault of a kernel
        local errors=()
        [ "$1" = memcheck ] && errors=(--report-api-errors no)
        phase "$1" "$2" "$3" sanitizer.log compute-sanitizer --tool "$1" --error-exitcode 86 \
            --print-limit 20 "${errors[@]}" "$python" bench/sanitize_cases.py
    }
    sanitize memcheck 40 175
    sanitize racecheck 40 135
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
fi

# each in a process of its own, the short ones first: what is out of time is the last of the set-ups
number=0
benchmark() {
    [[ $benchmarks == *" $1 "* ]] || return 0
    number=$((number + 1))
    phase "benchmark $1" "$2" "$3" bench.log "$python" -m bench run "${@:4}" --device cuda --quick \
        --out "$scratch/bench-$number-$1.json"
}
if [[ $benchmarks == *" phases "* ]]; then
    phase phases 60 160 bench.log "$python" -m bench.phases --out "$folder/phases.json"
fi
benchmark focus 50 150 focus
benchmark decode 50 125 decode
benchmark importance 30 110 importance
benchmark kmeans 40 95 kmeans
benchmark merge 120 75 merge
# its first set-up is what the aims are about; all take about four minutes
benchmark llava 240 20 llava
benchmark sweeps 120 8 --no-usual --sweeps

# no file may be too large to be carried away; its end says most
for log in "$folder"/*.log; do
    tail -c 8000000 "$log" >"$scratch/end" && cp "$scratch/end" "$log"
done
"$python" -m bench.summary "$folder" "$scratch" || failed=$((failed + 1))
cat "$folder/SUMMARY.md"
exit "$failed"
