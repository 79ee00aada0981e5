//! Names, owners, times and attributes, and which of several headers counts.

use super::{archive::*, *};

/// A file behind the given headers.
fn behind(headers: &[Vec<u8>]) -> Vec<u8> {
    [headers.concat(), file(b"header", b"")].concat()
}

fn path_of(archive: &[u8]) -> String {
    only(archive).path.escape_ascii().to_string()
}

#[test]
fn prefix_is_for_the_formats_that_have_one() {
    let head = |magic: &[u8; 8]| {
        Head::new(b"name", b'0')
            .set(257, magic)
            .set(345, b"pre/fix")
    };
    assert_eq!(path_of(&head(USTAR).seal()), "pre/fix/name");
    assert_eq!(path_of(&head(V7).seal()), "name");
    // In GNU headers it is the access time, unless it cannot be one: a bug of Go before 1.8.
    assert_eq!(path_of(&head(GNU).seal()), "pre/fix/name");
    let time = head(GNU).set(345, b"00000000000\x0000000000000\0");
    assert_eq!(path_of(&time.seal()), "name");
    assert_eq!(
        path_of(&Head::new(b"name", b'0').set(257, GNU).seal()),
        "name"
    );
    assert_eq!(path_of(&head(GNU).set(345, b"pr\xe9").seal()), "name");
    // star has a shorter one, then times.
    let star = head(USTAR)
        .set(345, &[b'p'; 131])
        .set(476, b"00000000000\0")
        .set(508, b"tar\0");
    assert_eq!(path_of(&star.seal()), format!("{}/name", "p".repeat(131)));
    // Fields without a NUL at their end.
    let full = Head::new(&[b'n'; 100], b'0').set(345, &[b'p'; 155]);
    assert_eq!(
        path_of(&full.seal()),
        format!("{}/{}", "p".repeat(155), "n".repeat(100))
    );
}

#[test]
fn names_have_an_order_of_precedence() {
    let long_name = || long(b'L', b"long");
    let pax_path = |value: &[u8]| pax(b'x', &[(b"path", value)]);
    let cases = [
        ("long name", vec![long_name()], "long"),
        ("PAX", vec![pax_path(b"pax")], "pax"),
        (
            "PAX, long name",
            vec![pax_path(b"pax"), long_name()],
            "long",
        ),
        (
            "long name, PAX",
            vec![long_name(), pax_path(b"pax")],
            "long",
        ),
        (
            "long names",
            vec![long_name(), long(b'L', b"longer")],
            "longer",
        ),
        ("empty long name", vec![long(b'L', b"")], "header"),
        ("empty PAX path", vec![pax_path(b"")], "header"),
        (
            "NUL ends a long name",
            vec![long(b'L', b"long\0er")],
            "long",
        ),
        (
            "duplicates",
            vec![pax(b'x', &[(b"path", b"1"), (b"path", b"2")])],
            "2",
        ),
        (
            "deleted",
            vec![pax(b'x', &[(b"path", b"1"), (b"path", b"")])],
            "header",
        ),
        ("no records", vec![pax(b'x', &[])], "header"),
        ("odd bytes", vec![pax_path(b"a\nb=c\xff ")], r"a\nb=c\xff "),
    ];
    for (what, headers, path) in cases {
        assert_eq!(path_of(&behind(&headers)), path, "{what}");
    }
    let link = [pax(b'x', &[(b"linkpath", b"pax")]), long(b'K', b"long")].concat();
    let link = |n| [&link[..n], &Head::new(b"l", b'2').link(b"header").seal()].concat();
    for (n, target) in [
        (0, b"header".to_vec()),
        (1024, b"pax".to_vec()),
        (2048, b"long".to_vec()),
    ] {
        assert_eq!(only(&link(n)).kind, TarKind::Symlink(target));
    }
}

#[test]
fn headers_hold_for_one_entry_only() {
    let archive = [behind(&[long(b'L', b"long")]), file(b"next", b"")].concat();
    assert_eq!(paths(&archive).unwrap(), ["long", "next"]);
}

#[test]
fn empty_names_are_refused() {
    assert_eq!(refusal(&file(b"", b"")), ("malformed", 0));
    for typeflag in [b'1', b'2'] {
        assert_eq!(refusal(&Head::new(b"a", typeflag).seal()), ("malformed", 0));
    }
}

#[test]
fn numbers_come_from_octal_base_256_or_pax() {
    let owner = |head: Head| {
        let entry = only(&head.seal());
        (entry.mode, entry.uid, entry.gid, entry.mtime_seconds)
    };
    let head = || Head::new(b"a", b'0');
    assert_eq!(owner(head()), (0o644, 0, 0, 0));
    let octal = head()
        .set(100, b" 104755 ")
        .set(108, b"    12 \0")
        .set(116, b"\0\0\0\0\0\0\0\0")
        .set(136, b"14000000000 ");
    assert_eq!(owner(octal), (0o4755, 10, 0, 0o14_000_000_000));
    let binary = head()
        .set(108, b"\x80\0\0\0\xff\xff\xff\xff")
        .set(116, b"\x80\0\0\0\0\x01\0\0")
        .set(136, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe");
    assert_eq!(owner(binary), (0o644, u32::MAX, 0x1_0000, -2));

    let bad = [
        head().set(108, b"\x80\0\0\x01\0\0\0\0"),
        head().set(108, &[0xff; 8]),
        head().set(116, b"\x80\0\0\x01\0\0\0\0"),
        head().set(116, b"000008 \0"),
        head().set(100, b"zzzzzzz\0"),
        head().set(136, b"1 1 1 1 1 1\0"),
    ];
    for head in bad {
        assert_eq!(refusal(&head.seal()), ("malformed", 0));
    }

    let ids = pax(
        b'x',
        &[(b"uid", b"4294967295"), (b"gid", b"0"), (b"mtime", b"12.5")],
    );
    let entry = only(&behind(&[ids]));
    assert_eq!((entry.uid, entry.gid), (u32::MAX, 0));
    assert_eq!(
        (entry.mtime_seconds, entry.mtime_nanoseconds),
        (12, 500_000_000)
    );
    for (key, value) in [
        ("uid", "4294967296"),
        ("gid", "-1"),
        ("uid", "root"),
        ("mtime", "1e9"),
    ] {
        let archive = behind(&[pax(b'x', &[(key.as_bytes(), value.as_bytes())])]);
        assert_eq!(refusal(&archive), ("malformed", 0), "{key}={value}");
    }
}

#[test]
fn times_round_down() {
    type Time = Option<(i64, u32)>;
    let cases: [(&[u8], Time); 14] = [
        (b"0", Some((0, 0))),
        (b"1.", Some((1, 0))),
        (b"1.5", Some((1, 500_000_000))),
        (b"1.000000001", Some((1, 1))),
        (b"1.0000000019", Some((1, 1))),
        (b"-1", Some((-1, 0))),
        (b"-1.5", Some((-2, 500_000_000))),
        (b"-0.000000001", Some((-1, 999_999_999))),
        (b"9223372036854775807.999", Some((i64::MAX, 999_000_000))),
        (b"9223372036854775808", None),
        (b".5", None),
        (b"-", None),
        (b"1.5x", None),
        (b"1.5.5", None),
    ];
    for (text, time) in cases {
        let found = parse(&behind(&[pax(b'x', &[(b"mtime", text)])]));
        let found = found.map(|entries| (entries[0].mtime_seconds, entries[0].mtime_nanoseconds));
        assert_eq!(found.ok(), time, "{}", text.escape_ascii());
    }
}

#[test]
fn global_headers_hold_until_they_are_overruled() {
    let archive = [
        pax(b'g', &[(b"uid", b"7"), (b"gid", b"8"), (b"comment", b"c")]),
        file(b"a", b""),
        pax(b'x', &[(b"uid", b"9")]),
        file(b"b", b""),
        pax(b'g', &[(b"uid", b""), (b"mtime", b"5.5")]),
        file(b"c", b""),
        pax(b'x', &[(b"gid", b""), (b"mtime", b"")]),
        file(b"d", b""),
    ];
    let entries = parse(&archive.concat()).unwrap();
    let ids: Vec<_> = entries
        .iter()
        .map(|it| (it.uid, it.gid, it.mtime_seconds))
        .collect();
    assert_eq!(ids, [(7, 8, 0), (9, 8, 0), (0, 8, 5), (0, 0, 0)]);
}

#[test]
fn global_headers_may_not_move_or_rename_entries() {
    let keys = [
        "size",
        "GNU.sparse.size",
        "GNU.sparse.major",
        "path",
        "linkpath",
        "GNU.sparse.name",
        "GNU.sparse.numblocks",
        "SCHILY.xattr.user.a",
        "LIBARCHIVE.xattr.user.a",
    ];
    for key in keys {
        let archive = behind(&[pax(b'g', &[(key.as_bytes(), b"1000")])]);
        assert_eq!(refusal(&archive), ("ambiguous", 0), "{key}");
    }
    let archive = behind(&[pax(b'g', &[(b"GNU.sparse.map", b"0,1")])]);
    assert_eq!(refusal(&archive), ("ambiguous", 0));
}

#[test]
fn xattrs_are_bytes_and_schily_wins() {
    let large = vec![0xab; 64 << 10];
    let records: &[(&[u8], &[u8])] = &[
        (b"SCHILY.xattr.user.z", b"twice"),
        (b"SCHILY.xattr.user.z", b"a=b\n\0\xff"),
        (b"SCHILY.xattr.trusted.overlay.opaque", b"y"),
        (b"SCHILY.xattr.user.empty", b""),
        (b"SCHILY.xattr.user.large", &large),
        (b"LIBARCHIVE.xattr.user.z", b"AAAA"),
        (b"LIBARCHIVE.xattr.user.%e4%3D", b"AAEC/w=="),
        (b"LIBARCHIVE.xattr.user.b", b"+/8"),
        (b"LIBARCHIVE.creationtime", b"1"),
        (b"SCHILY.fflags", b"nodump"),
        (b"SCHILY.acl.access", b"user::rwx"),
        (b"RHT.security.selinux", b"x"),
    ];
    let xattrs = only(&behind(&[pax(b'x', records)])).xattrs;
    let expected: [(&[u8], &[u8]); 6] = [
        (b"trusted.overlay.opaque", b"y"),
        (b"user.b", b"\xfb\xff"),
        (b"user.empty", b""),
        (b"user.large", &large),
        (b"user.z", b"a=b\n\0\xff"),
        (b"user.\xe4=", b"\x00\x01\x02\xff"),
    ];
    let expected = expected.map(|(name, value)| (name.to_vec(), value.to_vec()));
    assert_eq!(xattrs, expected);

    let bad: [(&[u8], &[u8]); 6] = [
        (b"SCHILY.xattr.", b"v"),
        (b"LIBARCHIVE.xattr.user.%", b"AAAA"),
        (b"LIBARCHIVE.xattr.user.%zz", b"AAAA"),
        (b"LIBARCHIVE.xattr.user.%00", b"AAAA"),
        (b"LIBARCHIVE.xattr.user.a", b"AAAAA"),
        (b"LIBARCHIVE.xattr.user.a", b"A*AA"),
    ];
    for (key, value) in bad {
        let archive = behind(&[pax(b'x', &[(key, value)])]);
        assert_eq!(
            refusal(&archive),
            ("malformed", 0),
            "{}",
            key.escape_ascii()
        );
    }
}

#[test]
fn pax_records_must_be_in_form() {
    let bad: &[&[u8]] = &[
        b"garbage",
        b"12 path=abcd",
        b"13 path=abc\n",
        b"11 path=abc\n",
        b"99 path=abc\n",
        b" 12 path=abc\n",
        b"+12 path=abc\n",
        b"-12 path=abc\n",
        b"5 a=\n\0\0\0",
        b"4 a=\n",
        b"2 \n",
        b"7 =abc\n",
        b"8 a\0b=c\n",
        b"10 path=a\0\n",
        b"6 abc\n",
        b"99999999999999999999 path=abc\n",
        b"3",
    ];
    for payload in bad {
        let header = with_data(Head::new(b"x", b'x'), payload);
        assert_eq!(
            refusal(&behind(&[header])),
            ("malformed", 0),
            "{}",
            payload.escape_ascii()
        );
    }
    let good = with_data(Head::new(b"x", b'x'), b"5 a=\n012 path=ab\n");
    assert_eq!(path_of(&behind(&[good])), "ab");
}
