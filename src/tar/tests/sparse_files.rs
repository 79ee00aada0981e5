//! Sparse files in their four formats, and hostile maps.

use super::{archive::*, *};

/// Returns a sparse file's size and its extents as (offset, offset from the data's start, length).
fn map_of(archive: &[u8], data_offset: u64) -> (u64, Vec<(u64, u64, u64)>) {
    let mut entries = parse(&[archive, &file(b"after", b"")].concat()).unwrap();
    assert_eq!(entries.pop().unwrap().path, b"after");
    let entry = entries.pop().unwrap();
    assert_eq!(entry.path, b"s");
    let TarKind::File { size, extents } = entry.kind else {
        panic!("not a file");
    };
    let extents = extents.into_iter();
    let extents = extents.map(|it| (it.file_offset, it.layer_offset - data_offset, it.len));
    (size, extents.collect())
}

/// A file behind PAX records.
fn with_pax(records: &[(&str, &str)], data: &[u8]) -> Vec<u8> {
    let records: Vec<_> = records
        .iter()
        .map(|it| (it.0.as_bytes(), it.1.as_bytes()))
        .collect();
    [pax(b'x', &records), file(b"s", data)].concat()
}

#[test]
fn old_gnu_maps_continue_over_blocks() {
    assert_eq!(map_of(&old_sparse(b"s", 100, &[], b""), 512), (100, vec![]));
    let few = old_sparse(b"s", 100, &[(0, 3), (50, 2), (100, 0)], b"abcde");
    assert_eq!(map_of(&few, 512), (100, vec![(0, 0, 3), (50, 3, 2)]));
    for n in [4_u64, 5, 25, 26, 46, 47] {
        let segments: Vec<_> = (0..n).map(|at| (at * 10, 2)).collect();
        let data = vec![1; usize::try_from(2 * n).unwrap()];
        let blocks = 1 + n.saturating_sub(4).div_ceil(21);
        let extents = (0..n).map(|at| (at * 10, at * 2, 2)).collect();
        let archive = old_sparse(b"s", 1000, &segments, &data);
        assert_eq!(map_of(&archive, blocks * 512), (1000, extents), "{n}");
    }
}

#[test]
fn pax_maps_are_read_in_every_version() {
    let expected = (1 << 40, vec![(10, 0, 3), (600, 3, 5)]);
    let size = ("GNU.sparse.size", "1099511627776");
    let count = ("GNU.sparse.numblocks", "3");
    let list = [
        size,
        count,
        ("GNU.sparse.offset", "10"),
        ("GNU.sparse.numbytes", "3"),
        ("GNU.sparse.offset", "600"),
        ("GNU.sparse.numbytes", "5"),
        ("GNU.sparse.offset", "1099511627776"),
        ("GNU.sparse.numbytes", "0"),
    ];
    let map = ("GNU.sparse.map", "10,3,600,5,1099511627776,0");
    assert_eq!(map_of(&with_pax(&list, b"abcdefgh"), 1536), expected);
    assert_eq!(
        map_of(&with_pax(&[size, count, map], b"abcdefgh"), 1536),
        expected
    );
    let versions = [("GNU.sparse.major", "0"), ("GNU.sparse.minor", "1")];
    let explicit = [&versions[..], &[size, count, map]].concat();
    assert_eq!(map_of(&with_pax(&explicit, b"abcdefgh"), 1536), expected);
    let in_data = sparse_1_0(
        b"s",
        1 << 40,
        "3\n10\n3\n600\n5\n1099511627776\n0\n",
        b"abcdefgh",
    );
    assert_eq!(map_of(&in_data, 2048), expected);
    // A file that is one hole.
    let hole = with_pax(&[size, ("GNU.sparse.numblocks", "0")], b"");
    assert_eq!(map_of(&hole, 0), (1 << 40, vec![]));
    assert_eq!(map_of(&sparse_1_0(b"s", 7, "0\n", b""), 0), (7, vec![]));
}

#[test]
fn map_in_the_data_may_fill_its_blocks_exactly() {
    for n in [40_u64, 60, 62, 63, 64, 65, 66, 100, 1000] {
        let lines: String = (0..n).map(|at| format!("{:04}\n1\n", at * 2)).collect();
        let map = format!("{n}\n{lines}");
        let data_offset = 1536 + 512 * u64::try_from(map.len().div_ceil(512)).unwrap();
        let data = vec![1; usize::try_from(n).unwrap()];
        let extents = (0..n).map(|at| (at * 2, at, 1)).collect();
        assert_eq!(
            map_of(&sparse_1_0(b"s", 2000, &map, &data), data_offset),
            (2000, extents)
        );
    }
}

#[test]
fn adjacent_segments_are_joined_and_empty_ones_dropped() {
    let segments = [(0, 2), (2, 3), (5, 0), (9, 0), (9, 1)];
    let archive = old_sparse(b"s", 10, &segments, b"abcdef");
    assert_eq!(map_of(&archive, 1024), (10, vec![(0, 0, 5), (9, 5, 1)]));
}

#[test]
fn hostile_maps_are_refused() {
    let max = i64::MAX.cast_unsigned();
    type Segments = &'static [(u64, u64)];
    let maps: [(&str, u64, Segments, usize); 7] = [
        ("unsorted", 100, &[(50, 1), (0, 1)], 2),
        ("overlapping", 100, &[(0, 10), (9, 1)], 11),
        ("same twice", 100, &[(0, 1), (0, 1)], 2),
        ("beyond the size", 100, &[(99, 2)], 2),
        ("empty beyond the size", 100, &[(101, 0)], 0),
        ("less than the data", 100, &[(0, 10)], 11),
        ("more than the data", 100, &[(0, 10)], 9),
    ];
    for (what, size, segments, data) in maps {
        let data = vec![1; data];
        let pairs: Vec<_> = segments.iter().flat_map(|it| [it.0, it.1]).collect();
        let numbers: Vec<_> = pairs.iter().map(ToString::to_string).collect();
        let (count, size_text) = (segments.len().to_string(), size.to_string());
        let lines = format!("{count}\n{}\n", numbers.join("\n"));
        let records = [
            ("GNU.sparse.size", &*size_text),
            ("GNU.sparse.numblocks", &*count),
            ("GNU.sparse.map", &*numbers.join(",")),
        ];
        assert_eq!(
            refusal(&old_sparse(b"s", size, segments, &data)).0,
            "malformed",
            "{what}"
        );
        assert_eq!(refusal(&with_pax(&records, &data)).0, "malformed", "{what}");
        assert_eq!(
            refusal(&sparse_1_0(b"s", size, &lines, &data)).0,
            "malformed",
            "{what}"
        );
    }
    let overflow = format!("2\n{max}\n{max}\n{max}\n{max}\n");
    assert_eq!(
        refusal(&sparse_1_0(b"s", max, &overflow, b"")).0,
        "malformed"
    );
}

#[test]
fn maps_out_of_form_are_refused() {
    let size = ("GNU.sparse.size", "10");
    let one = ("GNU.sparse.numblocks", "1");
    let offset = ("GNU.sparse.offset", "0");
    let len = ("GNU.sparse.numbytes", "3");
    let map = ("GNU.sparse.map", "0,3");
    let (major, minor) = (("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"));
    type Records<'a> = &'a [(&'a str, &'a str)];
    let cases: &[(&str, Records<'_>, &str)] = &[
        ("no size", &[one, map], "malformed"),
        ("no count", &[size, map], "malformed"),
        (
            "wrong count",
            &[size, ("GNU.sparse.numblocks", "2"), map],
            "malformed",
        ),
        ("no map", &[size, one], "malformed"),
        ("name alone", &[("GNU.sparse.name", "x")], "malformed"),
        ("half a pair", &[size, one, offset], "malformed"),
        (
            "two offsets",
            &[size, one, offset, offset, len],
            "malformed",
        ),
        ("length first", &[size, one, len, offset], "malformed"),
        ("two maps", &[size, one, map, map], "malformed"),
        ("map and list", &[size, one, offset, len, map], "malformed"),
        (
            "odd map",
            &[size, one, ("GNU.sparse.map", "0")],
            "malformed",
        ),
        (
            "not a number",
            &[size, one, ("GNU.sparse.map", "0,x")],
            "malformed",
        ),
        (
            "trailing comma",
            &[size, one, ("GNU.sparse.map", "0,3,")],
            "malformed",
        ),
        (
            "two sizes",
            &[size, one, map, ("GNU.sparse.realsize", "11")],
            "ambiguous",
        ),
        (
            "1.0 with a map",
            &[size, one, map, major, minor],
            "ambiguous",
        ),
        (
            "version 2.0",
            &[size, ("GNU.sparse.major", "2"), minor],
            "unsupported",
        ),
        ("version 1", &[size, major], "unsupported"),
    ];
    for (what, records, refused) in cases {
        assert_eq!(refusal(&with_pax(records, b"abc")).0, *refused, "{what}");
    }
    let texts = [
        "",
        "x\n",
        "-1\n",
        "1\n0\n",
        "1\n0\n3 \n",
        "\n",
        &"0".repeat(512),
        &"9".repeat(99),
    ];
    for text in texts {
        assert_eq!(
            refusal(&sparse_1_0(b"s", 10, text, b"abc")).0,
            "malformed",
            "{text:?}"
        );
    }
    // Right but for the length of a number, which would be kept in memory.
    for (n_zeros, accepted) in [(31, true), (32, false)] {
        let archive = sparse_1_0(
            b"s",
            10,
            &format!("{}1\n5\n3\n", "0".repeat(n_zeros)),
            b"abc",
        );
        assert_eq!(parse(&archive).is_ok(), accepted, "{n_zeros}");
    }
    // The count says more than the data can hold: refused before the next header is taken for it.
    let long_map = format!("900\n{}", "1\n1\n".repeat(126));
    let archive = [sparse_1_0(b"s", 10, &long_map, b""), file(b"b", &[1; 4096])].concat();
    assert_eq!(refusal(&archive).0, "malformed");
}

#[test]
fn old_maps_that_readers_read_differently_are_refused() {
    let good = old_sparse(b"s", 10, &[(0, 3), (5, 1)], b"abcd");
    let changed = |at: usize, field: &[u8]| {
        let mut archive = good.clone();
        archive[at..at + field.len()].copy_from_slice(field);
        seal(&mut archive[..512]);
        archive
    };
    let cases: [(&str, Vec<u8>, &str); 7] = [
        ("no offset", changed(386, b"\0"), "ambiguous"),
        ("no length", changed(398, b"\0"), "ambiguous"),
        ("end, yet continued", changed(482, b"\x01"), "ambiguous"),
        ("star's sparse file", changed(257, USTAR), "unsupported"),
        ("negative", changed(386, &[0xff; 12]), "malformed"),
        ("size", changed(483, b"8"), "malformed"),
        ("directory", changed(0, b"s/"), "ambiguous"),
    ];
    for (what, archive, refused) in cases {
        assert_eq!(refusal(&archive).0, refused, "{what}");
    }
    let pax_size = [pax(b'x', &[(b"size", b"5")]), good.clone()].concat();
    assert_eq!(refusal(&pax_size), ("ambiguous", 1024));
    let records = with_pax(
        &[
            ("GNU.sparse.size", "10"),
            ("GNU.sparse.numblocks", "1"),
            ("GNU.sparse.map", "0,4"),
        ],
        b"",
    );
    assert_eq!(
        refusal(&[&records[..1536 - 512], &good].concat()),
        ("ambiguous", 1024)
    );
    let directory = [&records[..1024], &Head::new(b"d", b'5').seal()].concat();
    assert_eq!(refusal(&directory), ("ambiguous", 1024));
}
