#!/usr/bin/env bash
# Installs what the demo or the tests need and this machine lacks: Debian or Ubuntu, as root.
# usage: install.sh [demo|test|kernels]
# A second run finds everything and changes nothing. No service is started, nothing is upgraded.
set -euo pipefail
. "$(dirname "$0")/paths.sh"

what="${1:-test}"
case "$what" in demo | test | kernels) ;; *) die "usage: install.sh [demo|test|kernels]" ;; esac
[ "$(id -u)" = 0 ] || die "run as root: mounting, device nodes and packages need it"
command -v apt-get >/dev/null || die "no apt-get here: this script knows Debian and Ubuntu; e2e/README.md lists what to install by hand"

# command:package. A package is installed when its command is missing.
needs=(
    cc:gcc make:make pkg-config:pkg-config ld:binutils git:git curl:curl
    python3:python3 pip3:python3-pip fusermount3:fuse3
    docker-registry:docker-registry skopeo:skopeo umoci:umoci mmdebstrap:mmdebstrap
    redis-server:redis-server setfattr:attr setcap:libcap2-bin zstd:zstd pigz:pigz
)
if [ "$what" = test ]; then
    # Password files and certificates for the registry; a look at processes.
    needs+=(htpasswd:apache2-utils openssl:openssl ps:procps)
    # The cluster: containers and images, and a Prometheus that watches it and tests the chart's rules.
    needs+=(
        containerd:containerd runc:runc buildah:buildah busybox:busybox-static etcd:etcd-server
        ip:iproute2 nsenter:util-linux promtool:prometheus
    )
fi

if [ "$what" = kernels ]; then
    # A virtual machine, and what its kernel and its disk are made with.
    needs+=(qemu-system-x86_64:qemu-system-x86 busybox:busybox-static cpio:cpio mkfs.ext4:e2fsprogs modinfo:kmod xz:xz-utils)
fi

missing=()
for need in "${needs[@]}"; do
    command -v "${need%%:*}" >/dev/null || missing+=("${need##*:}")
done
# No command tells these: headers to link against, certificates to trust.
[ -e /usr/include/stdio.h ] || missing+=(libc6-dev)
[ -s /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)
if [ "$what" = test ]; then
    # Nor these: a Python module that reads the chart's values, and plugins for the pods' network.
    python3 -c 'import yaml' 2>/dev/null || missing+=(python3-yaml)
    [ -x /usr/lib/cni/bridge ] || [ -x /opt/cni/bin/bridge ] || missing+=(containernetworking-plugins)
    # The one that the pods run is alone in its image.
    ! ldd "$(command -v busybox)" >/dev/null 2>&1 || missing+=(busybox-static)
fi

updated=
apt() {
    if [ -z "$updated" ]; then
        # Another apt may be at work: wait for its lock.
        apt-get -qq -o DPkg::Lock::Timeout=600 update
        updated=1
    fi
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0 --no-install-recommends "$@" >/dev/null
}

# policy-rc.d is how Debian lets a package know that its service must not be started.
without_services() {
    local policy=/usr/sbin/policy-rc.d status=0
    if [ -e "$policy" ]; then
        "$@"
        return
    fi
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    "$@" || status=$?
    rm -f "$policy"
    return "$status"
}

# True when version $1 is at least version $2.
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

if [ ${#missing[@]} -gt 0 ]; then
    say "installing with apt: ${missing[*]}"
    # On Ubuntu most of them are in universe.
    without_services apt install "${missing[@]}" \
        || die "apt could not install: ${missing[*]}; on Ubuntu enable universe (add-apt-repository universe) and run again"
else
    say "apt packages: nothing missing"
fi

# --- Rust, at least what Cargo.toml asks for ---
rust_needed="$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$REPO_DIR/Cargo.toml")"
rust_here() { cargo --version 2>/dev/null | cut -d' ' -f2; }
if at_least "$(rust_here || true)" "$rust_needed"; then
    say "Rust: cargo $(rust_here)"
else
    say "Rust: have '$(rust_here || true)', need $rust_needed; trying rustup"
    if ! command -v rustup >/dev/null; then
        if [ -n "$(apt-cache --quiet=2 policy rustup 2>/dev/null | grep -v '(none)' | grep Candidate || true)" ]; then
            apt install rustup
        elif curl -fsS --connect-timeout 15 --max-time 120 -o "$CLIP_E2E_CACHE/rustup.sh" https://sh.rustup.rs; then
            sh "$CLIP_E2E_CACHE/rustup.sh" -q -y --profile minimal --default-toolchain none --no-modify-path >/dev/null
            PATH="$PATH:$HOME/.cargo/bin"
        fi
    fi
    if command -v rustup >/dev/null; then
        # The newest stable, if it is new enough: no toolchain is pinned in this repository.
        rustup toolchain install stable --profile minimal --component clippy --component rustfmt || true
        rustup default stable || true
    fi
    at_least "$(rust_here || true)" "$rust_needed" \
        || die "no Rust >= $rust_needed: neither apt nor https://sh.rustup.rs could give it; install it (https://rustup.rs), put cargo into PATH and run again"
    say "Rust: cargo $(rust_here)"
fi

# --- Go, for csi-sanity, the CSI client and Kubernetes; not needed when the cache holds them already ---
module=tools
[ "$what" = demo ] || module=tools/kubernetes
go_needed="$(sed -n 's/^go \([0-9]*\.[0-9]*\).*/\1/p' "$E2E_DIR/$module/go.mod")"
# From 1.21 on, Go fetches the version that go.mod asks for by itself, with its checksum.
go_self_updating=1.21
go_here() { GOTOOLCHAIN=local go version 2>/dev/null | sed -n 's/^go version go\([0-9.]*\).*/\1/p'; }
tools_are_built() {
    GO_SKIP_BUILD=1 "$E2E_DIR/tools.sh" csi &&
        { [ "$what" = demo ] || { GO_SKIP_BUILD=1 "$E2E_DIR/tools.sh" s3 && GO_SKIP_BUILD=1 "$E2E_DIR/tools.sh" kubernetes; }; }
}
if tools_are_built >/dev/null 2>&1; then
    say "Go: not needed, all that it builds is in the cache"
elif at_least "$(go_here || true)" "$go_self_updating"; then
    say "Go: $(go_here) (the tools need $go_needed)"
else
    say "Go: have '$(go_here || true)', need $go_self_updating; trying apt"
    apt install golang-go || true
    codename="$(. /etc/os-release && echo "${VERSION_CODENAME:-}")"
    if ! at_least "$(go_here || true)" "$go_self_updating" && [ "$codename" = bookworm ]; then
        # Debian 12 has a newer Go among its backports. The source is used for this one command and
        # not added to the machine.
        mirror="$(apt-get indextargets --format '$(RELEASE)|$(REPO_URI)' 'Created-By: Packages' | sed -n "s/^$codename|//p" | head -n 1)"
        list="$(mktemp --suffix=.list)"
        keyring=/usr/share/keyrings/debian-archive-keyring.gpg
        for suite in "$codename" "$codename-backports"; do
            echo "deb [signed-by=$keyring] $mirror $suite main" >>"$list"
        done
        chmod 644 "$list"
        once=(-o "Dir::Etc::sourcelist=$list" -o Dir::Etc::sourceparts=-)
        apt-get -qq "${once[@]}" -o DPkg::Lock::Timeout=600 update || true
        apt install "${once[@]}" -t "$codename-backports" golang-go golang-src || true
        rm -f "$list"
        # The index of the machine's own sources again.
        apt-get -qq -o DPkg::Lock::Timeout=600 update || true
    fi
    at_least "$(go_here || true)" "$go_self_updating" \
        || die "no Go >= $go_self_updating: apt has none; install it (https://go.dev/dl), put go into PATH and run again"
    say "Go: $(go_here) (the tools need $go_needed)"
fi
[ -e /dev/fuse ] || die "no /dev/fuse: load the module fuse (modprobe fuse), or give the container the device"
