//! The committed gRPC code is what `protoc` and prost make of the files in `proto/`.

use std::{fs, path::Path, process::Command};

/// Set to write the committed files instead of comparing them.
const BLESS: &str = "CLIP_CSI_BLESS";

/// What is generated from what.
const FILES: &[(&str, &str)] = &[
    ("csi.proto", "csi.v1.rs"),
    ("pluginregistration.proto", "pluginregistration.rs"),
];

#[test]
fn committed_code_is_what_the_proto_files_generate() {
    if let Err(err) = Command::new("protoc").arg("--version").output() {
        eprintln!("SKIP pb: protoc does not run: {err}");
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = tempfile::tempdir().unwrap();
    let protos: Vec<_> = FILES
        .iter()
        .map(|(proto, _)| root.join("proto").join(proto))
        .collect();
    tonic_prost_build::configure()
        // The demo and the tests call the driver; they bring their own transport.
        .build_client(true)
        .build_transport(false)
        // The map fields print in one order.
        .btree_map(".")
        .emit_rerun_if_changed(false)
        .out_dir(dir.path())
        .compile_protos(&protos, &[root.join("proto")])
        .unwrap();
    for (proto, file) in FILES {
        let generated = dir.path().join(file);
        let committed = root.join("src/pb").join(file);
        if std::env::var_os(BLESS).is_some() {
            fs::copy(&generated, &committed).unwrap();
        }
        // Not assert_eq: a difference would print 10,000 lines.
        assert!(
            fs::read(&generated).unwrap() == fs::read(&committed).unwrap_or_default(),
            "src/pb/{file} is not what proto/{proto} generates: run\n  \
             {BLESS}=1 cargo test --release --test it pb::"
        );
    }
}
