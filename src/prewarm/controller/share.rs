//! Decides which share of the nodes may begin.

use k8s_openapi::jiff::SignedDuration;

use super::plan::NodeView;
use crate::{api::WarmupPhase, prewarm::rollout};

/// Seconds in which no node has told of anything after which more of them are admitted.
///
/// A node whose agent is gone would otherwise keep its place for ever. Nodes that are at it tell of their progress more
/// often, in clusters of up to 3000 nodes.
pub(super) const QUIET_SECONDS: i64 = 60;

/// Whether a node in this phase takes one of the places.
pub(super) fn is_open(phase: WarmupPhase) -> bool {
    matches!(phase, WarmupPhase::Pending | WarmupPhase::Warming)
}

/// `limit`, once more for each time that nothing was heard for long enough.
pub(super) fn widened(limit: usize, quiet: SignedDuration) -> usize {
    let times = quiet.as_secs().max(0) / QUIET_SECONDS;
    let times = usize::try_from(times).unwrap_or(usize::MAX);
    limit.saturating_mul(times.saturating_add(1))
}

/// The greatest share of the nodes of which no more than `limit` are open; but one of them at least.
pub(super) fn permille(
    nodes: &[NodeView<'_>],
    limit: usize,
    is_open: impl Fn(&NodeView<'_>) -> bool,
) -> i32 {
    let mut open: Vec<_> = nodes
        .iter()
        .filter(|it| is_open(it))
        .map(|it| it.slot)
        .collect();
    open.sort_unstable();
    match (open.get(limit), open.first()) {
        (Some(beyond), Some(first)) => (*beyond).max(first + 1),
        (_, _) => rollout::ALL,
    }
}

/// The share that follows `before`: as [`permille`], but while more than half of the places are taken it does not grow,
/// because each time that it does costs a message to each node.
pub(super) fn next(
    before: i32,
    nodes: &[NodeView<'_>],
    limit: usize,
    is_open: impl Fn(&NodeView<'_>) -> bool,
) -> i32 {
    let admitted = nodes.iter().filter(|it| it.slot < before);
    let n_open = admitted.filter(|it| is_open(it)).count();
    let share = permille(nodes, limit, is_open);
    match limit / 2 < n_open {
        true => share.min(before),
        false => share,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node(slot: i32, phase: WarmupPhase) -> NodeView<'static> {
        NodeView {
            name: "n",
            slot,
            phase,
            reason: "",
            message: "",
        }
    }

    #[test]
    fn so_many_begin_and_one_more_for_each_that_has_ended() {
        use WarmupPhase::{Failed, Pending, Ready, Warming};
        for (nodes, limit, expected) in [
            (vec![], 1, 1000),
            (vec![(10, Pending)], 1, 1000),
            (vec![(10, Pending), (20, Pending)], 1, 20),
            (vec![(10, Warming), (20, Pending)], 1, 20),
            (vec![(10, Ready), (20, Pending), (30, Pending)], 1, 30),
            (vec![(10, Failed), (20, Pending), (30, Pending)], 1, 30),
            (vec![(10, Ready), (20, Pending), (30, Pending)], 2, 1000),
            // Of one place in the order, all begin or none; but somebody does.
            (vec![(10, Pending), (10, Pending), (30, Pending)], 1, 11),
            (vec![(10, Pending), (20, Pending), (20, Pending)], 2, 20),
        ] {
            let views: Vec<_> = nodes
                .iter()
                .map(|(slot, phase)| node(*slot, *phase))
                .collect();
            let permille = permille(&views, limit, |it| is_open(it.phase));
            assert_eq!(permille, expected, "{nodes:?} {limit}");
        }
    }

    #[test]
    fn the_share_grows_when_half_of_the_places_are_free() {
        use WarmupPhase::{Pending, Ready, Warming};
        let nodes_of = |phases: [WarmupPhase; 4]| {
            let slots = [
                (10, phases[0]),
                (20, phases[1]),
                (30, phases[2]),
                (40, phases[3]),
            ];
            let waiting = (5..20).map(|it| (10 * it, Pending));
            let all = slots.into_iter().chain(waiting);
            all.map(|(slot, phase)| node(slot, phase))
                .collect::<Vec<_>>()
        };
        for (phases, before, expected) in [
            ([Warming, Pending, Warming, Warming], 50, 50),
            ([Ready, Pending, Warming, Warming], 50, 50),
            ([Ready, Pending, Ready, Warming], 50, 70),
            ([Ready, Ready, Ready, Ready], 50, 90),
            // What was admitted when there were fewer nodes is taken back.
            ([Warming, Pending, Warming, Warming], 80, 50),
            ([Warming, Pending, Warming, Warming], 0, 50),
        ] {
            let nodes = nodes_of(phases);
            let found = next(before, &nodes, 4, |it| is_open(it.phase));
            assert_eq!(found, expected, "{phases:?} {before}");
            // Of one place, each end counts.
            let found = next(20, &nodes, 1, |it| is_open(it.phase));
            assert_eq!(found == 20, phases[0] != Ready, "{phases:?}");
        }
    }

    proptest! {
        #[test]
        fn a_rollout_admits_everybody_in_the_end_and_never_too_many(
            slots in proptest::collection::vec(0..1000i32, 1..60),
            limit in 1usize..10,
        ) {
            let mut nodes: Vec<_> = slots.iter().map(|it| node(*it, WarmupPhase::Pending)).collect();
            for _ in 0..=nodes.len() {
                let share = permille(&nodes, limit, |it| is_open(it.phase));
                let admitted: Vec<_> = nodes.iter().enumerate()
                    .filter(|(_, it)| it.slot < share && is_open(it.phase))
                    .map(|(at, it)| (at, it.slot))
                    .collect();
                if admitted.is_empty() {
                    break;
                }
                let same_place = admitted.iter().all(|it| it.1 == admitted[0].1);
                prop_assert!(admitted.len() <= limit || same_place, "{} of {limit}", admitted.len());
                nodes[admitted[0].0].phase = WarmupPhase::Ready;
            }
            prop_assert!(nodes.iter().all(|it| it.phase == WarmupPhase::Ready));
        }
    }

    #[test]
    fn silence_lets_more_of_them_begin() {
        for (seconds, expected) in [(-5, 3), (0, 3), (59, 3), (60, 6), (125, 9)] {
            assert_eq!(widened(3, SignedDuration::from_secs(seconds)), expected);
        }
    }
}
