#!/usr/bin/env bash
# Unpacks an image with umoci, as root, and writes the manifest of its tree: what a mount must show.
# usage: truth.sh LAYOUT:TAG OUT [KEEP_ROOTFS_IN]
set -euo pipefail
. "$(dirname "$0")/paths.sh"
[ $# -ge 2 ] || die "usage: truth.sh LAYOUT:TAG OUT [KEEP_ROOTFS_IN]"
[ "$(id -u)" = 0 ] || die "truth.sh needs root: devices, owners and capabilities are part of the truth"

# Beside the cache and not in /tmp: a tmpfs has no user.* attributes before Linux 6.6.
mkdir -p "$CLIP_E2E_CACHE/work"
work="$(mktemp -d "$CLIP_E2E_CACHE/work/truth.XXXXXX")"
trap 'rm -rf "$work"' EXIT
umoci unpack --image "$1" "$work/bundle" 2>"$work/log" || die "umoci unpack $1: $(cat "$work/log")"
python3 "$E2E_DIR/tree.py" "$work/bundle/rootfs" >"$work/manifest"
if [ $# -ge 3 ]; then
    rm -rf "$3"
    mv "$work/bundle/rootfs" "$3"
fi
# Last and at once: a manifest that exists is whole.
mv "$work/manifest" "$2"
