#!/usr/bin/env bash
# Rewake against llama.cpp: the same random weights, the same machine, run in turns. Prints ratios of medians.
#
#   tests/bench/compare-llama.sh [SIZES] [TYPES]      default: 0.1B "f16 q8_0 q4_0 q4_k"
#
# SIZES: 0.1B, 0.4B, 1.5B. PAIRS (default 5) runs of each; THREADS (default: one for each processor). HTTP=1: compares
# the servers too (over_http.py). AVX2=1: both use AVX2 and nothing newer, whatever this machine has (not the servers).
# Needs a Rust toolchain, a C++ compiler, Python 3.9 or later with venv, and PyPI: llama.cpp is built from the source
# inside llama-cpp-python's source distribution, tuned for this machine. Nothing else should run meanwhile: a disturbed
# peer would flatter us. Everything is kept in target/compare-llama, so that a second run builds nothing again.
set -euo pipefail
cd "$(dirname "$0")/../.."
sizes=${1:-0.1B}
types=${2:-f16 q8_0 q4_0 q4_k}
pairs=${PAIRS:-5}
threads=${THREADS:-$(nproc)}
work=$PWD/target/compare-llama
mkdir -p "$work"

python=$work/venv/bin/python
if [ ! -x "$python" ]; then
    python3 -m venv "$work/venv"
    "$python" -m pip install --quiet cmake ninja scikit-build-core
fi
build=$work/build
tuned=(-DGGML_NATIVE=ON)
narrow=
if [ "${AVX2:-0}" = 1 ]; then
    build=$work/build-avx2
    narrow=--avx2
    tuned=(-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON)
fi
targets=(llama-bench llama-batched-bench)
[ "${HTTP:-0}" = 1 ] && targets+=(llama-server)
llama=$build/bin
if [ ! -x "$llama/${targets[-1]}" ]; then
    source=$(compgen -G "$work/llama_cpp_python-*/vendor/llama.cpp" || true)
    if [ -z "$source" ]; then
        # pip asks a source distribution what it is called by its build tool, which is therefore there; nothing is built.
        "$python" -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: -d "$work" llama-cpp-python
        tar -xzf "$work"/llama_cpp_python-*.tar.gz -C "$work"
        source=$(compgen -G "$work/llama_cpp_python-*/vendor/llama.cpp")
    fi
    PATH=$work/venv/bin:$PATH cmake -S "$source" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release "${tuned[@]}" \
        -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF >"$work/cmake.log"
    PATH=$work/venv/bin:$PATH cmake --build "$build" --target "${targets[@]}" >"$work/build.log"
fi
cargo build --release --locked
rewake=${CARGO_TARGET_DIR:-target}/release/rewake

for size in $sizes; do
    [ -f "$work/$size.safetensors" ] || "$python" tests/bench/random_model.py "$size" "$work/$size.safetensors"
    for type in $types; do
        model=$work/$size-$type.gguf
        [ -f "$model" ] || "$rewake" convert "$work/$size.safetensors" "$model" --type "$type"
        "$python" - "$rewake" "$llama" "$model" "$pairs" "$threads" "$size $type" $narrow <<'PY'
import json, statistics, subprocess, sys

rewake, llama, model, pairs, threads, title, *narrow = sys.argv[1:]


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def ours():
    report = json.loads(output(rewake, "bench", model, "--json", "--runs", "1", "--tokens", "32", "--threads", threads, *narrow))
    speeds = [line["tokens_per_second"]["median"] for line in report["measurements"]]
    return dict(zip(("prompt", "1", "16", "64"), speeds)), report


def theirs():
    common = ("-m", model, "-t", threads)
    tests = json.loads(output(f"{llama}/llama-bench", *common, "-p", "512", "-n", "32", "-r", "1", "-o", "json"))
    speeds = {"prompt" if test["n_prompt"] else "1": test["avg_ts"] for test in tests}
    lines = output(f"{llama}/llama-batched-bench", *common, "-npp", "1", "-ntg", "32", "-npl", "16,64", "-c", "8192",
                   "--output-format", "jsonl").splitlines()
    for line in lines:
        if line.startswith("{"):
            test = json.loads(line)
            speeds[str(test["pl"])] = test["speed_tg"]
    return speeds


runs = []
for _ in range(int(pairs)):
    mine, report = ours()
    runs.append((mine, theirs(), report))
median = lambda side, key: statistics.median(run[side][key] for run in runs)
print(f"\n{title}: {runs[-1][2]['machine']}")
print(f"{'':<10}{'Rewake':>10}{'llama.cpp':>12}{'ratio':>8}{'spread of ratios':>22}")
for key in ("prompt", "1", "16", "64"):
    ratios = sorted(mine[key] / peer[key] for mine, peer, _ in runs)
    ratio = median(0, key) / median(1, key)
    print(f"{key:<10}{median(0, key):>10.1f}{median(1, key):>12.1f}{ratio:>8.2f}{ratios[0]:>15.2f} … {ratios[-1]:.2f}")
PY
        if [ "${HTTP:-0}" = 1 ]; then
            python3 tests/bench/over_http.py "$model" --rewake "$rewake" --llama "$llama" --threads "$threads" --pairs "$pairs"
        fi
    done
done
