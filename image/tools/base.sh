#!/usr/bin/env bash
# Makes a base image from Debian's packages, for machines that can pull none (tests, CI). Root, Debian or Ubuntu.
# Use: image/tools/base.sh NAME:TAG; then make image BASE=NAME:TAG. It stands in for the official slim Python image.
set -euo pipefail

name=${1:?usage: image/tools/base.sh NAME:TAG}
engine=${ENGINE:-docker}
bundle=/etc/ssl/certs/ca-certificates.crt
# Unpacking in memory takes half the time.
scratch=$(mktemp -d -p "$([ "$(df --output=avail /dev/shm | tail -1)" -gt 2000000 ] && echo /dev/shm || echo /tmp)")
trap 'rm -rf "$scratch"' EXIT

command -v mmdebstrap >/dev/null || flock /tmp/k8scifar-apt.lock sh -c '
    apt-get update -qq && apt-get install -qq -y --no-install-recommends mmdebstrap >/dev/null'

# shellcheck disable=SC2016  # mmdebstrap's own shell expands $1
# As in the official image: no manuals, no locales, no bytecode of the standard library. The host's certificates come
# along, since a network that needs a local one needs it in the build too.
TMPDIR=$scratch mmdebstrap --quiet --variant=minbase \
    --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr --include=usr-is-merged,ca-certificates,python3,python3-venv \
    --aptopt='Acquire::Languages "none"' --dpkgopt=force-unsafe-io \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --customize-hook="copy-in $bundle /etc/ssl/certs" \
    --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*' \
    --customize-hook='find "$1"/usr/lib/python3* -name __pycache__ -prune -exec rm -rf {} +' \
    bookworm "$scratch/base.tar"

certificates="PIP_CERT=$bundle SSL_CERT_FILE=$bundle"
if [ "$engine" = buildah ]; then
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$scratch/base.tar" / >/dev/null
    buildah config --env "PIP_CERT=$bundle" --env "SSL_CERT_FILE=$bundle" --cmd python3 "$container"
    buildah commit --quiet --rm "$container" "$name"
else
    "$engine" import --change "ENV $certificates" --change 'CMD ["python3"]' "$scratch/base.tar" "$name"
fi
