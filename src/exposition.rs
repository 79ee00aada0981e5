//! Joins the metrics of the roles of a node to one page (Prometheus text format 0.0.4).
//!
//! Series that several roles have are added: each role counts what it does itself, and has zeros for
//! the rest. What is of one process alone has a label that says so.

use std::collections::{BTreeMap, HashMap};

/// One metric: its HELP and TYPE lines, and its series in order.
#[derive(Default)]
struct Family<'a> {
    about: Vec<&'a str>,
    /// In the order in which they came.
    series: Vec<(&'a str, f64)>,
    places: HashMap<&'a str, usize>,
}

/// Joins pages; lines that are none of the format are left out.
pub fn join(pages: &[String]) -> String {
    let mut families: BTreeMap<&str, Family<'_>> = BTreeMap::new();
    for page in pages {
        let mut name = "";
        for line in page.lines() {
            if let Some(about) = line
                .strip_prefix("# HELP ")
                .or(line.strip_prefix("# TYPE "))
            {
                name = about.split(' ').next().unwrap_or("");
                let family = families.entry(name).or_default();
                if !family.about.contains(&line) {
                    family.about.push(line);
                }
            } else if let Some((series, value)) = line.rsplit_once(' ')
                && let Ok(value) = value.parse::<f64>()
            {
                let family = families.entry(name).or_default();
                let next = family.series.len();
                let at = *family.places.entry(series).or_insert(next);
                match family.series.get_mut(at) {
                    Some((_, sum)) => *sum += value,
                    None => family.series.push((series, value)),
                }
            }
        }
    }
    let mut joined = String::new();
    for family in families.values() {
        for line in &family.about {
            joined.push_str(line);
            joined.push('\n');
        }
        for (series, value) in &family.series {
            joined.push_str(&format!("{series} {value}\n"));
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Metrics, Role};

    #[test]
    fn series_are_added_and_those_of_a_process_stand_beside_each_other() {
        let (node, agent) = (Metrics::of(Role::Node), Metrics::of(Role::Agent));
        node.mounts.set(2);
        agent
            .tier_reads
            .with_label_values(&["disk", "hit"])
            .inc_by(3);
        node.tier_reads
            .with_label_values(&["disk", "hit"])
            .inc_by(4);
        agent.index_build_duration.observe(0.02);
        let pages = [node.encode().unwrap(), agent.encode().unwrap()];
        let joined = join(&pages);
        let has = |line: &str| joined.lines().filter(|it| *it == line).count();
        assert_eq!(has("clip_csi_mounts 2"), 1);
        assert_eq!(
            has("clip_csi_tier_reads_total{outcome=\"hit\",tier=\"disk\"} 7"),
            1
        );
        assert_eq!(has("clip_csi_index_build_duration_seconds_count 1"), 1);
        assert_eq!(has("# TYPE clip_csi_mounts gauge"), 1);
        for role in ["node", "agent"] {
            let series = format!("clip_csi_process_resident_memory_bytes{{role=\"{role}\"}} ");
            assert_eq!(
                joined.lines().filter(|it| it.starts_with(&series)).count(),
                1
            );
        }
        assert_eq!(join(std::slice::from_ref(&joined)), joined);
    }
}
