#!/usr/bin/env bash
# Runs csi-sanity's Identity and Node specs against a driver's socket; the last line counts.
# usage: sanity.sh SOCKET [IMAGE]
#
# With IMAGE, a stand-in controller makes volumes of it, so that the Node specs that publish a volume
# run as well. Without it, the one that cannot do without CreateVolume is left out
# (kubernetes-csi/csi-test#214). The Controller specs are not run: the driver serves the node only.
set -euo pipefail
. "$(dirname "$0")/paths.sh"
[ $# -ge 1 ] || die "usage: sanity.sh SOCKET [IMAGE]"
socket="$1" image="${2:-}"
[ -S "$socket" ] || die "$socket is no socket"

tools="$("$E2E_DIR/tools.sh")"
work="$(mktemp -d)"
controller=
cleanup() {
    [ -z "$controller" ] || kill "$controller" 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT

passed=0 failed=0 skipped=0 status=0
# run NAME LEAST OPTION...: the specs of one service, of which at least LEAST must pass.
run() {
    local name="$1" least="$2" code=0 summary n
    shift 2
    "$tools/csi-sanity" --csi.endpoint="unix://$socket" --csi.mountdir="$work/mount" --csi.stagingdir="$work/staging" \
        --ginkgo.focus="$name Service" --ginkgo.v --ginkgo.no-color "$@" >"$work/out" 2>&1 || code=$?
    summary="$(grep -E '^(SUCCESS|FAIL)! -- ' "$work/out")" || die "csi-sanity gave no summary: $(tail -n 5 "$work/out")"
    count() { sed -n "s/.*[^0-9]\([0-9]*\) $1.*/\1/p" <<<"$summary"; }
    n="$(count Passed)"
    passed=$((passed + n))
    failed=$((failed + $(count Failed)))
    # ginkgo also counts what the focus leaves out; these are the specs that skipped themselves.
    skipped=$((skipped + $(grep -c '^S \[SKIPPED\]' "$work/out" || true)))
    if [ "$code" != 0 ]; then
        sed -n '/Summarizing/,$p' "$work/out"
        status=1
    elif [ "$n" -lt "$least" ]; then
        say "only $n $name specs passed, at least $least should: were they renamed?"
        status=1
    fi
}

run Identity 3
if [ -n "$image" ]; then
    "$tools/csictl" serve-controller "$work/controller.sock" "$image" &
    controller=$!
    for _ in $(seq 1000); do [ -S "$work/controller.sock" ] && break || sleep 0.01; done
    run Node 8 --csi.controllerendpoint="unix://$work/controller.sock"
else
    run Node 7 --ginkgo.skip="should remove target path"
fi
echo "csi-sanity: $passed passed, $failed failed, $skipped skipped"
exit "$status"
