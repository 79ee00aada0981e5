//! The committed gRPC code is what `protoc` and prost make of `proto/csi.proto`.

use std::{fs, path::Path, process::Command};

/// Set to write the committed file instead of comparing it.
const BLESS: &str = "CLIP_CSI_BLESS";

#[test]
fn committed_code_is_what_the_proto_file_generates() {
    if let Err(err) = Command::new("protoc").arg("--version").output() {
        eprintln!("SKIP pb: protoc does not run: {err}");
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = tempfile::tempdir().unwrap();
    tonic_prost_build::configure()
        // The demo and the tests call the driver; they bring their own transport.
        .build_client(true)
        .build_transport(false)
        // The map fields print in one order.
        .btree_map(".")
        .emit_rerun_if_changed(false)
        .out_dir(dir.path())
        .compile_protos(&[root.join("proto/csi.proto")], &[root.join("proto")])
        .unwrap();
    let generated = dir.path().join("csi.v1.rs");
    let committed = root.join("src/pb/csi.v1.rs");
    if std::env::var_os(BLESS).is_some() {
        fs::copy(&generated, &committed).unwrap();
    }
    // Not assert_eq: a difference would print 10,000 lines.
    assert!(
        fs::read(&generated).unwrap() == fs::read(&committed).unwrap_or_default(),
        "src/pb/csi.v1.rs is not what proto/csi.proto generates: run\n  \
         {BLESS}=1 cargo test --release --test it pb::"
    );
}
