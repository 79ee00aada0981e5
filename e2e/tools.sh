#!/usr/bin/env bash
# Builds the Go programs of e2e/tools into the cache and prints the directory they are in.
# usage: tools.sh [csi|kubernetes|s3|storage|toc]
#   csi         csi-sanity, csictl, and what tests and benchmarks need: testregistry, benchreader, credentialprovider (the default)
#   kubernetes  Kubernetes' own programs, Helm, the cluster's sidecars, and in crds/ the kinds of Prometheus' operator
#   s3          versitygw, a server that speaks S3
#   storage     Kubernetes' own end-to-end tests of CSI drivers
#   toc         toc, which makes eStargz and zstd:chunked of layers
# A no-op when the cache holds them for these very sources.
set -euo pipefail
. "$(dirname "$0")/paths.sh"

what="${1:-csi}"
flags='-s -w'
# Not inlined, a program takes two thirds of the time to build. The one that measures is not built so.
compiler=(-gcflags 'all=-l -dwarf=false')
verb=(build)
# A compiler ends before collecting garbage pays: that would be a sixth of its time.
export GOGC=off GOMEMLIMIT=1GiB
case "$what" in
csi)
    module="$E2E_DIR/tools"
    sources=("$module"/*/*.go)
    packages=(./csictl ./testregistry ./credentialprovider github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity)
    about="csi-sanity, csictl, testregistry, benchreader and credentialprovider (Go, once; a minute or two)"
    ;;
kubernetes)
    module="$E2E_DIR/tools/kubernetes"
    sources=("$module"/*/*.go)
    packages=(
        k8s.io/kubernetes/cmd/{kube-apiserver,kube-controller-manager,kube-scheduler,kubelet,kubectl}
        helm.sh/helm/v4/cmd/helm sigs.k8s.io/controller-tools/cmd/controller-gen ./csi-node-driver-registrar ./livenessprobe
        github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner
    )
    version="$(sed -n 's|^\tk8s.io/kubernetes v\([0-9.]*\).*|\1|p' "$module/go.mod")"
    # Without these it calls itself v0.0.0, and Helm and kubelet refuse to work with it.
    for it in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
        flags+=" -X $it.gitVersion=v$version -X $it.gitMajor=1 -X $it.gitMinor=$(cut -d. -f2 <<<"$version")"
    done
    about="Kubernetes $version and Helm (Go, once; about five minutes on two idle cores)"
    ;;
s3)
    module="$E2E_DIR/tools/s3"
    sources=()
    packages=(github.com/versity/versitygw/cmd/versitygw)
    about="versitygw (Go, once; a minute or two on two cores)"
    ;;
storage)
    module="$E2E_DIR/tools/storage"
    sources=("$module"/*.go)
    packages=(.)
    verb=(test -c)
    about="Kubernetes' tests of CSI drivers (Go, once; about three minutes on two idle cores)"
    ;;
toc)
    module="$E2E_DIR/tools/toc"
    sources=("$module"/*.go)
    packages=(.)
    about="toc (Go, once; some seconds)"
    ;;
*) die "usage: tools.sh [csi|kubernetes|s3|storage|toc]" ;;
esac

# What is built of what; the number is raised when how that is done changes below.
key="$({ echo 1 "$flags" "${compiler[@]}" "${packages[@]}"; cat "$module"/go.mod "$module"/go.sum "${sources[@]}"; } | sha256sum | cut -c1-12)"
out="$CLIP_E2E_CACHE/tools-$what-$key"
# Two runs do not build the same: the second one waits, and finds it. The lock ends with this process.
exec 9>"$CLIP_E2E_CACHE/tools-$what.lock"
[ -n "${GO_SKIP_BUILD:-}" ] || flock 9
if [ ! -d "$out" ]; then
    # Asked whether a build would be needed.
    [ -z "${GO_SKIP_BUILD:-}" ] || exit 1
    command -v go >/dev/null || die "no Go toolchain: run e2e/install.sh test"
    say "building $about"
    begin=$SECONDS
    new="$(mktemp -d "$CLIP_E2E_CACHE/tools.XXXXXX")"
    trap 'rm -rf "$new"' EXIT
    # -mod=readonly: go.mod and go.sum are the pin, a build never changes them.
    export CGO_ENABLED=0 GOTOOLCHAIN=auto GOFLAGS=-mod=readonly
    (cd "$module" && go "${verb[@]}" -trimpath -buildvcs=false "${compiler[@]}" -ldflags "$flags" -o "$new/" "${packages[@]}"
        if [ "$what" = csi ]; then
            go build -trimpath -buildvcs=false -ldflags "$flags" -o "$new/" ./benchreader
        fi
        if [ "$what" = kubernetes ]; then
            "$new/controller-gen" crd paths=github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1 "output:crd:dir=$new/crds"
            rm "$new/controller-gen"
        fi)
    chmod 755 "$new"
    # At once: a directory under its name is whole.
    rm -rf "$CLIP_E2E_CACHE/tools-$what-"????????????
    mv -T "$new" "$out"
    say "built in $((SECONDS - begin)) s"
fi
echo "$out"
