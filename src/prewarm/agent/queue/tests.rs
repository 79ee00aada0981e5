use kube::core::ObjectMeta;

use super::*;
use crate::{api::Content, prewarm::rollout::slot};

const NODE: &str = "n1";

/// A queue, and its time.
struct Case {
    queue: Queue,
    now: Instant,
}

impl Case {
    fn new(max_running: usize) -> Self {
        let mut queue = Queue::new(NODE, max_running);
        queue.see(Seen::Listing);
        queue.see(Seen::Listed);
        let now = Instant::now();
        queue.was_told(now);
        Self {
            queue,
            now: now + UNCOUNTED,
        }
    }

    fn see(&mut self, uid: &str, generation: i64, revision: &str, permille: i32) {
        let rollout = rollout(uid, generation, revision, permille);
        self.queue.see(Seen::Is(Box::new(rollout)));
    }

    fn next(&mut self) -> Vec<String> {
        let todo = self.queue.next(self.now, 8);
        todo.into_iter()
            .map(|it| match it {
                Do::Read { uid, .. } => format!("read {uid}"),
                Do::Start(order) => format!("start {} {}", order.uid, order.revision),
            })
            .collect()
    }

    fn read(&mut self, uid: &str, generation: i64, revision: &str, priority: i32) {
        let order = order(uid, generation, revision, priority);
        self.queue
            .read(uid, Ok(Some(order)), self.now + Duration::from_secs(10));
    }

    fn ready(&mut self, uid: &str, revision: &str) {
        self.queue
            .ended(uid, revision, End::Ready { bytes: 9 }, self.now);
    }

    fn fail(&mut self, uid: &str, revision: &str, is_transient: bool) {
        let end = End::Failed {
            reason: "NoSpace",
            message: "free some".to_owned(),
            is_transient,
        };
        self.queue.ended(uid, revision, end, self.now);
    }

    fn phases(&self) -> Vec<(String, WarmupPhase)> {
        let told = self.queue.told();
        told.into_iter().map(|it| (it.uid, it.phase)).collect()
    }
}

fn rollout(uid: &str, generation: i64, revision: &str, permille: i32) -> ImageRollout {
    ImageRollout {
        metadata: ObjectMeta {
            name: Some(uid.to_owned()),
            ..ObjectMeta::default()
        },
        spec: ImageRolloutSpec {
            namespace: "team".to_owned(),
            name: format!("name-{uid}"),
            generation,
            revision: revision.to_owned(),
            admitted_permille: permille,
            nodes: 5,
        },
    }
}

fn order(uid: &str, generation: i64, revision: &str, priority: i32) -> Order {
    Order {
        uid: uid.to_owned(),
        generation,
        revision: revision.to_owned(),
        priority,
        content: Content::All,
        images: Vec::new(),
        bytes_per_second: None,
        max_bytes: None,
    }
}

#[test]
fn an_object_is_read_when_it_is_the_nodes_turn_and_once() {
    let mut case = Case::new(1);
    let turn = slot(NODE, "a");
    case.see("a", 1, "r1", turn);
    assert_eq!(case.next(), [""; 0]);
    case.see("a", 1, "r1", turn + 1);
    assert_eq!(case.next(), ["read a"]);
    case.read("a", 1, "r1", 0);
    assert_eq!(case.phases(), [("a".to_owned(), WarmupPhase::Pending)]);
    assert_eq!(case.queue.news(), News::Begun);
    assert_eq!(case.next(), ["start a r1"]);
    assert_eq!(case.next(), [""; 0]);
    // More nodes are admitted: nothing new for this one.
    case.see("a", 1, "r1", 1000);
    assert_eq!(case.next(), [""; 0]);
    case.ready("a", "r1");
    assert_eq!(case.phases(), [("a".to_owned(), WarmupPhase::Ready)]);
    assert_eq!(case.queue.news(), News::Step);
    case.now += Duration::from_secs(100_000);
    assert_eq!(case.next(), [""; 0]);
    // Another digest: again.
    case.see("a", 1, "r2", 1000);
    assert_eq!(case.next(), ["read a"]);
    case.read("a", 1, "r2", 0);
    assert_eq!(case.next(), ["start a r2"]);
}

#[test]
fn the_greatest_priority_goes_first_and_no_more_run_than_may() {
    let mut case = Case::new(2);
    for (uid, priority) in [("a", 1), ("b", 9), ("c", 5)] {
        case.see(uid, 1, "r", 1000);
        case.read(uid, 1, "r", priority);
    }
    assert_eq!(case.next(), ["start b r", "start c r"]);
    assert_eq!(case.next(), [""; 0]);
    case.ready("c", "r");
    assert_eq!(case.next(), ["start a r"]);
}

#[test]
fn work_stops_when_its_object_goes_is_suspended_or_wants_something_else() {
    let start = || {
        let mut case = Case::new(1);
        case.see("a", 1, "r1", 1000);
        case.read("a", 1, "r1", 0);
        assert_eq!(case.next(), ["start a r1"]);
        assert_eq!(case.queue.take_stopped(), [""; 0]);
        case
    };
    let mut gone = start();
    let rollout = rollout("a", 1, "r1", 1000);
    gone.queue.see(Seen::Gone(Box::new(rollout)));
    assert!(!gone.queue.has("a"));
    assert_eq!(gone.phases(), []);

    let mut suspended = start();
    suspended.see("a", 2, "r1", 0);
    assert_eq!(suspended.queue.take_stopped(), ["a"]);
    assert_eq!(suspended.phases(), []);
    assert_eq!(suspended.next(), [""; 0]);

    let mut other = start();
    other.see("a", 1, "r2", 1000);
    assert_eq!(other.queue.take_stopped(), ["a"]);
    // What ends too late is not believed.
    other.ready("a", "r1");
    assert_eq!(other.next(), ["read a"]);

    let mut unwanted = start();
    unwanted.see("a", 2, "r1", 1000);
    assert_eq!(unwanted.queue.take_stopped(), [""; 0]);
    assert_eq!(unwanted.next(), ["read a"]);
    unwanted.queue.read("a", Ok(None), unwanted.now);
    assert_eq!(unwanted.queue.take_stopped(), ["a"]);

    // Fewer may begin: those that have begun go on.
    let mut shrunk = start();
    shrunk.see("a", 1, "r1", 1);
    assert_eq!(shrunk.queue.take_stopped(), [""; 0]);

    // It was missed while the watch was away.
    let mut missed = start();
    missed.queue.see(Seen::Listing);
    assert!(missed.queue.has("a"));
    missed.queue.see(Seen::Listed);
    assert!(!missed.queue.has("a"));
}

#[test]
fn a_changed_spec_that_means_the_same_here_goes_on() {
    let mut case = Case::new(1);
    case.see("a", 1, "r1", 1000);
    case.read("a", 1, "r1", 0);
    assert_eq!(case.next(), ["start a r1"]);
    case.see("a", 2, "r1", 1000);
    assert_eq!(case.next(), ["read a"]);
    case.read("a", 2, "r1", 50);
    assert_eq!((case.queue.take_stopped().len(), case.next().len()), (0, 0));
    case.ready("a", "r1");
    assert_eq!(case.phases(), [("a".to_owned(), WarmupPhase::Ready)]);
}

#[test]
fn a_failure_is_told_of_until_it_is_made_good_and_tried_again_ever_more_seldom() {
    let mut case = Case::new(1);
    case.see("a", 1, "r", 1000);
    case.read("a", 1, "r", 0);
    for (is_transient, wait) in [
        (true, 30),
        (true, 60),
        (false, 1200),
        (true, 240),
        (true, 480),
        (true, 960),
        (true, 1800),
    ] {
        assert_eq!(case.next(), ["start a r"], "{wait}");
        if wait != 30 {
            // It is ill while it is tried again, too: an object would otherwise be well with each attempt.
            assert_eq!(case.phases(), [("a".to_owned(), WarmupPhase::Failed)]);
        }
        case.fail("a", "r", is_transient);
        assert_eq!(case.phases(), [("a".to_owned(), WarmupPhase::Failed)]);
        case.now += Duration::from_secs(wait - 1);
        assert_eq!(case.next(), [""; 0], "{wait}");
        case.now += Duration::from_secs(1);
    }
    assert_eq!(case.next(), ["start a r"]);
    case.ready("a", "r");
    let told = &case.queue.told()[0];
    assert_eq!(
        (told.phase, told.reason.as_deref()),
        (WarmupPhase::Ready, None)
    );
    // A new spec is tried at once.
    let mut case = Case::new(1);
    case.see("a", 1, "r", 1000);
    case.read("a", 1, "r", 0);
    case.next();
    case.fail("a", "r", false);
    case.see("a", 2, "r", 1000);
    assert_eq!(case.next(), ["read a"]);
    case.read("a", 2, "r", 0);
    assert_eq!(case.phases(), [("a".to_owned(), WarmupPhase::Failed)]);
    assert_eq!(case.next(), ["start a r"]);
}

#[test]
fn what_does_not_mean_this_node_is_read_again_when_one_of_them_has_changed() {
    let mut case = Case::new(1);
    case.see("a", 1, "r", 999);
    assert_eq!(case.next(), ["read a"]);
    case.queue.read("a", Ok(None), case.now);
    assert_eq!(case.queue.news(), News::Step);
    case.see("a", 1, "r", 1000);
    assert_eq!(case.next(), [""; 0]);
    case.see("a", 2, "r", 1000);
    assert_eq!(case.next(), ["read a"]);
    case.queue.read("a", Ok(None), case.now);
    assert_eq!(case.next(), [""; 0]);
    case.queue.read_anew();
    assert_eq!(case.next(), ["read a"]);
}

#[test]
fn what_cannot_be_read_or_is_not_what_was_announced_is_read_again_later() {
    let mut case = Case::new(1);
    case.see("a", 1, "r", 1000);
    let retry_at = case.now + Duration::from_secs(10);
    case.queue.read("a", Err("away".to_owned()), retry_at);
    assert_eq!(case.next(), [""; 0]);
    case.now = retry_at;
    assert_eq!(case.next(), ["read a"]);
    case.read("a", 2, "r", 0);
    assert_eq!(case.next(), [""; 0]);
    case.see("a", 2, "r", 1000);
    assert_eq!(case.next(), ["read a"]);
}

#[test]
fn what_was_told_before_the_agent_restarted_still_holds() {
    let told = |uid: &str, phase| Warmup {
        uid: uid.to_owned(),
        revision: "r".to_owned(),
        phase,
        ..Warmup::default()
    };
    let mut queue = Queue::new(NODE, 4);
    queue.know(vec![
        told("gone", WarmupPhase::Ready),
        told("ready", WarmupPhase::Ready),
        told("warming", WarmupPhase::Warming),
    ]);
    queue.see(Seen::Listing);
    assert_eq!(queue.told().len(), 3);
    for uid in ["ready", "warming"] {
        queue.see(Seen::Is(Box::new(rollout(uid, 1, "r", 1000))));
    }
    queue.see(Seen::Listed);
    let mut case = Case {
        queue,
        now: Instant::now(),
    };
    let expected = [
        ("ready", WarmupPhase::Ready),
        ("warming", WarmupPhase::Pending),
    ];
    assert_eq!(
        case.phases(),
        expected.map(|(uid, phase)| (uid.to_owned(), phase))
    );
    assert_eq!(case.queue.news(), News::Step);
    case.queue.was_told(case.now);
    case.now += UNCOUNTED;
    assert_eq!(case.next(), ["read warming"]);
}

#[test]
fn nothing_is_read_or_begun_before_the_controller_counts_the_node() {
    let mut queue = Queue::new(NODE, 1);
    queue.see(Seen::Listing);
    for uid in ["a", "b"] {
        queue.see(Seen::Is(Box::new(rollout(uid, 1, "r", 1000))));
    }
    queue.see(Seen::Listed);
    let now = Instant::now();
    let mut case = Case { queue, now };
    // As long as its object cannot be written nobody knows of it.
    case.now += Duration::from_secs(600);
    assert_eq!(case.next(), [""; 0]);
    case.queue.was_told(case.now);
    case.now += Duration::from_secs(4);
    assert_eq!(case.next(), [""; 0]);
    // It is told of again, and the controller has found that there are many: this one is not among the first.
    case.queue.was_told(case.now);
    case.see("b", 1, "r", 0);
    case.now += Duration::from_secs(1);
    assert_eq!(case.next(), ["read a"]);
    // What comes later waits no more.
    case.see("c", 1, "r", 1000);
    assert_eq!(case.next(), ["read a", "read c"]);
}

#[test]
fn an_object_has_room_for_so_many_and_what_is_not_well_comes_first() {
    let mut case = Case::new(1);
    for number in 0..MAX_WARMUPS + 10 {
        let uid = format!("u{number:04}");
        case.see(&uid, 1, "r", 1000);
        case.read(&uid, 1, "r", 0);
    }
    let last = format!("u{:04}", MAX_WARMUPS + 9);
    case.queue.items.get_mut(&last).unwrap().running = Some((1, "r".to_owned()));
    case.fail(&last, "r", true);
    let told = case.queue.told();
    assert_eq!(told.len(), MAX_WARMUPS);
    assert!(told.iter().any(|it| it.uid == last));
}
