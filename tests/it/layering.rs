//! The module graph is a DAG, and this table is its only definition.
//!
//! Each row names a module and the modules that it may import with `crate::`. A row may only name
//! modules of earlier rows, so the table is acyclic by construction. `super::super` is refused,
//! because it would step around the check. Doc links count: a link upwards is an arrow as well.

use std::{collections::BTreeSet, fs, path::Path};

const MODULES: &[(&str, &[&str])] = &[
    ("api", &[]),
    ("chunk", &[]),
    ("clock", &[]),
    ("digest", &[]),
    ("disk", &[]),
    ("failpoint", &[]),
    ("fair", &[]),
    ("sys", &[]),
    ("ipc", &["disk", "sys"]),
    ("secret", &[]),
    ("integrity", &["secret"]),
    ("telemetry", &[]),
    ("tls", &[]),
    ("health", &[]),
    ("metrics", &["disk", "health", "sys"]),
    ("exposition", &["metrics"]),
    ("tar", &[]),
    ("index", &["chunk", "digest", "tar"]),
    ("codec", &["chunk", "digest", "index", "sys"]),
    ("erofs", &["index"]),
    ("tier", &["chunk", "digest"]),
    ("toc", &["chunk", "codec", "digest", "tar", "tier"]),
    (
        "registry",
        &["digest", "integrity", "metrics", "secret", "tier", "tls"],
    ),
    ("cluster", &["telemetry"]),
    ("node_events", &["cluster"]),
    (
        "service_accounts",
        &["registry", "secret", "telemetry", "tier"],
    ),
    (
        "remote",
        &[
            "chunk",
            "clock",
            "digest",
            "disk",
            "fair",
            "integrity",
            "metrics",
            "secret",
            "tier",
            "tls",
        ],
    ),
    (
        "layer",
        &[
            "chunk",
            "clock",
            "codec",
            "digest",
            "disk",
            "fair",
            "index",
            "metrics",
            "remote",
            "sys",
            "tar",
            "telemetry",
            "tier",
            "toc",
        ],
    ),
    (
        "fs",
        &[
            "chunk", "digest", "index", "layer", "metrics", "sys", "tier",
        ],
    ),
    (
        "indexer",
        &[
            "chunk", "digest", "disk", "index", "layer", "metrics", "registry", "sys", "tar",
            "tier",
        ],
    ),
    (
        "warm",
        &[
            "chunk", "digest", "index", "indexer", "layer", "registry", "remote", "sys", "tier",
        ],
    ),
    (
        "prewarm",
        &[
            "api",
            "cluster",
            "digest",
            "metrics",
            "registry",
            "service_accounts",
            "telemetry",
            "tier",
            "warm",
        ],
    ),
    (
        "fuse",
        &[
            "digest",
            "fair",
            "fs",
            "index",
            "metrics",
            "sys",
            "telemetry",
            "tier",
        ],
    ),
    (
        "mount",
        &[
            "digest",
            "disk",
            "erofs",
            "failpoint",
            "metrics",
            "registry",
            "secret",
            "tier",
        ],
    ),
    (
        "roles",
        &[
            "digest",
            "disk",
            "erofs",
            "failpoint",
            "fair",
            "fs",
            "fuse",
            "index",
            "ipc",
            "layer",
            "metrics",
            "mount",
            "sys",
            "telemetry",
            "tier",
        ],
    ),
    ("node_taint", &["sys", "telemetry"]),
    ("pb", &[]),
    (
        "csi",
        &[
            "digest",
            "metrics",
            "mount",
            "pb",
            "registry",
            "secret",
            "telemetry",
            "tier",
        ],
    ),
    ("admin", &["metrics", "tier"]),
    (
        "config",
        &[
            "layer",
            "mount",
            "prewarm",
            "registry",
            "remote",
            "secret",
            "telemetry",
        ],
    ),
    ("cli", &["config"]),
    (
        "run",
        &[
            "admin",
            "cli",
            "clock",
            "cluster",
            "config",
            "csi",
            "digest",
            "disk",
            "exposition",
            "fair",
            "fs",
            "fuse",
            "health",
            "index",
            "indexer",
            "ipc",
            "layer",
            "metrics",
            "mount",
            "node_events",
            "node_taint",
            "prewarm",
            "registry",
            "remote",
            "roles",
            "secret",
            "service_accounts",
            "sys",
            "telemetry",
            "tier",
            "warm",
        ],
    ),
    ("main", &["run", "cli", "sys"]),
];

#[test]
fn table_is_acyclic() {
    for (row, (module, allowed)) in MODULES.iter().enumerate() {
        for name in *allowed {
            let earlier = MODULES[..row].iter().any(|(it, _)| it == name);
            assert!(
                earlier,
                "{module} may use {name} only if {name} has an earlier row"
            );
        }
    }
}

#[test]
fn imports_follow_the_table() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut faults = Vec::new();
    visit(&src, &mut |path, text| {
        let relative = path.strip_prefix(&src).expect("visited below src");
        let first = relative.components().next().expect("a file has a name");
        let module = Path::new(first.as_os_str())
            .file_stem()
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        // The programs are a line each, and stand above the table as `main` does.
        if module == "lib" || module == "bin" {
            return;
        }
        let Some((_, allowed)) = MODULES.iter().find(|(it, _)| *it == module) else {
            faults.push(format!(
                "{}: no row for module `{module}`",
                relative.display()
            ));
            return;
        };
        if text.contains("super::super") {
            faults.push(format!("{}: super::super", relative.display()));
        }
        for used in crate_imports(text) {
            if used != module && !allowed.contains(&used.as_str()) {
                faults.push(format!(
                    "{}: `{module}` may not use `{used}`",
                    relative.display()
                ));
            }
        }
    });
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

/// The first path segments named after `crate::` or the crate's name, in code and doc links alike,
/// groups included.
fn crate_imports(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (prefix, (at, _)) in ["crate::", "clip_csi::"]
        .into_iter()
        .flat_map(|prefix| text.match_indices(prefix).map(move |hit| (prefix, hit)))
    {
        let rest = &text[at + prefix.len()..];
        if !rest.starts_with('{') {
            found.insert(ident(rest));
            continue;
        }
        let mut depth = 0;
        let mut start_of_item = false;
        for (at, c) in rest.char_indices() {
            match c {
                '{' => {
                    depth += 1;
                    start_of_item = depth == 1;
                }
                '}' if depth == 1 => break,
                '}' => depth -= 1,
                ',' if depth == 1 => start_of_item = true,
                c if c.is_whitespace() => {}
                _ if start_of_item => {
                    found.insert(ident(&rest[at..]));
                    start_of_item = false;
                }
                _ => {}
            }
        }
    }
    found.retain(|it| it.starts_with(|c: char| c.is_ascii_lowercase()));
    found
}

fn ident(text: &str) -> String {
    text.chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect()
}

fn visit(dir: &Path, see: &mut impl FnMut(&Path, &str)) {
    for entry in fs::read_dir(dir).expect("src is readable") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            visit(&path, see);
        } else if path.extension().is_some_and(|it| it == "rs") {
            see(&path, &fs::read_to_string(&path).expect("UTF-8 source"));
        }
    }
}
