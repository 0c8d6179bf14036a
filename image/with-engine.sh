#!/usr/bin/env bash
# Runs a command with docker: the engine that answers already, else one started for the command alone and removed with
# all it holds afterwards (for tests and CI; root on Debian or Ubuntu). Use: image/with-engine.sh COMMAND...
set -euo pipefail

if docker info >/dev/null 2>&1; then
    exec "$@"
fi
[ "$(id -u)" = 0 ] || { echo "error: docker does not answer, and only root can start an engine" >&2; exit 2; }
if ! command -v dockerd >/dev/null; then
    command -v apt-get >/dev/null || { echo "error: docker is missing, and there is no apt-get to install it" >&2; exit 2; }
    DEBIAN_FRONTEND=noninteractive flock /tmp/k8scifar-apt.lock sh -c '
        apt-get update -qq && apt-get install -qq -y --no-install-recommends docker.io iptables >/dev/null'
fi

folder=$(mktemp -d "${TMPDIR:-/tmp}/k8scifar-engine.XXXXXX")
forward=$(iptables -S FORWARD 2>/dev/null | awk '$1 == "-P" {print $3}' || true)
bridge=$([ -e /sys/class/net/docker0 ] || echo docker0)
export DOCKER_HOST="unix://$folder/docker.sock"
dockerd --data-root "$folder/data" --exec-root "$folder/exec" --host "$DOCKER_HOST" --pidfile "$folder/pid" \
    >"$folder/log" 2>&1 &
daemon=$!

finish() {
    docker ps --all --quiet 2>/dev/null | xargs -r docker rm --force >/dev/null 2>&1 || true
    kill "$daemon" 2>/dev/null || true
    wait "$daemon" 2>/dev/null || true
    [ -z "$bridge" ] || ip link delete "$bridge" 2>/dev/null || true
    [ -z "$forward" ] || iptables -P FORWARD "$forward" || true
    rm -rf "$folder" || true
}
trap finish EXIT
trap 'exit 143' TERM INT HUP

for _ in $(seq 100); do
    if docker info >/dev/null 2>&1 || ! kill -0 "$daemon" 2>/dev/null; then break; fi
    sleep 0.3
done
docker info >/dev/null 2>&1 || { echo "error: dockerd did not start: $(tail -n 1 "$folder/log")" >&2; exit 2; }
# dockerd sets this policy to DROP, which cuts off whatever else this machine routes; its own rules do without.
[ -z "$forward" ] || iptables -P FORWARD "$forward"
"$@"
