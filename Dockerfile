# clip-csi's image: its programs, the libraries they are linked with, and the certificates it trusts; no shell.
#
#   docker build -t REGISTRY/clip-csi/clip-csi:VERSION .
#
# Any builder of OCI images does; nothing but the base image and crates.io is fetched. The same sources and
# arguments give the same bytes, when the builder sets SOURCE_DATE_EPOCH and rewrites times by it.

ARG RUST_VERSION=1.95
FROM docker.io/library/rust:${RUST_VERSION}-slim-bookworm AS build
# `dist` is optimised as a whole; `release` builds in half the time.
ARG CARGO_PROFILE=dist
ARG SOURCE_DATE_EPOCH=0
WORKDIR /src
COPY . .
# Where sources lay while building is nobody's business and changes the bytes.
RUN RUSTFLAGS="--remap-path-prefix=/src=/clip-csi --remap-path-prefix=${CARGO_HOME:-/root/.cargo}=/cargo" \
    cargo build --locked --profile "$CARGO_PROFILE" --bins
# The root of the image: libraries where the loader looks for them, names for root and for the user below.
RUN set -eu; \
    for program in clip-csi clip-csi-node clip-csi-serve; do install --strip -D "target/$CARGO_PROFILE/$program" "/image/usr/local/bin/$program"; done; \
    for program in /image/usr/local/bin/*; do ldd "$program"; done | grep -o '/[^ ]*' | sort -u | while read -r library; do install -D "$(readlink -f "$library")" "/image$library"; done; \
    install -D -m 644 /etc/ssl/certs/ca-certificates.crt /image/etc/ssl/certs/ca-certificates.crt; \
    printf 'root:x:0:0:root:/:/sbin/nologin\nclip-csi:x:65532:65532:clip-csi:/:/sbin/nologin\n' >/image/etc/passwd; \
    printf 'root:x:0:\nclip-csi:x:65532:\n' >/image/etc/group; \
    printf 'hosts: files dns\n' >/image/etc/nsswitch.conf; \
    install -D -m 644 LICENSE /image/usr/share/doc/clip-csi/LICENSE; \
    install -d -m 1777 /image/tmp; \
    find /image -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +

FROM scratch
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="clip-csi" \
      org.opencontainers.image.description="Kubernetes CSI driver that mounts OCI images into pods lazily" \
      org.opencontainers.image.source="https://github.com/clip-csi/clip-csi" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /image/ /
# The node service mounts and so runs as root: the chart says so. Nothing else needs it.
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/clip-csi"]
