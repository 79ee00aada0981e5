//! What a watch has told of, by key, with what a new listing does not name any more taken out.

use std::{collections::BTreeMap, ops::Bound};

/// Facts by key.
#[derive(Debug)]
pub(in crate::prewarm) struct Table<V> {
    rows: BTreeMap<String, Row<V>>,
    listing: u64,
    is_complete: bool,
}

#[derive(Debug)]
struct Row<V> {
    facts: V,
    /// The listing that named it last.
    listing: u64,
}

impl<V> Table<V> {
    pub(in crate::prewarm) fn new() -> Self {
        Self {
            rows: BTreeMap::new(),
            listing: 0,
            is_complete: false,
        }
    }

    /// A listing begins.
    pub(in crate::prewarm) fn begin(&mut self) {
        self.listing += 1;
    }

    /// A listing has ended: returns the keys of what has gone.
    pub(in crate::prewarm) fn end(&mut self) -> Vec<String> {
        self.is_complete = true;
        let gone = self
            .rows
            .extract_if(.., |_, row| row.listing != self.listing);
        gone.map(|(key, _)| key).collect()
    }

    /// Whether a listing has ended at all: before, nobody knows what there is.
    pub(in crate::prewarm) fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// Notes facts; returns those before.
    pub(in crate::prewarm) fn set(&mut self, key: String, facts: V) -> Option<V> {
        let listing = self.listing;
        let before = self.rows.insert(key, Row { facts, listing });
        before.map(|it| it.facts)
    }

    /// Notes that it is there still, as it was; returns it.
    pub(in crate::prewarm) fn see(&mut self, key: &str) -> Option<&mut V> {
        let row = self.rows.get_mut(key)?;
        row.listing = self.listing;
        Some(&mut row.facts)
    }

    pub(in crate::prewarm) fn get(&self, key: &str) -> Option<&V> {
        self.rows.get(key).map(|it| &it.facts)
    }

    pub(in crate::prewarm) fn get_mut(&mut self, key: &str) -> Option<&mut V> {
        self.rows.get_mut(key).map(|it| &mut it.facts)
    }

    pub(in crate::prewarm) fn remove(&mut self, key: &str) -> Option<V> {
        self.rows.remove(key).map(|it| it.facts)
    }

    pub(in crate::prewarm) fn iter(&self) -> impl Iterator<Item = (&String, &V)> {
        self.rows.iter().map(|(key, row)| (key, &row.facts))
    }

    /// Those whose keys begin with `prefix`.
    pub(in crate::prewarm) fn of_prefix<'a>(
        &'a self,
        prefix: &'a str,
    ) -> impl Iterator<Item = &'a V> {
        let from = (Bound::Included(prefix), Bound::Unbounded);
        let rows = self.rows.range::<str, _>(from);
        let rows = rows.take_while(move |(key, _)| key.starts_with(prefix));
        rows.map(|(_, row)| &row.facts)
    }

    pub(in crate::prewarm) fn for_each(&mut self, mut act: impl FnMut(&str, &mut V)) {
        for (key, row) in &mut self.rows {
            act(key, &mut row.facts);
        }
    }

    pub(in crate::prewarm) fn len(&self) -> usize {
        self.rows.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_new_listing_does_not_name_has_gone() {
        let mut table = Table::new();
        assert!(!table.is_complete());
        table.begin();
        for key in ["a", "b", "c"] {
            assert_eq!(table.set(key.to_owned(), 1), None);
        }
        assert_eq!(table.end(), [""; 0]);
        assert!(table.is_complete());
        table.begin();
        assert_eq!(table.set("a".to_owned(), 2), Some(1));
        assert_eq!(table.see("c"), Some(&mut 1));
        assert_eq!(table.end(), ["b"]);
        assert_eq!(table.get("a"), Some(&2));
        assert_eq!((table.get("b"), table.len()), (None, 2));
    }
}
