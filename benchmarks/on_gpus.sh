#!/usr/bin/env bash
# What only GPUs can show: their tests, then their benchmarks. From the repository's root:
#   benchmarks/on_gpus.sh engine FOLDER     one GPU, 10 minutes: the engine
#   benchmarks/on_gpus.sh soak FOLDER       one GPU, 12 minutes: a soak that preempts, beside the cost of fp8
#   benchmarks/on_gpus.sh ranks FOLDER      two GPUs, 9 minutes: tensor parallelism, a device profile
#   benchmarks/on_gpus.sh links FOLDER      two GPUs, 15 minutes: NCCL links, workers killed, the handoff
#   benchmarks/on_gpus.sh traces FOLDER     two GPUs, 12 minutes: does disaggregation pay; TRACES is the traces' folder
# Logs and results go to FOLDER; a line for each comes last. PYTHON names the interpreter; PYTEST more of its arguments.
set -uo pipefail
step=${1:?engine, soak, ranks, links or traces} out=${2:?a folder for logs and results}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
names=()
go() { # NAME LIMIT_S COMMAND...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1
  echo "exit code $? after $((SECONDS - start)) s" >> "$out/$name.log"
}
tests() { # NAME LIMIT_S PATH...
  local name=$1 limit=$2
  shift 2
  # shellcheck disable=SC2086
  go "$name" "$limit" "$python" -m pytest -m gpu ${PYTEST:-} "$@"
}
trap 'for name in "${names[@]}"; do printf "%-12s %s\n" "$name" "$(tail -2 "$out/$name.log" | tr "\n" " ")"; done' EXIT
case $step in
engine)
  names=(cuda sampling fp8 packing memory engine)
  tests cuda 260 tests/engine/test_cuda.py &
  tests sampling 260 tests/engine/test_cuda_sampling.py &
  tests fp8 260 tests/engine/test_cuda_fp8.py &
  tests packing 260 tests/kv_transfer/test_kernels_gpu.py tests/kv_transfer/test_cache_port_gpu.py &
  wait
  tests memory 120 tests/engine/test_cuda_memory.py # measures the whole GPU: alone
  go engine 240 "$python" -m benchmarks.engine --output "$out/engine.json"
  cat "$out/engine.log"
  ;;
soak)
  names=(soak accuracy)
  go soak 780 "$python" -m benchmarks.soak --minutes "${MINUTES:-10}" --kv-cache-gib 0.5 --rate 7 --output "$out/soak.json" &
  go accuracy 300 "$python" benchmarks/fp8_accuracy.py ${MODEL:+--model "$MODEL"} --output "$out/fp8-accuracy.json"
  wait
  cat "$out/accuracy.log"
  ;;
ranks)
  names=(ranks tiles profile sums)
  tests ranks 150 tests/engine/test_cuda_ranks.py
  model=$("$python" -c 'import pathlib, sys; from benchmarks.offline import model_path
print(model_path("8b", pathlib.Path(sys.argv[1])))' "$out")
  CUDA_VISIBLE_DEVICES=1 go profile 200 "$python" -m cli.main profile --model "$model" --dtype bfloat16 --device cuda \
    --budget 60 --output "$out/profile-llama-8b.json" &
  CUDA_VISIBLE_DEVICES=0 go tiles 260 "$python" -m benchmarks.product_tiles --limit-s 220 --output "$out/tiles.json"
  wait
  go sums 130 "$python" benchmarks/tensor_parallel.py --parts products,sums --limit-s 60 --output "$out/tensor-parallel.json"
  cat "$out/tiles.log" "$out/sums.log"
  ;;
links)
  names=(link killed handoff)
  tests link 240 tests/kv_transfer/test_nccl_link.py -s
  # The same test as on CPUs, over NCCL; `phasewise` must lie beside the interpreter.
  # shellcheck disable=SC2086
  go killed 240 "$python" -m pytest -m cluster ${PYTEST:-} tests/cluster/test_links_on_cluster.py
  go handoff 700 "$python" -m benchmarks.handoff --parts "${PARTS:-caches,kernels,interference,cluster,memory,many}" \
    --output "$out/handoff.json"
  cat "$out/handoff.log"
  ;;
traces)
  names=(disaggregation)
  go disaggregation 1200 "$python" -m benchmarks.disaggregation --traces "${TRACES:?the folder of the Azure traces}" \
    --duration-s "${DURATION_S:-30}" --output "$out/disaggregation.json"
  cat "$out/disaggregation.log"
  ;;
*)
  echo "unknown step $step" >&2
  exit 2
  ;;
esac
