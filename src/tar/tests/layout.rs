//! Where headers are, and where readers differ about it.

use super::{archive::*, *};

/// Two files, the first one's content being an archive of its own.
fn nested(first: Vec<u8>) -> Vec<u8> {
    let hidden = file(b"hidden", b"");
    [first, padded(&hidden), file(b"after", b""), END.to_vec()].concat()
}

#[test]
fn extents_name_the_payload_in_the_stream() {
    let archive = [file(b"a", &[1; 513]), file(b"b", b""), file(b"c", b"xyz")].concat();
    let files: Vec<_> = parse(&archive)
        .unwrap()
        .into_iter()
        .map(|entry| entry.kind)
        .collect();
    let plain = |size, layer_offset| TarKind::File {
        size,
        extents: vec![TarExtent {
            file_offset: 0,
            layer_offset,
            len: size,
        }],
    };
    let empty = TarKind::File {
        size: 0,
        extents: Vec::new(),
    };
    assert_eq!(files, [plain(513, 512), empty, plain(3, 2560)]);
    assert_eq!(&archive[2560..2563], b"xyz");
}

#[test]
fn every_kind_is_told() {
    let kinds: Vec<_> = parse(&everything())
        .unwrap()
        .into_iter()
        .map(|entry| entry.kind)
        .collect();
    assert_eq!(kinds.len(), 17);
    assert_eq!(kinds[0], TarKind::Directory);
    assert_eq!(kinds[4], TarKind::Directory);
    assert!(matches!(kinds[5], TarKind::File { size: 4, .. }));
    assert_eq!(kinds[6], TarKind::HardLink(b"plain".to_vec()));
    assert_eq!(kinds[7], TarKind::Symlink(b"../x".to_vec()));
    assert_eq!(kinds[8], TarKind::CharDevice { major: 1, minor: 3 });
    assert_eq!(kinds[9], TarKind::BlockDevice { major: 8, minor: 2 });
    assert_eq!(kinds[10], TarKind::Fifo);
}

#[test]
fn archive_ends_with_two_one_or_no_zero_blocks() {
    let entry = file(b"a", b"data");
    for end in [&END[..], &END[..512], b"", &[0; 10240]] {
        assert_eq!(
            paths(&[&entry, end].concat()).unwrap(),
            ["a"],
            "{}",
            end.len()
        );
    }
    // The padding alone may be missing.
    assert_eq!(paths(&entry[..516]).unwrap(), ["a"]);
    assert_eq!(paths(b"").unwrap(), [""; 0]);
}

#[test]
fn what_follows_two_zero_blocks_is_ignored() {
    let garbage = [&file(b"a", b"")[..], &END, &file(b"b", b""), &[0xff; 700]].concat();
    assert_eq!(paths(&garbage).unwrap(), ["a"]);
}

#[test]
fn lone_zero_block_before_data_is_refused() {
    let archive = [&file(b"a", b"")[..], &END[..512], &file(b"b", b"")].concat();
    assert_eq!(refusal(&archive), ("ambiguous", 1024));
}

#[test]
fn truncation_is_an_error_everywhere_else() {
    let cases: [(&str, Vec<u8>, usize); 7] = [
        ("header", file(b"a", b""), 511),
        ("data", file(b"a", b"data"), 515),
        (
            "zero block",
            [&file(b"a", b"")[..], &END].concat(),
            512 + 700,
        ),
        ("extended header", pax(b'x', &[(b"path", b"b")]), 515),
        (
            "entry after an extended header",
            pax(b'x', &[(b"path", b"b")]),
            1024,
        ),
        ("entry after a long name", long(b'L', b"name"), 1024),
        (
            "sparse map",
            old_sparse(b"s", 9000, &[(0, 1); 5].map(|_| (0, 0)), b""),
            600,
        ),
    ];
    for (what, archive, len) in cases {
        let offset = u64::try_from(len).unwrap();
        assert_eq!(refusal(&archive[..len]), ("truncated", offset), "{what}");
    }
}

#[test]
fn pax_size_wins_so_nested_entries_stay_data() {
    // The header says 0, as in the advisories of 2025 about the async-tar family.
    let archive = nested(
        [
            pax(b'x', &[(b"size", b"512")]),
            Head::new(b"a", b'0').seal().to_vec(),
        ]
        .concat(),
    );
    assert_eq!(paths(&archive).unwrap(), ["a", "after"]);
    // And the reverse: the header's size would hide an entry.
    let archive = nested(
        [
            pax(b'x', &[(b"size", b"0")]),
            Head::new(b"a", b'0').size(512).seal().to_vec(),
        ]
        .concat(),
    );
    assert_eq!(paths(&archive).unwrap(), ["a", "hidden", "after"]);
}

#[test]
fn pax_size_is_not_for_the_headers_before_the_entry() {
    let archive = [
        pax(b'x', &[(b"size", b"512")]),
        long(b'L', b"long"),
        Head::new(b"a", b'0').seal().to_vec(),
        padded(&file(b"hidden", b"")),
        file(b"after", b""),
    ];
    assert_eq!(paths(&archive.concat()).unwrap(), ["long", "after"]);
}

#[test]
fn size_without_data_is_settled_where_readers_agree() {
    for typeflag in [b'1', b'5'] {
        let head = Head::new(b"a", typeflag)
            .link(b"t")
            .size(512)
            .seal()
            .to_vec();
        assert_eq!(paths(&nested(head)).unwrap(), ["a", "hidden", "after"]);
    }
    for typeflag in [b'2', b'3', b'4', b'6'] {
        let head = Head::new(b"a", typeflag)
            .link(b"t")
            .size(512)
            .seal()
            .to_vec();
        assert_eq!(refusal(&nested(head)), ("ambiguous", 0), "{typeflag}");
    }
    for typeflag in b'1'..=b'6' {
        let head = Head::new(b"a", typeflag).link(b"t").seal().to_vec();
        let with_size = |size| [pax(b'x', &[(b"size", size)]), head.clone()].concat();
        assert_eq!(
            refusal(&nested(with_size(b"512"))),
            ("ambiguous", 1024),
            "{typeflag}"
        );
        assert_eq!(
            paths(&nested(with_size(b"0"))).unwrap(),
            ["a", "hidden", "after"]
        );
    }
}

#[test]
fn file_named_as_a_directory_is_one() {
    for typeflag in [0, b'0', b'7'] {
        assert_eq!(
            only(&file_as(typeflag, b"d/", b"")).kind,
            TarKind::Directory
        );
        assert_eq!(
            refusal(&file_as(typeflag, b"d/", b"data")),
            ("ambiguous", 0)
        );
        assert!(matches!(
            only(&file_as(typeflag, b"d", b"data")).kind,
            TarKind::File { .. }
        ));
    }
}

fn file_as(typeflag: u8, name: &[u8], data: &[u8]) -> Vec<u8> {
    with_data(Head::new(name, typeflag), data)
}

#[test]
fn unknown_types_are_refused() {
    for typeflag in [b'8', b'A', b'D', b'M', b'N', b'V', b'X', b'Z', 0xff] {
        let error = parse(&file_as(typeflag, b"a", b"data")).unwrap_err();
        assert_eq!(
            error,
            TarError::UnknownType {
                offset: 0,
                typeflag
            }
        );
    }
}

#[test]
fn extended_headers_out_of_place_are_refused() {
    let x = || pax(b'x', &[(b"path", b"b")]);
    let g = || pax(b'g', &[(b"uid", b"1")]);
    let cases = [
        ("x x", [x(), x()].concat(), ("ambiguous", 1024)),
        ("x g", [x(), g()].concat(), ("ambiguous", 1024)),
        ("L g", [long(b'L', b"n"), g()].concat(), ("ambiguous", 1024)),
        ("x end", [x(), END.to_vec()].concat(), ("malformed", 1024)),
    ];
    for (what, archive, refused) in cases {
        assert_eq!(
            refusal(&[archive, file(b"a", b"")].concat()),
            refused,
            "{what}"
        );
    }
}

#[test]
fn checksum_may_be_signed_and_must_be_right() {
    let head = Head::new(b"caf\xe9", b'0');
    assert_ne!(head.seal(), head.seal_signed());
    for block in [head.seal(), head.seal_signed()] {
        assert_eq!(only(&block).path, b"caf\xe9");
        for at in [0, 99, 156, 257, 511] {
            let mut block = block;
            block[at] ^= 1;
            assert_eq!(refusal(&block), ("malformed", 0), "{at}");
        }
    }
}

#[test]
fn limits_hold() {
    let limits = TarLimits {
        max_metadata_bytes: 100,
        max_entries: 2,
        max_sparse_segments: 3,
        max_path_bytes: 50,
    };
    let segments = |n: u64| (0..n).map(|at| (at * 10, 1)).collect::<Vec<_>>();
    let sparse = |n: u64| {
        old_sparse(
            b"s",
            100,
            &segments(n),
            &vec![0; usize::try_from(n).unwrap()],
        )
    };
    let name = |len| [long(b'L', &vec![b'n'; len]), file(b"a", b"")].concat();
    let link = |len| {
        [
            long(b'K', &vec![b'n'; len]),
            Head::new(b"a", b'2').seal().to_vec(),
        ]
        .concat()
    };
    let cases = [
        (
            "entries",
            file(b"a", b"").repeat(2),
            file(b"a", b"").repeat(3),
            1024,
            2,
        ),
        ("segments of a sparse file", sparse(3), sparse(4), 0, 3),
        (
            "bytes of a path or link target",
            name(50),
            name(51),
            1024,
            50,
        ),
        (
            "bytes of a path or link target",
            link(50),
            link(51),
            1024,
            50,
        ),
        (
            "bytes of an extended header",
            pax(b'g', &[(b"c", &[b'x'; 93])]),
            pax(b'g', &[(b"c", &[b'x'; 94])]),
            0,
            100,
        ),
    ];
    for (what, within, beyond, offset, max) in cases {
        assert!(parse_limited(&within, limits).is_ok(), "{what}");
        let error = parse_limited(&beyond, limits).unwrap_err();
        assert_eq!(error, TarError::Limit { offset, what, max });
    }
}

#[test]
fn sizes_beyond_any_stream_are_refused() {
    let largest = b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff";
    let head = Head::new(b"a", b'0').set(124, largest).seal();
    assert_eq!(refusal(&head), ("truncated", 512));
    let negative = Head::new(b"a", b'0').set(124, &[0xff; 12]).seal();
    assert_eq!(refusal(&negative), ("malformed", 0));
    for size in [
        &b"9223372036854775808"[..],
        b"-1",
        b"+1",
        b" 1",
        b"1 ",
        b"0x1",
        b"1.5",
    ] {
        let archive = [pax(b'x', &[(b"size", size)]), file(b"a", b"")].concat();
        assert_eq!(
            refusal(&archive),
            ("malformed", 0),
            "{}",
            size.escape_ascii()
        );
    }
}
