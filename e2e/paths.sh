# Where the e2e environment keeps what it makes: sourced by the shell scripts, mirrored by
# harness/paths.py. Everything lives outside the clone, so that a clean clone finds it again.

# shellcheck shell=bash
E2E_DIR="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
REPO_DIR="$(dirname "$E2E_DIR")"
CLIP_E2E_CACHE="${CLIP_E2E_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/clip-csi-e2e}"
mkdir -p "$CLIP_E2E_CACHE"

say() { printf '==> %s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# What install.sh puts outside PATH.
for dir in /usr/local/go/bin "$HOME/.cargo/bin" "$CLIP_E2E_CACHE"/go/bin /usr/lib/go-*/bin; do
    [ -d "$dir" ] && case ":$PATH:" in *":$dir:"*) ;; *) PATH="$PATH:$dir" ;; esac
done
export PATH
