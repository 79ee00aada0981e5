//! Rules of style that a machine can keep.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Lines that a file may have, tests or not: more is two jobs.
const MAX_LINES: usize = 600;

/// Files whose errors become codes of a protocol: every variant is decided on its own.
const EXHAUSTIVE: &[&str] = &["src/fuse/errno.rs", "src/csi/status.rs"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Whether a file holds generated gRPC code, as all of `pb` but its root does.
fn is_generated(path: &Path) -> bool {
    path.parent().is_some_and(|it| it.ends_with("src/pb")) && !path.ends_with("mod.rs")
}

/// The Rust files below `dir`, generated ones left out, with their text.
fn sources(dir: &str) -> Vec<(PathBuf, String)> {
    fn visit(dir: &Path, found: &mut Vec<(PathBuf, String)>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                visit(&path, found);
            } else if path.extension().is_some_and(|it| it == "rs") && !is_generated(&path) {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(root()).unwrap().to_owned(), text));
            }
        }
    }
    let mut found = Vec::new();
    visit(&root().join(dir), &mut found);
    found
}

#[test]
fn every_file_says_what_it_does() {
    for (path, text) in sources("src") {
        let is_test = path.file_stem().is_some_and(|it| it == "tests");
        assert!(
            is_test || text.starts_with("//! "),
            "{}: no module doc",
            path.display()
        );
    }
}

#[test]
fn no_file_has_grown_past_one_job() {
    for (path, text) in sources("src").into_iter().chain(sources("tests")) {
        let n_lines = text.lines().count();
        assert!(n_lines <= MAX_LINES, "{}: {n_lines} lines", path.display());
    }
}

#[test]
fn nothing_is_left_undone_or_switched_off() {
    let marks = [
        "todo!(",
        "unimplemented!(",
        "FIXME",
        "XXX",
        "#[ignore",
        "#[should_panic",
        "block_on(",
    ];
    for (path, text) in sources("src").into_iter().chain(sources("tests")) {
        if path == Path::new("tests/it/tidy.rs") {
            continue;
        }
        for mark in marks {
            // The one place that starts the runtime.
            let is_start = mark == "block_on(" && path == Path::new("src/run/mod.rs");
            assert!(
                is_start || !text.contains(mark),
                "{}: {mark}",
                path.display()
            );
        }
    }
}

#[test]
fn protocol_codes_are_decided_variant_by_variant() {
    for path in EXHAUSTIVE {
        let text = fs::read_to_string(root().join(path)).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        assert!(!code.contains("_ =>"), "{path} has a catch-all arm");
    }
}

#[test]
fn the_index_knows_no_input_and_no_runtime() {
    for (path, text) in sources("src/index").into_iter().chain(sources("src/tar")) {
        for used in ["tokio", "std::fs", "std::net", "std::thread"] {
            assert!(!text.contains(used), "{}: {used}", path.display());
        }
    }
}

#[test]
fn unsafe_code_is_in_one_module() {
    for (path, text) in sources("src") {
        let is_sys = path == Path::new("src/sys.rs") || path.starts_with("src/sys");
        assert!(is_sys || !text.contains("unsafe {"), "{}", path.display());
    }
}
