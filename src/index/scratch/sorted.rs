//! A map from bytes to a number, in the order of the keys, in pages: a B+ tree without removal.
//!
//! ```text
//! page    leaf: 1, or 0 u8 | unused u8 | cells u16 | first byte of the cells u16 | unused u16
//!         | leaf: the next one, else the child of what is below all keys u32 | places of cells, in order, u16 each
//!         … free … | cells
//! cell    length of the key u16 | value, or child of the key and what follows it u32 | key
//! ```
//!
//! Neighbours are in one page: who goes through a tar in its order, and then through the directories of
//! the tree, finds almost every page that it needs where it was.

use std::io;

use super::{
    Scratch,
    paged::{PAGE_BYTES, Page, Paged},
};

/// Longest key: a page has room for fifteen, so that each half of one that is split has room for more.
pub(in crate::index) const MAX_KEY_BYTES: usize = 260;

/// Where the cells of an empty page begin: at its end.
const PAGE_END: u16 = 4096;
const _: () = assert!(PAGE_END as usize == PAGE_BYTES);

const HEADER_BYTES: usize = 12;
const PLACE_BYTES: usize = 2;
const CELL_HEADER_BYTES: usize = 6;

/// What can go wrong with a page of this program's own making: nothing.
fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a page of a map is damaged")
}

/// Maps keys to numbers.
#[derive(Debug)]
pub(in crate::index) struct SortedMap<S> {
    pages: Paged<S>,
    n_pages: u32,
    root: u32,
}

/// What became of a new key.
enum Placed {
    /// It was there, with this value.
    Found(u32),
    New,
    /// It is there now, and what begins with this key is in a new page.
    Split(Vec<u8>, u32),
}

/// What is done with a key that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    Replace,
    Keep,
}

impl<S: Scratch> SortedMap<S> {
    /// An empty one in `file`, which is empty, too; it holds `n_held` pages at most.
    pub(in crate::index) fn new(file: S, n_held: usize) -> Self {
        Self {
            pages: Paged::new(file, n_held),
            n_pages: 0,
            root: 0,
        }
    }

    /// Another scratch file of the same kind.
    pub(in crate::index) fn another(&self) -> S {
        self.pages.another()
    }

    /// Whether it has no key.
    pub(in crate::index) fn is_empty(&self) -> bool {
        self.n_pages == 0
    }

    /// The value of `key`.
    ///
    /// # Errors
    /// Those of the file.
    pub(in crate::index) fn get(&mut self, key: &[u8]) -> io::Result<Option<u32>> {
        if self.is_empty() {
            return Ok(None);
        }
        let mut number = self.root;
        loop {
            let page = View(self.pages.page(number.into())?);
            let found = page.search(key)?;
            match (page.is_leaf(), found) {
                (true, Ok(at)) => return Ok(Some(page.cell(at)?.1)),
                (true, Err(_)) => return Ok(None),
                (false, found) => number = page.child(found)?,
            }
        }
    }

    /// Gives `key` a value; returns the one that it had.
    ///
    /// # Errors
    /// Those of the file.
    pub(in crate::index) fn insert(&mut self, key: &[u8], value: u32) -> io::Result<Option<u32>> {
        self.place(key, value, Known::Replace)
    }

    /// The keys from `key` on, in their order.
    ///
    /// # Errors
    /// Those of the file.
    pub(in crate::index) fn cursor(&mut self, key: &[u8]) -> io::Result<Cursor> {
        let mut cursor = Cursor {
            page: Box::new([0; PAGE_BYTES]),
            next: 0,
        };
        if self.is_empty() {
            return Ok(cursor);
        }
        let mut number = self.root;
        loop {
            let page = View(self.pages.page(number.into())?);
            let found = page.search(key)?;
            if page.is_leaf() {
                cursor.page.copy_from_slice(page.0);
                cursor.next = found.unwrap_or_else(|at| at);
                return Ok(cursor);
            }
            number = page.child(found)?;
        }
    }

    fn place(&mut self, key: &[u8], value: u32, known: Known) -> io::Result<Option<u32>> {
        if MAX_KEY_BYTES < key.len() {
            return Err(io::Error::other("a key is too long"));
        }
        if self.is_empty() {
            self.root = self.add_page(true, 0, &[])?;
        }
        match self.place_below(self.root, key, value, known)? {
            Placed::Found(old) => Ok(Some(old)),
            Placed::New => Ok(None),
            Placed::Split(first, page) => {
                self.root = self.add_page(false, self.root, &[(first, page)])?;
                Ok(None)
            }
        }
    }

    /// Places a key in the page `number` or below. As deep as the tree: with fifteen keys in a page
    /// and 2³² pages at most, nine calls.
    fn place_below(
        &mut self,
        number: u32,
        key: &[u8],
        value: u32,
        known: Known,
    ) -> io::Result<Placed> {
        let page = View(self.pages.page(number.into())?);
        let found = page.search(key)?;
        if page.is_leaf() {
            return match found {
                Ok(at) => {
                    let old = page.cell(at)?.1;
                    if known == Known::Replace && old != value {
                        Edit(self.pages.page_mut(number.into())?).set_value(at, value)?;
                    }
                    Ok(Placed::Found(old))
                }
                Err(at) => self.add_cell(number, at, key, value),
            };
        }
        let child = page.child(found)?;
        match self.place_below(child, key, value, known)? {
            // The new page's keys are all above those of the child.
            Placed::Split(first, new) => {
                let at = found.map_or_else(|at| at, |at| at + 1);
                self.add_cell(number, at, &first, new)
            }
            placed => Ok(placed),
        }
    }

    /// Puts a cell at place `at` of a page, which is split if it is full.
    fn add_cell(&mut self, number: u32, at: usize, key: &[u8], value: u32) -> io::Result<Placed> {
        if Edit(self.pages.page_mut(number.into())?).add(at, key, value)? {
            return Ok(Placed::New);
        }
        let old = *self.pages.page(number.into())?;
        let old = View(&old);
        let mut cells = (0..old.n_cells())
            .map(|at| old.cell(at))
            .collect::<io::Result<Vec<_>>>()?;
        cells.insert(at, (key, value));
        // What comes in order fills its pages. But only at the very end: elsewhere, keys that come
        // in the opposite order would each get a page.
        let is_last = old.is_leaf() && old.link() == 0 && at + 1 == cells.len();
        let cut = if is_last { at } else { middle(&cells) };
        let (kept, moved) = cells.split_at(cut);
        let (first, first_value) = *moved.first().ok_or_else(damaged)?;
        let moved = moved.iter().map(|(key, value)| (key.to_vec(), *value));
        let new = match old.is_leaf() {
            true => self.add_page(true, old.link(), &moved.collect::<Vec<_>>())?,
            // An inner page's first child needs no key: its key goes up.
            false => self.add_page(false, first_value, &moved.skip(1).collect::<Vec<_>>())?,
        };
        let link = if old.is_leaf() { new } else { old.link() };
        let mut page = Edit(self.pages.page_mut(number.into())?);
        page.clear(old.is_leaf(), link);
        for (at, (key, value)) in kept.iter().enumerate() {
            page.add(at, key, *value)?;
        }
        Ok(Placed::Split(first.to_vec(), new))
    }

    fn add_page(&mut self, is_leaf: bool, link: u32, cells: &[(Vec<u8>, u32)]) -> io::Result<u32> {
        let number = self.n_pages;
        self.n_pages = number.checked_add(1).ok_or_else(damaged)?;
        let mut page = Edit(self.pages.page_mut(number.into())?);
        page.clear(is_leaf, link);
        for (at, (key, value)) in cells.iter().enumerate() {
            page.add(at, key, *value)?;
        }
        Ok(number)
    }
}

/// Maps texts of any length to numbers, in no order that means anything.
#[derive(Debug)]
pub(in crate::index) struct TextMap<S>(SortedMap<S>);

impl<S> From<SortedMap<S>> for TextMap<S> {
    fn from(map: SortedMap<S>) -> Self {
        Self(map)
    }
}

impl<S: Scratch> TextMap<S> {
    /// Whether it has no text.
    pub(in crate::index) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The number of `text`.
    ///
    /// # Errors
    /// Those of the file.
    pub(in crate::index) fn get(&mut self, text: &[u8]) -> io::Result<Option<u32>> {
        let (key, len) = text_key(text);
        self.0.get(&key[..len])
    }

    /// Gives `text` a number; returns the one that it had.
    ///
    /// # Errors
    /// Those of the file.
    pub(in crate::index) fn insert(&mut self, text: &[u8], number: u32) -> io::Result<Option<u32>> {
        let (key, len) = text_key(text);
        self.0.place(&key[..len], number, Known::Replace)
    }

    /// Gives `text` a number, if it has none; returns the one that it had and has.
    ///
    /// # Errors
    /// Those of the file.
    pub(in crate::index) fn insert_new(
        &mut self,
        text: &[u8],
        number: u32,
    ) -> io::Result<Option<u32>> {
        let (key, len) = text_key(text);
        self.0.place(&key[..len], number, Known::Keep)
    }
}

/// A key for `text`: itself, or its BLAKE3 where it is longer than a key, told apart by the first byte.
fn text_key(text: &[u8]) -> ([u8; MAX_KEY_BYTES], usize) {
    let mut key = [0; MAX_KEY_BYTES];
    let digest;
    let (kind, rest) = match text.len() < MAX_KEY_BYTES {
        true => (0, text),
        false => {
            digest = blake3::hash(text);
            (1, &digest.as_bytes()[..])
        }
    };
    key[0] = kind;
    key[1..=rest.len()].copy_from_slice(rest);
    (key, 1 + rest.len())
}

/// Where cells are cut, so that either side has about half of the bytes.
fn middle(cells: &[(&[u8], u32)]) -> usize {
    let bytes_of = |cell: &(&[u8], u32)| PLACE_BYTES + CELL_HEADER_BYTES + cell.0.len();
    let half_bytes = cells.iter().map(bytes_of).sum::<usize>() / 2;
    let mut bytes = 0;
    let is_below = |cell: &&(&[u8], u32)| {
        bytes += bytes_of(cell);
        bytes <= half_bytes
    };
    cells.iter().take_while(is_below).count().max(1)
}

/// Goes through the keys of a map, which must not change meanwhile.
#[derive(Debug)]
pub(in crate::index) struct Cursor {
    /// A copy of the leaf where it is.
    page: Box<Page>,
    /// The cell that comes next.
    next: usize,
}

impl Cursor {
    /// Goes to the next key, or the first; whether there is one.
    ///
    /// # Errors
    /// Those of the file.
    pub(in crate::index) fn step<S: Scratch>(
        &mut self,
        map: &mut SortedMap<S>,
    ) -> io::Result<bool> {
        while View(&self.page).n_cells() <= self.next {
            let next = View(&self.page).link();
            if next == 0 {
                return Ok(false);
            }
            self.page.copy_from_slice(map.pages.page(next.into())?);
            self.next = 0;
        }
        self.next += 1;
        Ok(true)
    }

    /// The key that the last step went to, and its value.
    ///
    /// # Errors
    /// If there was none.
    pub(in crate::index) fn current(&self) -> io::Result<(&[u8], u32)> {
        View(&self.page).cell(self.next.checked_sub(1).ok_or_else(damaged)?)
    }
}

/// Reads a page.
#[derive(Clone, Copy)]
struct View<'a>(&'a Page);

impl<'a> View<'a> {
    fn u16(self, at: usize) -> usize {
        usize::from(u16::from_le_bytes([self.0[at], self.0[at + 1]]))
    }

    fn is_leaf(self) -> bool {
        self.0[0] == 1
    }

    fn n_cells(self) -> usize {
        self.u16(2)
    }

    /// Of a leaf the next one, or 0: the first page is never a next one. Else the first child.
    fn link(self) -> u32 {
        let [.., a, b, c, d] = *self
            .0
            .first_chunk::<HEADER_BYTES>()
            .unwrap_or(&[0; HEADER_BYTES]);
        u32::from_le_bytes([a, b, c, d])
    }

    fn cell(self, at: usize) -> io::Result<(&'a [u8], u32)> {
        let start = self.u16(HEADER_BYTES + at * PLACE_BYTES);
        let cell = self.0.get(start..).ok_or_else(damaged)?;
        let (header, rest) = cell
            .split_first_chunk::<CELL_HEADER_BYTES>()
            .ok_or_else(damaged)?;
        let [l0, l1, v0, v1, v2, v3] = *header;
        let len = usize::from(u16::from_le_bytes([l0, l1]));
        let key = rest.get(..len).ok_or_else(damaged)?;
        Ok((key, u32::from_le_bytes([v0, v1, v2, v3])))
    }

    /// Where `key` is, or else belongs.
    fn search(self, key: &[u8]) -> io::Result<Result<usize, usize>> {
        let (mut low, mut high) = (0, self.n_cells());
        while low < high {
            let middle = low + (high - low) / 2;
            match self.cell(middle)?.0.cmp(key) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Equal => return Ok(Ok(middle)),
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(Err(low))
    }

    /// The child that has a key which was searched for.
    fn child(self, found: Result<usize, usize>) -> io::Result<u32> {
        match found {
            Ok(at) => Ok(self.cell(at)?.1),
            Err(0) => Ok(self.link()),
            Err(at) => Ok(self.cell(at - 1)?.1),
        }
    }
}

/// Changes a page.
struct Edit<'a>(&'a mut Page);

impl Edit<'_> {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Writes a number that a page has room for.
    fn put_u16(&mut self, at: usize, value: usize) -> io::Result<()> {
        let value = u16::try_from(value).map_err(|_| damaged())?;
        self.put(at, &value.to_le_bytes());
        Ok(())
    }

    fn clear(&mut self, is_leaf: bool, link: u32) {
        let [l0, l1, l2, l3] = link.to_le_bytes();
        let [s0, s1] = PAGE_END.to_le_bytes();
        self.put(
            0,
            &[u8::from(is_leaf), 0, 0, 0, s0, s1, 0, 0, l0, l1, l2, l3],
        );
    }

    /// Puts a cell at place `at`; `false` if the page is full.
    fn add(&mut self, at: usize, key: &[u8], value: u32) -> io::Result<bool> {
        let (n_cells, cells_start) = (View(self.0).n_cells(), View(self.0).u16(4));
        let places_end = HEADER_BYTES + n_cells * PLACE_BYTES;
        let cell_bytes = CELL_HEADER_BYTES + key.len();
        if cells_start < places_end + PLACE_BYTES + cell_bytes {
            return Ok(false);
        }
        let start = cells_start - cell_bytes;
        self.put_u16(start, key.len())?;
        self.put(start + 2, &value.to_le_bytes());
        self.put(start + CELL_HEADER_BYTES, key);
        let place = HEADER_BYTES + at * PLACE_BYTES;
        self.0.copy_within(place..places_end, place + PLACE_BYTES);
        self.put_u16(place, start)?;
        self.put_u16(2, n_cells + 1)?;
        self.put_u16(4, start)?;
        Ok(true)
    }

    fn set_value(&mut self, at: usize, value: u32) -> io::Result<()> {
        let start = View(self.0).u16(HEADER_BYTES + at * PLACE_BYTES);
        let place = self.0.get_mut(start + 2..start + CELL_HEADER_BYTES);
        place
            .ok_or_else(damaged)?
            .copy_from_slice(&value.to_le_bytes());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn all(map: &mut SortedMap<Vec<u8>>, from: &[u8]) -> Vec<(Vec<u8>, u32)> {
        let mut cursor = map.cursor(from).unwrap();
        let mut found = Vec::new();
        while cursor.step(map).unwrap() {
            let (key, value) = cursor.current().unwrap();
            found.push((key.to_vec(), value));
        }
        found
    }

    proptest::proptest! {
        /// As a `BTreeMap` does, with keys of all lengths that share beginnings, and few pages held.
        #[test]
        fn it_is_a_map_in_order(keys: Vec<(u8, u16, u32)>, from: u16) {
            let key = |beginning: u8, end: u16| {
                let mut key = vec![beginning % 3; usize::from(beginning)];
                key.extend(end.to_be_bytes());
                key
            };
            let (mut map, mut model) = (SortedMap::new(Vec::new(), 4), BTreeMap::new());
            for (beginning, end, value) in &keys {
                let key = key(*beginning, end % 500);
                if value % 2 == 0 {
                    proptest::prop_assert_eq!(map.insert(&key, *value).unwrap(), model.insert(key, *value));
                } else {
                    let had = map.place(&key, *value, Known::Keep).unwrap();
                    proptest::prop_assert_eq!(had, model.get(&key).copied());
                    model.entry(key).or_insert(*value);
                }
            }
            for (beginning, end, _) in &keys {
                let key = key(*beginning, *end);
                proptest::prop_assert_eq!(map.get(&key).unwrap(), model.get(&key).copied());
            }
            let from = key(from.to_be_bytes()[0], from % 500);
            let expected: Vec<_> = model.range(from.clone()..).map(|(key, value)| (key.clone(), *value)).collect();
            proptest::prop_assert_eq!(all(&mut map, &from), expected);
        }
    }

    /// Pages of a map with keys that come in this order; each must be found.
    fn n_pages(numbers: impl Iterator<Item = u32> + Clone) -> u32 {
        let mut map = SortedMap::new(Vec::new(), 16);
        let key = |number: u32| format!("a-name-of-usual-length-{number:07}").into_bytes();
        for number in numbers.clone() {
            assert_eq!(map.insert(&key(number), number).unwrap(), None);
        }
        let mut sorted: Vec<_> = numbers.collect();
        sorted.sort_unstable();
        let expected: Vec<_> = sorted.into_iter().map(|it| (key(it), it)).collect();
        assert_eq!(all(&mut map, b""), expected);
        map.n_pages
    }

    #[test]
    fn pages_are_full_in_order_and_half_full_in_any_order() {
        // 38 bytes a cell: 107 in a page.
        let least = 20_000 / 107;
        let in_order = n_pages(0..20_000);
        assert!(in_order <= least + 5, "{in_order}");
        let backwards = n_pages((0..20_000).rev());
        assert!(backwards <= 2 * least + 10, "{backwards}");
        let mixed = n_pages((0..20_000).map(|it| it * 7919 % 20_011));
        assert!(mixed <= 2 * least + 10, "{mixed}");
    }

    #[test]
    fn texts_of_any_length_are_told_apart() {
        let mut map: TextMap<_> = SortedMap::new(Vec::new(), 4).into();
        let texts: Vec<_> = (0..600).map(|len| vec![b'a'; len]).collect();
        let digest = blake3::hash(&texts[300]).as_bytes().to_vec();
        for (number, text) in (0..).zip(texts.iter().chain([&digest])) {
            assert_eq!(map.insert_new(text, number).unwrap(), None);
            assert_eq!(map.insert_new(text, 1000).unwrap(), Some(number));
        }
        for (number, text) in (0..).zip(texts.iter().chain([&digest])) {
            assert_eq!(map.get(text).unwrap(), Some(number));
        }
        assert_eq!(map.get(&[b'b'; 300]).unwrap(), None);
    }

    #[test]
    fn a_longer_key_is_refused() {
        let mut map = SortedMap::new(Vec::new(), 4);
        assert!(map.insert(&[0; MAX_KEY_BYTES + 1], 1).is_err());
        assert_eq!(map.insert(&[0; MAX_KEY_BYTES], 1).unwrap(), None);
    }
}
