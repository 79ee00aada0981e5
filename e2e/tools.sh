#!/usr/bin/env bash
# Builds csi-sanity and csictl from e2e/tools into the cache and prints the directory they are in.
# A no-op when the cache holds them for these very sources.
set -euo pipefail
. "$(dirname "$0")/paths.sh"

key="$(cat "$E2E_DIR"/tools/go.mod "$E2E_DIR"/tools/go.sum "$E2E_DIR"/tools/csictl/*.go | sha256sum | cut -c1-12)"
out="$CLIP_E2E_CACHE/tools-$key"
if [ ! -x "$out/csi-sanity" ] || [ ! -x "$out/csictl" ]; then
    # Asked whether a build would be needed.
    [ -z "${GO_SKIP_BUILD:-}" ] || exit 1
    command -v go >/dev/null || die "no Go toolchain: run e2e/install.sh test"
    say "building csi-sanity and csictl (Go, once; a minute or two)"
    new="$(mktemp -d "$CLIP_E2E_CACHE/tools.XXXXXX")"
    # -mod=readonly: go.mod and go.sum are the pin, a build never changes them.
    (cd "$E2E_DIR/tools" && CGO_ENABLED=0 GOTOOLCHAIN=auto GOFLAGS=-mod=readonly go build -trimpath -buildvcs=false \
        -ldflags '-s -w' -o "$new/" ./csictl github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity)
    rm -rf "$out"
    mv "$new" "$out"
fi
echo "$out"
