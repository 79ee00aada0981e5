//! `docs/METRICS.md` and the program know the same metrics.

use std::collections::BTreeMap;

use clip_csi::metrics::Metrics;

/// What a row of the table, or a metric, says: type and labels.
type Described = (String, Vec<String>);

fn documented() -> BTreeMap<String, Described> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/METRICS.md");
    let text = std::fs::read_to_string(path).unwrap();
    let rows = text.lines().filter(|it| it.starts_with("| `clip_csi_"));
    rows.map(|row| {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let labels = cells[3]
            .split(", ")
            .filter(|it| *it != "–")
            .map(str::to_owned)
            .collect();
        (
            cells[1].trim_matches('`').to_owned(),
            (cells[2].to_owned(), labels),
        )
    })
    .collect()
}

/// Every metric of the program, whether or not it has a series yet.
fn implemented() -> BTreeMap<String, Described> {
    let metrics = Metrics::new();
    // A family without a series is not gathered: give each one.
    for counters in [
        &metrics.fuse_requests,
        &metrics.registry_requests,
        &metrics.csi_requests,
    ] {
        counters.with_label_values(&["x", "x"]);
    }
    metrics.csi_request_duration.with_label_values(&["x"]);
    let families = metrics.registry().gather();
    families
        .iter()
        .map(|family| {
            let kind = format!("{:?}", family.get_field_type()).to_lowercase();
            let mut labels: Vec<String> = family.get_metric()[0]
                .get_label()
                .iter()
                .map(|it| it.name().to_owned())
                .collect();
            labels.sort();
            (family.name().to_owned(), (kind, labels))
        })
        .collect()
}

#[test]
fn the_table_and_the_program_agree() {
    let sorted = |(name, (kind, mut labels)): (String, Described)| {
        labels.sort();
        (name, (kind, labels))
    };
    let documented: BTreeMap<_, _> = documented().into_iter().map(sorted).collect();
    assert_eq!(documented, implemented());
}

#[test]
fn names_carry_their_unit() {
    for (name, (kind, _)) in implemented() {
        let fits = match kind.as_str() {
            "counter" => name.ends_with("_total") || name == "clip_csi_build_info",
            "histogram" => name.ends_with("_seconds"),
            "gauge" => !name.ends_with("_total"),
            other => panic!("{name} has type {other}"),
        };
        assert!(fits, "{kind} {name}");
    }
}
