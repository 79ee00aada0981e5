//! Writes archives, right ones and wrong ones, field by field.

use crate::tar::header::{BLOCK_BYTES, Block, padding};

/// The two zero blocks.
pub(super) const END: [u8; 1024] = [0; 1024];

pub(super) const USTAR: &[u8; 8] = b"ustar\x0000";
pub(super) const GNU: &[u8; 8] = b"ustar  \0";
pub(super) const V7: &[u8; 8] = b"\0\0\0\0\0\0\0\0";

/// A header under construction.
#[derive(Clone)]
pub(super) struct Head(Block);

impl Head {
    /// A ustar header of an entry without data, mode 0644, owner 0, time 0.
    pub(super) fn new(name: &[u8], typeflag: u8) -> Self {
        let mut head = Self([0; BLOCK_BYTES]);
        head.0[..name.len()].copy_from_slice(name);
        head.0[156] = typeflag;
        head.set(100, b"0000644\0")
            .set(108, b"0000000\0")
            .set(116, b"0000000\0")
            .set(136, b"00000000000\0")
            .set(257, USTAR)
            .size(0)
    }

    /// Overwrites a field.
    pub(super) fn set(mut self, at: usize, field: &[u8]) -> Self {
        self.0[at..at + field.len()].copy_from_slice(field);
        self
    }

    pub(super) fn size(self, size: usize) -> Self {
        self.set(124, format!("{size:011o}\0").as_bytes())
    }

    pub(super) fn link(self, target: &[u8]) -> Self {
        self.set(157, target)
    }

    /// Returns the block with its checksum.
    pub(super) fn seal(&self) -> Block {
        let mut block = self.0;
        seal(&mut block);
        block
    }

    /// Returns the block with the checksum that a writer with signed chars makes.
    pub(super) fn seal_signed(&self) -> Block {
        let mut block = self.0;
        block[148..156].fill(b' ');
        let sum: i32 = block.iter().map(|byte| i32::from(byte.cast_signed())).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }
}

/// Writes the right checksum into a header.
pub(super) fn seal(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// Fills up the last block of a payload.
pub(super) fn padded(data: &[u8]) -> Vec<u8> {
    let mut padded = data.to_vec();
    let rest = padding(u64::try_from(data.len()).unwrap());
    padded.resize(data.len() + usize::try_from(rest).unwrap(), 0);
    padded
}

/// A header with its payload.
pub(super) fn with_data(head: Head, data: &[u8]) -> Vec<u8> {
    [&head.size(data.len()).seal()[..], &padded(data)].concat()
}

/// A regular file.
pub(super) fn file(name: &[u8], data: &[u8]) -> Vec<u8> {
    with_data(Head::new(name, b'0'), data)
}

/// An extended header of type `x` or `g`.
pub(super) fn pax(typeflag: u8, records: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (key, value) in records {
        body.extend(record(key, value));
    }
    with_data(Head::new(b"PaxHeaders/x", typeflag), &body)
}

/// One PAX record with its own length in front.
pub(super) fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = [b" ", key, b"=", value, b"\n"].concat();
    let mut len = rest.len();
    while len != rest.len() + len.to_string().len() {
        len = rest.len() + len.to_string().len();
    }
    [len.to_string().as_bytes(), &rest].concat()
}

/// A GNU long name (`L`) or long link (`K`).
pub(super) fn long(typeflag: u8, name: &[u8]) -> Vec<u8> {
    let head = Head::new(b"././@LongLink", typeflag).set(257, GNU);
    with_data(head, &[name, b"\0"].concat())
}

/// An old GNU sparse file: the first four segments, the rest in continuation blocks.
pub(super) fn old_sparse(name: &[u8], size: u64, segments: &[(u64, u64)], data: &[u8]) -> Vec<u8> {
    let field = |value: u64| format!("{value:011o}\0").into_bytes();
    let list = |segments: &[(u64, u64)]| -> Vec<u8> {
        segments
            .iter()
            .flat_map(|(at, len)| [field(*at), field(*len)].concat())
            .collect()
    };
    let (first, mut rest) = segments.split_at(segments.len().min(4));
    let mut archive = Head::new(name, b'S')
        .set(257, GNU)
        .set(386, &list(first))
        .set(482, &[u8::from(!rest.is_empty())])
        .set(483, &field(size))
        .size(data.len())
        .seal()
        .to_vec();
    while !rest.is_empty() {
        let (these, others) = rest.split_at(rest.len().min(21));
        rest = others;
        let mut block = [0; BLOCK_BYTES];
        let list = list(these);
        block[..list.len()].copy_from_slice(&list);
        block[504] = u8::from(!rest.is_empty());
        archive.extend(block);
    }
    archive.extend(padded(data));
    archive
}

/// A PAX sparse 1.0 file whose map is the given text.
pub(super) fn sparse_1_0(name: &[u8], size: u64, map: &str, data: &[u8]) -> Vec<u8> {
    let records: [(&[u8], &[u8]); 4] = [
        (b"GNU.sparse.major", b"1"),
        (b"GNU.sparse.minor", b"0"),
        (b"GNU.sparse.name", name),
        (b"GNU.sparse.realsize", &size.to_string().into_bytes()),
    ];
    let body = [&padded(map.as_bytes()), data].concat();
    [pax(b'x', &records), file(b"GNUSparseFile.0/x", &body)].concat()
}

/// An archive with something of everything that is accepted.
pub(super) fn everything() -> Vec<u8> {
    let many: Vec<(u64, u64)> = (0..60).map(|at| (at * 1000, 7)).collect();
    let map_1_0 = "2\n0\n5\n100\n3\n";
    [
        pax(b'g', &[(b"comment", b"for all"), (b"gid", b"77")]),
        Head::new(b"./", b'5')
            .set(100, b"0041755\0")
            .seal()
            .to_vec(),
        file(b"plain", &[7; 1000]),
        file(b"empty", b""),
        with_data(Head::new(b"name", b'0').set(345, b"prefix"), &[1; 512]),
        Head::new(b"old/", 0).set(257, V7).seal().to_vec(),
        with_data(Head::new(b"contiguous", b'7'), b"data"),
        Head::new(b"hard", b'1')
            .link(b"plain")
            .size(1000)
            .seal()
            .to_vec(),
        Head::new(b"soft", b'2').link(b"../x").seal().to_vec(),
        Head::new(b"char", b'3')
            .set(329, b"0000001\x000000003\0")
            .seal()
            .to_vec(),
        Head::new(b"block", b'4')
            .set(329, b"0000010\x000000002\0")
            .seal()
            .to_vec(),
        Head::new(b"fifo", b'6')
            .set(108, b"\x80\0\0\0\x7f\xff\xff\xff")
            .seal()
            .to_vec(),
        [long(b'L', &[b'n'; 300]), long(b'K', &[b'l'; 200])].concat(),
        Head::new(b"nnn", b'2')
            .set(257, GNU)
            .link(b"lll")
            .seal()
            .to_vec(),
        pax(
            b'x',
            &[
                (b"path", b"caf\xe9/\xff\n=x"),
                (b"size", b"600"),
                (b"mtime", b"-1.25"),
                (b"uid", b"3000000000"),
                (b"SCHILY.xattr.user.a", b"1\n2\x00\xff"),
                (b"LIBARCHIVE.xattr.user.b%20", b"AAEC/w"),
                (b"hdrcharset", b"BINARY"),
            ],
        ),
        [&Head::new(b"cafe", b'0').seal()[..], &padded(&[9; 600])].concat(),
        old_sparse(b"old-sparse", 60_000, &many, &[5; 420]),
        pax(
            b'x',
            &[
                (b"GNU.sparse.size", b"500"),
                (b"GNU.sparse.numblocks", b"2"),
                (b"GNU.sparse.offset", b"10"),
                (b"GNU.sparse.numbytes", b"3"),
                (b"GNU.sparse.offset", b"500"),
                (b"GNU.sparse.numbytes", b"0"),
            ],
        ),
        file(b"sparse-0.0", b"abc"),
        pax(
            b'x',
            &[
                (b"GNU.sparse.size", b"500"),
                (b"GNU.sparse.numblocks", b"2"),
                (b"GNU.sparse.map", b"0,3,400,100"),
            ],
        ),
        file(b"sparse-0.1", &[3; 103]),
        sparse_1_0(b"sparse-1.0", 200, map_1_0, &[2; 8]),
        END.to_vec(),
        b"garbage after the end".to_vec(),
    ]
    .concat()
}
