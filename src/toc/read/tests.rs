mod hostile;

use std::io::Write as _;

use serde_json::{Value, json};

use super::*;
use crate::{chunk::CHUNK_BYTES, codec::piece_map::PieceMapWriter};

const DATA_END: u64 = 1 << 30;

/// Keeps what it is told.
#[derive(Debug, Default)]
struct Kept {
    entries: Vec<TarEntry>,
    pieces: Vec<Piece>,
}

impl TocSink for Kept {
    type Error = std::convert::Infallible;

    fn entry(&mut self, entry: &TarEntry) -> Result<(), std::convert::Infallible> {
        self.entries.push(entry.clone());
        Ok(())
    }

    fn piece(&mut self, piece: &Piece) -> Result<(), std::convert::Infallible> {
        self.pieces.push(piece.clone());
        Ok(())
    }
}

fn digest(text: &str) -> String {
    BlobDigest::of(text.as_bytes()).to_string()
}

/// A table as eStargz has it.
fn estargz(json: &[u8]) -> Vec<u8> {
    let mut tar = vec![0; 512];
    tar[..17].copy_from_slice(b"stargz.index.json");
    tar[124..135].copy_from_slice(format!("{:011o}", json.len()).as_bytes());
    tar[156] = b'0';
    tar.extend_from_slice(json);
    tar.resize(tar.len().next_multiple_of(512) + 1024, 0);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    gzip.finish().unwrap()
}

fn chunked(json: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(json, 3).unwrap()
}

const CHUNKED: TocKind = TocKind::ZstdChunked {
    offset: 0,
    compressed_bytes: 0,
};

fn read_with(
    table: &[u8],
    kind: TocKind,
    limits: &TocLimits,
) -> Result<(Contents, Kept), TocError<std::convert::Infallible>> {
    let mut kept = Kept::default();
    let contents = read(table, kind, DATA_END, limits, &mut kept)?;
    Ok((contents, kept))
}

/// Reads these entries in both forms, which must be the same but for eStargz' own files.
fn read_entries(entries: &Value) -> Result<(u64, Kept), String> {
    let json = json!({ "version": 1, "entries": entries }).to_string();
    let json = json.as_bytes();
    let limits = TocLimits::default();
    let [gzip, zstd] =
        [(estargz(json), TocKind::Estargz), (chunked(json), CHUNKED)].map(|(table, kind)| {
            let outcome = read_with(&table, kind, &limits);
            outcome
                .map_err(|err| err.to_string())
                .map(|(contents, kept)| {
                    assert_eq!(contents.digest, BlobDigest::of(json));
                    (contents.layer_bytes, kept)
                })
        });
    assert_eq!(format!("{gzip:?}"), format!("{zstd:?}"));
    gzip
}

fn why_not(entries: &Value) -> String {
    read_entries(entries).unwrap_err()
}

fn file(name: &str, size: u64, offset: u64) -> Value {
    json!({
        "name": name, "type": "reg", "size": size, "offset": offset, "mode": 0o644,
        "digest": digest(name), "chunkDigest": digest(name),
    })
}

/// The same with other fields.
fn with(mut entry: Value, fields: &Value) -> Value {
    let fields = fields.as_object().unwrap().clone();
    entry.as_object_mut().unwrap().extend(fields);
    entry
}

#[test]
fn entries_are_those_of_an_archive() {
    let entries = json!([
        { "name": "d/", "type": "dir", "mode": 0o755, "uid": 7, "gid": 8, "modtime": "2000-03-01T00:00:00Z" },
        with(file("d/f", 5, 100), &json!({
            "mode": 0o104_755, "uname": "x", "modtime": "1969-12-31T23:59:59.25Z",
            "xattrs": { "user.b": "AQI=", "security.capability": "AA==" },
        })),
        { "name": "d/empty", "type": "reg", "digest": digest("") },
        { "name": "d/s", "type": "symlink", "linkName": "../x" },
        { "name": "h", "type": "hardlink", "linkName": "d/f" },
        { "name": "c", "type": "char", "devMajor": 1, "devMinor": 3 },
        { "name": "b", "type": "block", "devMajor": 7, "devMinor": 0 },
        { "name": "p", "type": "fifo", "modtime": "" },
        { "name": "d/.wh.gone", "type": "reg" },
        { "name": "asdir/", "type": "reg" },
    ]);
    let (layer_bytes, kept) = read_entries(&entries).unwrap();
    assert_eq!(layer_bytes, 512);
    let plain = |path: &str, kind| TarEntry {
        path: path.as_bytes().to_vec(),
        kind,
        mode: 0,
        uid: 0,
        gid: 0,
        mtime_seconds: 0,
        mtime_nanoseconds: 0,
        xattrs: Vec::new(),
    };
    let empty = || TarKind::File {
        size: 0,
        extents: Vec::new(),
    };
    let extents = vec![TarExtent {
        file_offset: 0,
        layer_offset: 0,
        len: 5,
    }];
    let expected = [
        TarEntry {
            mode: 0o755,
            uid: 7,
            gid: 8,
            mtime_seconds: 951_868_800,
            ..plain("d/", TarKind::Directory)
        },
        TarEntry {
            mode: 0o4755,
            mtime_seconds: -1,
            mtime_nanoseconds: 250_000_000,
            xattrs: vec![
                (b"security.capability".to_vec(), vec![0]),
                (b"user.b".to_vec(), vec![1, 2]),
            ],
            ..plain("d/f", TarKind::File { size: 5, extents })
        },
        plain("d/empty", empty()),
        plain("d/s", TarKind::Symlink(b"../x".to_vec())),
        plain("h", TarKind::HardLink(b"d/f".to_vec())),
        plain("c", TarKind::CharDevice { major: 1, minor: 3 }),
        plain("b", TarKind::BlockDevice { major: 7, minor: 0 }),
        plain("p", TarKind::Fifo),
        plain("d/.wh.gone", empty()),
        plain("asdir/", TarKind::Directory),
    ];
    assert_eq!(kept.entries, expected);
}

#[test]
fn data_are_laid_out_in_pieces() {
    let chunk = |name: &str, chunk_offset: u64, offset: u64, fields: &Value| {
        let entry = json!({
            "name": name, "type": "chunk", "chunkOffset": chunk_offset, "offset": offset,
            "chunkDigest": digest(&chunk_offset.to_string()),
        });
        with(entry, fields)
    };
    let large = 2 * CHUNK_BYTES;
    let entries = json!([
        file("a", 10, 100),
        // Of one gzip member with the next.
        file("b", 20, 300),
        with(file("c", 30, 300), &json!({ "innerOffset": 532 })),
        with(file("big", large + 50, 500), &json!({ "chunkSize": large })),
        chunk("big", large, 9000, &json!({})),
        with(file("holes", 4000, 9500), &json!({ "chunkSize": 1000 })),
        chunk(
            "holes",
            1000,
            9600,
            &json!({ "chunkSize": 2000, "chunkType": "zeros", "chunkDigest": "" })
        ),
        chunk("holes", 3000, 9700, &json!({ "chunkSize": 500 })),
        chunk("holes", 3500, 9800, &json!({ "chunkSize": 500 })),
    ]);
    let (layer_bytes, kept) = read_entries(&entries).unwrap();
    let laid_out: Vec<_> = kept
        .pieces
        .iter()
        .map(|it| (it.layer_offset, it.len, it.blob.clone(), it.skipped))
        .collect();
    let chunk = CHUNK_BYTES;
    assert_eq!(
        laid_out,
        [
            (0, 10, 100..300, 0),
            (512, 20, 300..300 + 40 + (64 << 10), 0),
            (1024, 30, 300..500, 532),
            (chunk, large, 500..9000, 0),
            (3 * chunk, 50, 9000..9500, 0),
            (3 * chunk + 512, 1000, 9500..9600, 0),
            (3 * chunk + 1512, 500, 9700..9800, 0),
            (3 * chunk + 2012, 500, 9800..9800 + 1000 + (64 << 10), 0),
        ]
    );
    assert_eq!(layer_bytes, 3 * chunk + 2560);
    let extents = |at: usize| match &kept.entries[at].kind {
        TarKind::File { extents, .. } => extents
            .iter()
            .map(|it| (it.file_offset, it.layer_offset, it.len))
            .collect(),
        _ => Vec::new(),
    };
    assert_eq!(extents(2), [(0, 1024, 30)]);
    // What follows on in file and layer is one run.
    assert_eq!(extents(3), [(0, chunk, large + 50)]);
    let holes = [(0, 3 * chunk + 512, 1000), (3000, 3 * chunk + 1512, 1000)];
    assert_eq!(extents(4), holes);
    let digests: Vec<_> = kept.pieces.iter().map(|it| it.digest.to_string()).collect();
    assert_eq!(digests[0], digest("a"));
    assert_eq!(digests[4], digest(&large.to_string()));
}

#[test]
fn a_file_in_one_chunk_has_the_digest_of_the_file() {
    let entry = with(file("f", 5, 100), &json!({ "chunkDigest": "" }));
    let (_, kept) = read_entries(&json!([entry])).unwrap();
    assert_eq!(kept.pieces[0].digest.to_string(), digest("f"));
    // One of several chunks has not.
    let entry = with(entry, &json!({ "chunkSize": 2 }));
    assert!(why_not(&json!([entry])).contains("the digest of a chunk"));
}

#[test]
fn own_files_of_estargz_are_not_shown() {
    let entries = json!([
        file(".no.prefetch.landmark", 1, 100),
        file("./.prefetch.landmark", 1, 200),
        file("d/.prefetch.landmark", 1, 300),
    ]);
    let json = json!({ "version": 1, "entries": entries }).to_string();
    let limits = TocLimits::default();
    let paths = |table: &[u8], kind| -> Vec<String> {
        let (_, kept) = read_with(table, kind, &limits).unwrap();
        let paths = kept.entries.into_iter().map(|it| it.path);
        paths.map(|it| String::from_utf8(it).unwrap()).collect()
    };
    let shown = paths(&estargz(json.as_bytes()), TocKind::Estargz);
    assert_eq!(shown, ["d/.prefetch.landmark"]);
    assert_eq!(paths(&chunked(json.as_bytes()), CHUNKED).len(), 3);
}

#[test]
fn what_would_have_to_be_guessed_is_refused() {
    let good = || file("f", 10, 100);
    let then = |fields: &Value| with(good(), fields);
    let chunk = json!({
        "name": "f", "type": "chunk", "chunkOffset": 4, "offset": 200, "chunkDigest": digest("4"),
    });
    let cut = || then(&json!({ "chunkSize": 4 }));
    let long = "x".repeat((32 << 10) + 1);
    for (entries, reason) in [
        (json!([]), "no content"),
        (json!([{ "name": "d", "type": "dir" }]), "no content"),
        (json!([then(&json!({ "name": "" }))]), "name is empty"),
        (
            json!([then(&json!({ "name": "a\u{0}b" }))]),
            "cannot be told",
        ),
        (
            json!([then(&json!({ "name": "a\u{fffd}b" }))]),
            "cannot be told",
        ),
        (json!([then(&json!({ "name": long }))]), "longer than 32768"),
        (
            json!([then(&json!({ "name": "f/" }))]),
            "directory by its name",
        ),
        (
            json!([then(&json!({ "type": "socket" }))]),
            "unknown type \"socket\"",
        ),
        (
            json!([{ "name": "s", "type": "symlink" }]),
            "link target is empty",
        ),
        (
            json!([{ "name": "h", "type": "hardlink", "linkName": "a\u{0}" }]),
            "cannot be told",
        ),
        (
            json!([then(&json!({ "modtime": "yesterday" }))]),
            "is no time",
        ),
        (json!([then(&json!({ "uid": -1 }))]), "uid -1"),
        (
            json!([then(&json!({ "gid": 1u64 << 32 }))]),
            "gid 4294967296",
        ),
        (
            json!([then(&json!({ "xattrs": { "user.a": "?" } }))]),
            "attribute's value",
        ),
        (json!([then(&json!({ "xattrs": { "": "" } }))]), "no name"),
        (
            json!([then(&json!({ "digest": "", "chunkDigest": "" }))]),
            "digest of a chunk",
        ),
        (
            json!([then(&json!({ "chunkDigest": "sha512:00" }))]),
            "digest of a chunk",
        ),
        (
            json!([then(&json!({ "chunkType": "delta" }))]),
            "unknown type \"delta\"",
        ),
        (json!([then(&json!({ "chunkOffset": 1 }))]), "no partition"),
        (json!([then(&json!({ "chunkSize": 11 }))]), "no partition"),
        (
            json!([then(&json!({ "offset": DATA_END }))]),
            "not in order",
        ),
        (
            json!([then(&json!({ "offset": u64::MAX }))]),
            "not in order",
        ),
        (json!([good(), file("g", 1, 99)]), "not in order"),
        (json!([good(), file("g", 1, 100)]), "not in order"),
        (
            json!([then(&json!({ "innerOffset": (16 << 20) + 1 }))]),
            "larger than 16777216",
        ),
        (
            json!([then(&json!({ "size": (16 << 20) + 1 }))]),
            "larger than 16777216",
        ),
        (
            json!([then(&json!({ "size": u64::MAX }))]),
            "larger than 16777216",
        ),
        (json!([chunk]), "does not follow"),
        (json!([good(), chunk]), "does not follow"),
        (json!([cut()]), "last file lacks chunks"),
        (json!([cut(), file("g", 1, 300)]), "before it lacks chunks"),
        (
            json!([cut(), with(chunk.clone(), &json!({ "name": "g" }))]),
            "does not follow",
        ),
        (
            json!([cut(), with(chunk.clone(), &json!({ "chunkOffset": 5 }))]),
            "no partition",
        ),
        (
            json!([cut(), with(chunk.clone(), &json!({ "chunkSize": 7 }))]),
            "no partition",
        ),
        (
            json!([cut(), with(chunk.clone(), &json!({ "offset": 1 }))]),
            "not in order",
        ),
        (json!([then(&json!({ "size": -1 }))]), "not JSON of a table"),
        (json!([then(&json!({ "name": 7 }))]), "not JSON of a table"),
        (json!(["f"]), "not JSON of a table"),
        (json!({ "f": 1 }), "not JSON of a table"),
        (Value::Null, "not JSON of a table"),
    ] {
        let why = why_not(&entries);
        assert!(why.contains(reason), "{entries}: {why}");
    }
}

#[test]
fn what_is_no_table_is_refused() {
    let limits = TocLimits::default();
    let why_not = |json: &str| {
        let refused = read_with(&chunked(json.as_bytes()), CHUNKED, &limits);
        refused.unwrap_err().to_string()
    };
    let entries = json!([file("f", 1, 1)]);
    assert!(why_not("").contains("not JSON of a table"));
    for json in [
        "[]".to_owned(),
        "{}".to_owned(),
        r#"{"version":1}"#.to_owned(),
        format!(r#"{{"entries":{entries}}}"#),
        format!(r#"{{"version":2,"entries":{entries}}}"#),
        format!(r#"{{"version":1,"version":1,"entries":{entries}}}"#),
        format!(r#"{{"version":1,"entries":{entries},"entries":{entries}}}"#),
        format!(r#"{{"version":1,"entries":{entries}"#),
        format!(r#"{{"version":1,"entries":{entries}}} x"#),
        "{\"x\":".to_owned() + &"[".repeat(1000),
    ] {
        assert!(why_not(&json).contains("not JSON of a table"), "{json}");
    }
    let json = format!(r#"{{"x":{{"y":[1]}},"entries":{entries},"version":1}} "#);
    let (contents, _) = read_with(&chunked(json.as_bytes()), CHUNKED, &limits).unwrap();
    assert_eq!(contents.layer_bytes, 512);
    // Compression that is none, or cut.
    let table = estargz(json.as_bytes());
    for broken in [&table[..table.len() / 2], &table[1..], &[], b"plain"] {
        let refused = read_with(broken, TocKind::Estargz, &limits);
        assert!(matches!(refused, Err(TocError::Unusable(_))), "{refused:?}");
    }
}

#[test]
fn limits_hold() {
    let json = json!({ "version": 1, "entries": [file("f", 1, 1), file("g", 1, 2)] }).to_string();
    let tables = [
        (estargz(json.as_bytes()), TocKind::Estargz),
        (chunked(json.as_bytes()), CHUNKED),
    ];
    let len = json.len() as u64;
    let good = TocLimits {
        max_table_bytes: len,
        max_entries: 2,
        max_entry_bytes: 400,
        max_layer_bytes: 1024,
        ..TocLimits::default()
    };
    let wrong = [
        (
            "longer than",
            TocLimits {
                max_table_bytes: len - 1,
                ..good
            },
        ),
        (
            "more than 1 entries",
            TocLimits {
                max_entries: 1,
                ..good
            },
        ),
        (
            "longer than 100 bytes",
            TocLimits {
                max_entry_bytes: 100,
                ..good
            },
        ),
        (
            "more than 1023 bytes",
            TocLimits {
                max_layer_bytes: 1023,
                ..good
            },
        ),
    ];
    for (table, kind) in tables {
        assert_eq!(read_with(&table, kind, &good).unwrap().0.layer_bytes, 1024);
        for (reason, limits) in &wrong {
            let why = read_with(&table, kind, limits).unwrap_err().to_string();
            assert!(why.contains(reason), "{why}");
        }
    }
    let zeros = |at: u64| {
        json!({
            "name": "f", "type": "chunk", "chunkOffset": at, "chunkSize": 1, "offset": 1 + at, "chunkType": "zeros",
        })
    };
    let data = |at: u64| {
        with(
            zeros(at),
            &json!({ "chunkType": "", "chunkDigest": digest("f") }),
        )
    };
    let first = with(file("f", 5, 1), &json!({ "chunkSize": 1 }));
    let runs = json!({ "version": 1, "entries": [first, zeros(1), data(2), zeros(3), data(4)] });
    let table = chunked(runs.to_string().as_bytes());
    for (max_extents, is_good) in [(3, true), (2, false)] {
        let limits = TocLimits {
            max_extents,
            ..TocLimits::default()
        };
        let outcome = read_with(&table, CHUNKED, &limits);
        assert_eq!(outcome.is_ok(), is_good, "{outcome:?}");
    }
}

/// Fails after some bytes.
struct Broken<'a>(&'a [u8]);

impl Read for Broken<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buf)? {
            0 => Err(io::Error::other("the connection broke")),
            len => Ok(len),
        }
    }
}

#[test]
fn a_source_that_fails_says_nothing_about_the_table() {
    let json = json!({ "version": 1, "entries": [file("f", 1, 1)] }).to_string();
    for (table, kind) in [
        (estargz(json.as_bytes()), TocKind::Estargz),
        (chunked(json.as_bytes()), CHUNKED),
    ] {
        for len in [0, 3, table.len() / 2] {
            let input = BufReader::new(Broken(&table[..len]));
            let mut kept = Kept::default();
            let limits = TocLimits::default();
            let failed = read(input, kind, DATA_END, &limits, &mut kept);
            assert!(
                matches!(failed, Err(TocError::Input(_))),
                "{len}: {failed:?}"
            );
        }
    }
}
