//! Remembers which volumes were made, so that a name is not used for two.
//!
//! A volume is nothing but its attributes, so nothing has to be kept of it: its id follows from its name and
//! attributes. What is kept here, bounded and for as long as the process lives, lets a call that
//! contradicts an earlier one be refused, as the specification wants (CSI spec v1.12, CreateVolume,
//! "Volume already exists but is incompatible"). After a restart such a call makes another volume, which
//! harms nobody: Kubernetes asks for each name with one set of parameters.

use std::collections::{HashMap, VecDeque};

use super::controller::Wanted;

/// How many volumes are remembered; the oldest is forgotten first. Each is at most some KiB.
const MAX_REMEMBERED: usize = 1024;

/// Volumes by name.
#[derive(Debug, Default)]
pub(super) struct Made {
    by_name: HashMap<String, Wanted>,
    /// Names in the order in which they came. One that was forgotten meanwhile may be among them.
    order: VecDeque<String>,
}

impl Made {
    /// The volume of this name, made now or before; `None` if what was made before does not fit.
    pub(super) fn make(&mut self, wanted: Wanted) -> Option<Wanted> {
        if let Some(before) = self.by_name.get(&wanted.name) {
            let fits = before.attributes == wanted.attributes
                && wanted.capacity.holds(before.capacity.granted());
            return fits.then(|| before.clone());
        }
        while MAX_REMEMBERED <= self.order.len() {
            if let Some(oldest) = self.order.pop_front() {
                self.by_name.remove(&oldest);
            }
        }
        self.order.push_back(wanted.name.clone());
        self.by_name.insert(wanted.name.clone(), wanted.clone());
        Some(wanted)
    }

    /// Forgets the volume of this id, if it is known.
    pub(super) fn forget(&mut self, id: &str) {
        self.by_name.retain(|_, it| it.id() != id);
        let by_name = &self.by_name;
        self.order.retain(|it| by_name.contains_key(it));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::csi::controller::Capacity;

    fn wanted(name: &str, image: &str, bytes: i64) -> Wanted {
        Wanted {
            name: name.to_owned(),
            attributes: BTreeMap::from([("image".to_owned(), image.to_owned())]),
            capacity: Capacity {
                required_bytes: bytes,
                limit_bytes: 0,
            },
        }
    }

    #[test]
    fn a_name_is_one_volume_until_it_is_deleted() {
        let mut made = Made::default();
        let first = made.make(wanted("v", "a", 5)).unwrap();
        assert_eq!(made.make(wanted("v", "a", 5)), Some(first.clone()));
        // What is there is large enough for less, and too small for more.
        assert_eq!(made.make(wanted("v", "a", 4)), Some(first.clone()));
        assert_eq!(made.make(wanted("v", "a", 6)), None);
        assert_eq!(made.make(wanted("v", "b", 5)), None);
        made.forget(&first.id());
        assert!(made.make(wanted("v", "b", 6)).is_some());
        assert_eq!((made.by_name.len(), made.order.len()), (1, 1));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut made = Made::default();
        for number in 0..=MAX_REMEMBERED {
            made.make(wanted(&number.to_string(), "a", 0)).unwrap();
        }
        assert_eq!(made.by_name.len(), MAX_REMEMBERED);
        assert_eq!(made.order.len(), MAX_REMEMBERED);
        // The oldest is forgotten, the second is not.
        assert!(made.make(wanted("1", "b", 0)).is_none());
        assert!(made.make(wanted("0", "b", 0)).is_some());
    }
}
