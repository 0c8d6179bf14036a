#!/usr/bin/env bash
# Runs a command with docker: the engine that answers already, else one started for the command alone and removed with
# all it holds afterwards (for tests and CI; root on Debian or Ubuntu). Use: image/tools/with-engine.sh COMMAND...
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

# What dockerd changes of this machine's network: rules and chains of both address families, policies, forwarding.
rules() { "$1tables-save" 2>/dev/null | sed -E -e '/^#/d' -e 's/\[[0-9]+:[0-9]+\]//' || true; }
forwarding() { cat /proc/sys/net/ipv4/ip_forward; }
for family in ip ip6; do rules "$family" >"$folder/$family.before"; done
forward_before=$(forwarding)

# Only what is new and docker's own goes, by table: others may have changed theirs in the meantime.
restore() {
    local family=$1 before="$folder/$1.before"
    command -v "${family}tables-save" >/dev/null || return 0
    rules "$family" | awk -v before="$before" '
        BEGIN { while ((getline line < before) > 0) { if (line ~ /^\*/) t = line; known[t, line] = 1
                if (line ~ /^:/) { split(line, w, " "); policy[t, w[1]] = w[2] } } }
        /^\*/ { table = $0; print; next }
        /^COMMIT/ { for (i = 0; i < chains; i++) print "-F " mine[i]; for (i = 0; i < chains; i++) print "-X " mine[i]
                   chains = 0; print; next }
        /^:DOCKER/ { if (!((table, $0) in known)) mine[chains++] = substr($1, 2); next }
        /^:/ { was = policy[table, $1]; if (was == "" && $2 != "-") was = "ACCEPT"
               if ($2 != "-" && $2 != was) print $1, was; next }
        /^-A/ { if (!((table, $0) in known) && !/^-A DOCKER/ && /DOCKER|docker0|br-[0-9a-f]{12}/) { sub(/^-A/, "-D"); print } }
    ' | "${family}tables-restore" --noflush 2>/dev/null || echo "note: docker's rules in ${family}tables stay" >&2
}
bridge=$(ip link show docker0 >/dev/null 2>&1 || echo docker0)  # /sys may show another namespace's network
export DOCKER_HOST="unix://$folder/docker.sock"
dockerd --data-root "$folder/data" --exec-root "$folder/exec" --host "$DOCKER_HOST" --pidfile "$folder/pid" \
    >"$folder/log" 2>&1 &
daemon=$!

finish() {
    trap '' TERM INT HUP  # a second one must not cut this short
    docker ps --all --quiet 2>/dev/null | xargs -r docker rm --force >/dev/null 2>&1 || true
    docker network prune --force >/dev/null 2>&1 || true
    kill "$daemon" 2>/dev/null || true
    wait "$daemon" 2>/dev/null || true
    [ -z "$bridge" ] || ip link delete "$bridge" 2>/dev/null || true
    restore ip
    restore ip6
    [ "$(forwarding)" = "$forward_before" ] || echo "$forward_before" >/proc/sys/net/ipv4/ip_forward || true
    # dockerd mounts its folder on itself, and leaves that where it could not start.
    awk -v under="$folder/" 'index($2, under) == 1 {print $2}' /proc/mounts | sort -r | xargs -r umount --lazy || true
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
policy=$(sed -n '/^\*filter/,/^COMMIT/s/^:FORWARD \([A-Z]*\).*/\1/p' "$folder/ip.before")
iptables -P FORWARD "${policy:-ACCEPT}"
"$@"
