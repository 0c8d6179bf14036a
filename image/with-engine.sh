#!/usr/bin/env bash
# Runs a command with a container engine: docker's that answers already, else one started for the command alone and
# removed with all its images afterwards (tests, CI; root, Debian or Ubuntu). Use: image/with-engine.sh COMMAND...
set -euo pipefail

if docker info >/dev/null 2>&1; then
    exec "$@"
fi
[ "$(id -u)" = 0 ] || { echo "error: docker does not answer, and only root can start one" >&2; exit 2; }
if ! command -v dockerd >/dev/null; then
    apt-get update -qq
    # Its own service must not start: this script starts and ends the engine itself.
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d.k8scifar
    RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends docker.io iptables >/dev/null
fi
[ -n "$(command -v dockerd)" ] || { echo "error: no dockerd to start" >&2; exit 2; }

folder=$(mktemp -d "${TMPDIR:-/tmp}/k8scifar-engine.XXXXXX")
forward=$(iptables -S FORWARD 2>/dev/null | awk '$1 == "-P" {print $3}')
export DOCKER_HOST="unix://$folder/docker.sock"
dockerd --data-root "$folder/data" --exec-root "$folder/exec" --host "$DOCKER_HOST" --pidfile "$folder/pid" \
    >"$folder/log" 2>&1 &
daemon=$!

finish() {
    # shellcheck disable=SC2046  # one word for each container
    docker rm --force $(docker ps --all --quiet) >/dev/null 2>&1 || true
    kill "$daemon" 2>/dev/null || true
    wait "$daemon" 2>/dev/null || true
    # dockerd sets this policy to DROP and leaves it so.
    [ -z "$forward" ] || iptables -P FORWARD "$forward" || true
    rm -rf "$folder" || true
}
trap finish EXIT

for _ in $(seq 100); do
    docker info >/dev/null 2>&1 && break
    kill -0 "$daemon" 2>/dev/null || break
    sleep 0.3
done
docker info >/dev/null 2>&1 || { echo "error: dockerd did not start: $(tail -n 1 "$folder/log")" >&2; exit 2; }
"$@"
