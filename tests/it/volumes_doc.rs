//! `docs/VOLUMES.md` and the program know the same attributes, parameters, keys and errors.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::{collections::BTreeMap, fs, path::Path};

use clip_csi::csi::{ATTRIBUTES, Attributes, SECRET_KEYS};

/// Where the texts of errors about a volume's own settings are.
const SOURCES: &[&str] = &["src/csi", "src/mount", "src/run", "src/tier.rs"];

/// The rows of the table below a heading, by cells, without the heading's.
fn table(heading: &str) -> Vec<Vec<String>> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/VOLUMES.md");
    let text = fs::read_to_string(path).unwrap();
    let (_, section) = text.split_once(&format!("\n## {heading}\n")).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let lines = section.lines().skip_while(|it| !it.starts_with('|'));
    let rows = lines.take_while(|it| it.starts_with('|')).skip(2);
    rows.map(|row| {
        let cells = row.trim_matches('|').split('|');
        cells.map(|it| it.trim().to_owned()).collect()
    })
    .collect()
}

fn first_cells(heading: &str) -> Vec<String> {
    let rows = table(heading);
    rows.iter()
        .map(|it| it[0].trim_matches('`').to_owned())
        .collect()
}

#[test]
fn the_tables_have_every_attribute_and_key_and_no_others() {
    assert_eq!(first_cells("Attributes"), ATTRIBUTES);
    assert_eq!(first_cells("Keys of a Secret"), SECRET_KEYS);
}

/// A value that each attribute takes.
fn example(attribute: &str) -> String {
    let digest = format!("sha256:{}", "0".repeat(64));
    let example = match attribute {
        "image" => "app",
        "platform" => "linux/amd64",
        "indexDigest" => &digest,
        "prefetch" => "all",
        "pullPolicy" => "Never",
        "path" => "usr/share",
        "insecure" | "writable" => "true",
        "writableSize" => "64Mi",
        other => panic!("no example of {other}"),
    };
    example.to_owned()
}

#[test]
fn what_is_a_parameter_is_what_a_volume_that_outlives_its_pods_can_have() {
    for row in table("Attributes") {
        let attribute = row[0].trim_matches('`');
        let mut wanted = BTreeMap::from([("image".to_owned(), "app".to_owned())]);
        wanted.insert(attribute.to_owned(), example(attribute));
        // A size says nothing alone.
        if attribute == "writableSize" {
            wanted.insert("writable".to_owned(), "true".to_owned());
        }
        let parsed = Attributes::parse(&wanted).unwrap();
        let is_parameter = parsed.written_over(u64::MAX).is_ok();
        assert_eq!(
            row[3],
            if is_parameter { "yes" } else { "no" },
            "{attribute}"
        );
    }
}

/// The program's text, one string literal after the other, without the line breaks inside them.
fn texts() -> String {
    fn visit(path: &Path, found: &mut String) {
        if path.is_dir() {
            for entry in fs::read_dir(path).unwrap() {
                visit(&entry.unwrap().path(), found);
            }
        } else {
            let text = fs::read_to_string(path).unwrap();
            let code = text.split("#[cfg(test)]").next().unwrap();
            let mut joined = String::new();
            for line in code.lines().map(str::trim_start) {
                // A backslash joins a literal with its next line.
                joined.push_str(line.strip_suffix('\\').unwrap_or(line));
                if !line.ends_with('\\') {
                    joined.push('\n');
                }
            }
            found.push_str(&joined.replace("\\\"", "\""));
        }
    }
    let mut found = String::new();
    for source in SOURCES {
        visit(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join(source),
            &mut found,
        );
    }
    // What stands for a constant in a message is that constant.
    for (name, value) in [
        ("{USERNAME}", "username"),
        ("{PASSWORD}", "password"),
        ("{DOCKER_CONFIG}", ".dockerconfigjson"),
    ] {
        found = found.replace(name, value);
    }
    found
}

#[test]
fn every_error_of_the_table_is_the_programs() {
    let texts = texts();
    let rows = table("Errors");
    assert!(20 < rows.len(), "only {} rows were found", rows.len());
    for row in rows {
        for part in row[0].trim_matches('`').split('…') {
            assert!(
                texts.contains(part),
                "the program has no text {part:?}: {}",
                row[0]
            );
        }
        assert!(!row[2].is_empty() && !row[3].is_empty(), "{}", row[0]);
    }
}

/// What the parser of attributes refuses is in the table: an error that is new there needs its row.
#[test]
fn every_error_of_attributes_is_in_the_table() {
    let rows = table("Errors");
    let known = |text: &str| {
        rows.iter().any(|row| {
            let mut rest = text;
            row[0].trim_matches('`').split('…').all(|part| {
                let found = rest.find(part);
                rest = found.map_or("", |at| &rest[at + part.len()..]);
                found.is_some()
            })
        })
    };
    let long = "a".repeat(4096);
    for (key, value) in [
        ("imagee", "a"),
        (long.as_str(), "a"),
        ("prefetch", "x"),
        ("pullPolicy", "x"),
        ("path", "/x"),
        ("insecure", "x"),
        ("writable", "x"),
        ("writableSize", "x"),
        ("writableSize", "1"),
    ] {
        let mut wanted = BTreeMap::from([("image".to_owned(), "app".to_owned())]);
        wanted.insert(key.to_owned(), value.to_owned());
        let err = Attributes::parse(&wanted).unwrap_err().to_string();
        assert!(known(&err), "{err}");
    }
    let err = Attributes::parse(&BTreeMap::new()).unwrap_err().to_string();
    assert!(known(&err), "{err}");
}
