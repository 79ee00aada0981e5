//! Images in these tests are text: one entry a line, `<kind> <path> [argument]`.

use super::*;
use crate::{
    chunk,
    digest::ChunkDigest,
    index::{
        image::{FileType, ImageIndex, Ino},
        layer_index::LayerIndexBuilder,
        tree::WALKED_PER_LOOK,
    },
    tar::{TarEntry, TarExtent, TarKind},
};

/// Bytes of every layer: enough for the offsets that `f` gives its files.
const LAYER_BYTES: u64 = 1 << 20;

/// Makes a layer of lines: `f path N` file of N bytes, `d path`, `l path target` symlink, `h path
/// target` hard link, `c path` device, `w path` whiteout of path, `o path` opaque directory.
fn layer(text: &str) -> LayerIndex<Vec<u8>> {
    let mut builder = LayerIndexBuilder::default();
    for line in text.lines().map(str::trim).filter(|it| !it.is_empty()) {
        let mut words = line.split(' ');
        let (kind, path) = (words.next().unwrap(), words.next().unwrap());
        let argument = words.next().unwrap_or("0");
        let (directory, name) = path.rsplit_once('/').unwrap_or((".", path));
        let (path, kind) = match kind {
            "f" => {
                let size = argument.parse().unwrap();
                let extents = vec![TarExtent {
                    file_offset: 0,
                    layer_offset: 512,
                    len: size,
                }];
                (path.to_owned(), TarKind::File { size, extents })
            }
            "d" => (path.to_owned(), TarKind::Directory),
            "l" => (path.to_owned(), TarKind::Symlink(argument.into())),
            "h" => (path.to_owned(), TarKind::HardLink(argument.into())),
            "c" => (path.to_owned(), TarKind::CharDevice { major: 1, minor: 3 }),
            "w" => {
                let empty = TarKind::File {
                    size: 0,
                    extents: vec![],
                };
                (format!("{directory}/.wh.{name}"), empty)
            }
            "o" => {
                let empty = TarKind::File {
                    size: 0,
                    extents: vec![],
                };
                (format!("{path}/.wh..wh..opq"), empty)
            }
            other => panic!("kind {other}"),
        };
        let entry = TarEntry {
            path: path.into_bytes(),
            kind,
            mode: 0o700,
            uid: 7,
            gid: 8,
            mtime_seconds: 9,
            mtime_nanoseconds: 10,
            xattrs: vec![],
        };
        builder.push_entry(&entry).unwrap();
    }
    for _ in 0..chunk::n_chunks(LAYER_BYTES) {
        builder.push_chunk(&ChunkDigest::of(text.as_bytes()));
    }
    LayerIndex::decode(builder.finish(DiffId::of(text.as_bytes()), LAYER_BYTES)).unwrap()
}

fn merge(layers: &[&str]) -> Result<ImageIndex<Vec<u8>>, IndexError> {
    let mut merge = Merge::new(1000);
    for text in layers {
        merge.add_layer(&layer(text), BlobDigest::of(text.as_bytes()), 5)?;
    }
    let index = ImageIndex::open(merge.finish(ManifestDigest::of(b"image"))?)?;
    index.verify()?;
    Ok(index)
}

/// Lists all paths, each with what it is: `/` directory, `N` a file's bytes, `->` a link's target.
fn list(index: &ImageIndex<Vec<u8>>) -> String {
    fn walk(index: &ImageIndex<Vec<u8>>, ino: Ino, path: &str, lines: &mut Vec<String>) {
        let node = index.node(ino).unwrap();
        for at in 0..index.n_names(&node) {
            let (name, child) = index.name(&node, at).unwrap();
            assert_eq!(index.lookup(&node, name), Some(child));
            let path = format!("{path}{}", String::from_utf8_lossy(name));
            let node = index.node(child).unwrap();
            let what = match node.file_type {
                FileType::Directory => "/".to_owned(),
                FileType::Regular => format!(" {}", node.size),
                FileType::Symlink => {
                    let target = index.symlink_target(&node).unwrap();
                    format!(" -> {}", String::from_utf8_lossy(target))
                }
                other => format!(" {other:?}"),
            };
            let links = if node.n_links == 1 || node.file_type == FileType::Directory {
                String::new()
            } else {
                format!(" x{}", node.n_links)
            };
            lines.push(format!("{path}{what}{links}"));
            walk(index, child, &format!("{path}/"), lines);
        }
    }
    let mut lines = Vec::new();
    walk(index, Ino::ROOT, "", &mut lines);
    lines.join("; ")
}

#[test]
fn layers_merge_as_the_specification_says() {
    let cases: &[(&str, &[&str], &str)] = &[
        (
            "files of all layers are seen",
            &["f a 1", "f b 2"],
            "a 1; b 2",
        ),
        ("the upper file wins", &["f a 1", "f a 2"], "a 2"),
        ("the later of two entries wins", &["f a 1 \n f a 2"], "a 2"),
        (
            "a whiteout hides a lower file",
            &["f a 1 \n f b 1", "w a"],
            "b 1",
        ),
        (
            "a whiteout hides a lower tree",
            &["d a \n f a/b 1", "w a"],
            "",
        ),
        (
            "a whiteout after its sibling spares it",
            &["f a 1", "f a 2 \n w a"],
            "a 2",
        ),
        (
            "a whiteout before its sibling spares it",
            &["f a 1", "w a \n f a 2"],
            "a 2",
        ),
        (
            "a whiteout of nothing is no error",
            &["f a 1", "w b \n w c/d"],
            "a 1",
        ),
        (
            "a whiteout in the lowest layer is no error",
            &["w a \n f b 1"],
            "b 1",
        ),
        (
            "an opaque directory hides lower ones",
            &["f d/a 1", "o d \n f d/b 2"],
            "d/; d/b 2",
        ),
        (
            "an opaque marker may come last",
            &["f d/a 1", "f d/b 2 \n o d"],
            "d/; d/b 2",
        ),
        (
            "an opaque root hides all below",
            &["f a 1", "o . \n f b 2"],
            "b 2",
        ),
        (
            "opacity does not reach upper layers",
            &["o d", "f d/a 1"],
            "d/; d/a 1",
        ),
        (
            "a directory keeps its children",
            &["f d/a 1", "d d"],
            "d/; d/a 1",
        ),
        ("a file replaces a directory", &["f d/a 1", "f d 2"], "d 2"),
        (
            "a directory replaces a file",
            &["f d 2", "d d \n f d/a 1"],
            "d/; d/a 1",
        ),
        (
            "a directory replaces a link to one",
            &["d u \n l d u", "d d"],
            "d/; u/",
        ),
        (
            "a path leads through a link",
            &["d u \n l d u", "f d/a 1"],
            "d -> u; u/; u/a 1",
        ),
        (
            "absolute links stop at the root",
            &["l d /u", "f d/a 1"],
            "d -> /u; u/; u/a 1",
        ),
        (
            "links upwards stop at the root",
            &["l d ../../u", "f d/a 1"],
            "d -> ../../u; u/; u/a 1",
        ),
        (
            "missing parents are made",
            &["f a/b/c 1"],
            "a/; a/b/; a/b/c 1",
        ),
        (
            "paths stay in the tree",
            &["f ../../a 1 \n f /b 1 \n f c/../d 1"],
            "a 1; b 1; d 1",
        ),
        (
            "hard links share an inode",
            &["f a 1 \n h b a"],
            "a 1 x2; b 1 x2",
        ),
        (
            "hard links reach down",
            &["f a 1", "h b a"],
            "a 1 x2; b 1 x2",
        ),
        (
            "a renamed file is a link and a whiteout",
            &["f a 1", "h b a \n w a"],
            "b 1",
        ),
        ("in either order", &["f a 1", "w a \n h b a"], "b 1"),
        ("a name of two may go", &["f a 1 \n h b a", "w a"], "b 1"),
        (
            "a name of two may be replaced",
            &["f a 1 \n h b a", "f a 2"],
            "a 2; b 1",
        ),
        (
            "a link may be linked",
            &["l a x \n h b a"],
            "a -> x x2; b -> x x2",
        ),
        (
            "a hard link to itself is nothing",
            &["f a 1 \n h a a"],
            "a 1",
        ),
        ("devices are kept", &["c null"], "null CharDevice"),
        (
            "names that begin like whiteouts",
            &["f .whx 1 \n f .wh..wh.plnk 1"],
            ".whx 1",
        ),
        ("an empty layer changes nothing", &["f a 1", ""], "a 1"),
        ("no layer gives an empty root", &[], ""),
    ];
    for (name, layers, expected) in cases {
        assert_eq!(list(&merge(layers).unwrap()), *expected, "{name}");
    }
}

#[test]
fn files_with_the_longest_names_are_hidden() {
    for len in [251, 252, 255] {
        let name = "n".repeat(len);
        let lower = format!("f d/{name} 1 \n f d/a 2");
        let upper = format!("w d/{name}");
        assert_eq!(
            list(&merge(&[&lower, &upper]).unwrap()),
            "d/; d/a 2",
            "{len}"
        );
        // The lowest layer hides nothing, and what is written anew stays.
        let both = format!("{upper} \n f d/{name} 3");
        let expected = format!("d/; d/{name} 3");
        assert_eq!(list(&merge(&[&both]).unwrap()), expected, "{len}");
    }
    let name = "n".repeat(256);
    for text in [
        format!("f {name} 1"),
        format!("w {name}"),
        format!("f .wh..wh.{name} 1"),
    ] {
        let error = merge(&["", &text]).unwrap_err().to_string();
        assert!(error.contains("longer than 255 bytes"), "{text}: {error}");
    }
    // As an opaque marker is read by its whole name, a longer one is none.
    let longer = format!("f d/.wh..wh..opq{} 1", "n".repeat(247));
    assert_eq!(list(&merge(&["f d/a 1", &longer]).unwrap()), "d/; d/a 1");
}

#[test]
fn entries_that_cannot_be_applied_are_refused() {
    for (layers, reason) in [
        (&["f a 1 \n f a/b 1"][..], "parent is not a directory"),
        (&["h b a"][..], "does not exist"),
        (&["d a \n h b a"][..], "hard link to a directory"),
        (&["f a 1", "w a", "h b a"][..], "does not exist"),
        (&["l a b \n l b a \n f a/x 1"][..], "symlink loop"),
        (&["f ./ 1"][..], "root can only be a directory"),
    ] {
        let error = merge(layers).unwrap_err().to_string();
        assert!(error.contains(reason), "{layers:?}: {error}");
    }
    let many: String = (0..1001).map(|it| format!("f {it} 1\n")).collect();
    assert_eq!(
        merge(&[&many]).unwrap_err(),
        IndexError::Limit {
            limit: "max_index_nodes",
            max: 1000
        }
    );
}

/// Links `s0` to `s<n>`, each of which leads to the next one, and then `n_detours` times into a directory and back.
fn detours(n_links: usize, n_detours: usize) -> String {
    let detour = "/d/..".repeat(n_detours);
    let link = |at| format!("l s{at} s{}{detour}\n", at + 1);
    let links: String = (0..n_links).map(link).collect();
    format!("d d \n {links} l s{n_links} d")
}

#[test]
fn links_that_lead_one_path_too_far_are_refused() {
    // s0 | s1 and 1600 names | … | d.
    let far = format!("{}\n f s0/a 1", detours(5, 800));
    assert!(list(&merge(&[&far]).unwrap()).contains("; d/a 1; "));
    let too_far = format!("{}\n f s0/a 1", detours(6, 800));
    let error = merge(&[&too_far]).unwrap_err().to_string();
    assert!(error.contains("more than 8192 names"), "{error}");
    // Also where nothing is made on the way.
    for upper in ["h b s0/a", "w s0/a"] {
        let error = merge(&[&detours(6, 800), upper]).unwrap_err().to_string();
        assert!(error.contains("more than 8192 names"), "{upper}: {error}");
    }
}

#[test]
fn links_that_lead_all_paths_too_far_are_refused() {
    // By turns, so that no path's directory is that of the path before.
    let entry = |at| format!("\n f s{}/{at} 1", at % 2);
    let entries = |n| (0..n).map(entry).collect::<String>();
    let links = detours(5, 800);
    assert!(merge(&[&format!("{links}{}", entries(100))]).is_ok());
    let error = merge(&[&format!("{links}{}", entries(200))]).unwrap_err();
    let IndexError::Limit { limit, max } = error else {
        panic!("{error}");
    };
    assert_eq!(limit, "path components, those of links included");
    assert!((1 << 20..(1 << 20) + 300 * 64).contains(&max), "{max}");
}

#[test]
fn whiteouts_below_links_that_are_replaced_are_counted_too() {
    // Each way to a whiteout is compared with the replaced links: all of it, and all that it begins with.
    let deep = "d/".repeat(2000);
    let whiteouts = |n| {
        (0..n)
            .map(|at| format!("\n w {deep}{at}"))
            .collect::<String>()
    };
    let upper = |n| format!("d link{}", whiteouts(n));
    assert_eq!(list(&merge(&["l link a", &upper(10)]).unwrap()), "link/");
    assert_eq!(list(&merge(&["", &upper(30)]).unwrap()), "link/");
    let error = merge(&["l link a", &upper(30)]).unwrap_err().to_string();
    assert!(error.contains("path components"), "{error}");
}

#[test]
fn links_of_real_images_are_far_from_being_refused() {
    // As Debian has them, with a way of forty links, as long as Linux follows one.
    let mut lower = "l lib usr/lib \n l bin /usr/bin \n d usr/lib/jvm/java-21 \n \
        l usr/lib/jvm/default ../../../etc/alternatives/jvm \n l etc/alternatives/jvm /lib/jvm/java-21 \n"
        .to_owned();
    let deep = "a/b/c/d/e/f/g/h/i/j/k/l/m/n/o/p";
    for at in 0..39 {
        let next = at + 1;
        lower += &format!("l {deep}/{at} {}{deep}/{next}\n", "../".repeat(16));
    }
    lower += &format!("d {deep}/39");
    let mut upper = format!("f {deep}/0/x 1");
    for at in 0..200 {
        upper += &format!(
            "\n f lib/a{at}/b/c/d 1 \n f usr/lib/jvm/default/lib/{at} 1 \n h bin/{at} lib/a{at}/b/c/d"
        );
    }
    let mut merge = Merge::new(3000);
    let mut n_looks = 0;
    for (text, n_looks_each) in [(&lower, 1), (&upper, 3)] {
        let layer = layer(text);
        n_looks += n_looks_each * layer.n_entries();
        merge.add_layer(&layer, BlobDigest::of(b""), 5).unwrap();
    }
    let allowed = n_looks * WALKED_PER_LOOK;
    let walked = merge.tree.n_walked;
    assert!(walked * 5 < allowed, "{walked} of {allowed}");
    let index = ImageIndex::open(merge.finish(ManifestDigest::of(b"")).unwrap()).unwrap();
    let list = list(&index);
    for path in [
        format!("; {deep}/39/x 1;"),
        "; usr/lib/jvm/java-21/lib/7 1;".to_owned(),
        "; usr/bin/7 1 x2;".to_owned(),
    ] {
        assert!(list.contains(&path), "{path}");
    }
}

#[test]
fn the_same_image_has_the_same_bytes_and_inodes() {
    let layers = ["f b/z 1 \n f a/y 2 \n h c b/z", "d q"];
    let (one, other) = (merge(&layers).unwrap(), merge(&layers).unwrap());
    assert_eq!(**one.source(), **other.source());
    // Breadth first, names in byte order: root, a, b, c, q, a/y; b/z is c.
    let root = one.node(Ino::ROOT).unwrap();
    assert_eq!(one.lookup(&root, b"a"), Some(Ino(2)));
    assert_eq!(one.lookup(&root, b"c"), Some(Ino(4)));
    assert_eq!(one.lookup(&one.node(Ino(3)).unwrap(), b"z"), Some(Ino(4)));
    assert_eq!(one.node(Ino(6)).unwrap().parent(), Ino(2));
    assert_eq!(root.n_links, 2 + 3);
}

#[test]
fn golden_bytes() {
    // Format changed: raise NATIVE_VERSION, and say so in docs/INDEX_FORMAT.md.
    let index = merge(&["f a 1 \n l b a \n d d \n h d/c a"]).unwrap();
    let bytes = index.source();
    assert_eq!(&bytes[4096..4112], b"CLIPNATV\x01\0\0\0\0\0\0\0");
    assert_eq!(bytes.len(), 4848);
    assert_eq!(
        blake3::hash(bytes).to_hex().as_str(),
        "00933df58be845f189200649411be091fee387088273e1bef4addd46b2df028f"
    );
}

#[test]
fn every_flipped_bit_is_noticed_and_none_panics() {
    let good = merge(&["f a 1 \n l b a \n d d \n h d/c a"])
        .unwrap()
        .source()
        .clone();
    for bit in (0..54 * 8).chain(4096 * 8..good.len() * 8) {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        // The file type name of the clip header and reserved fields carry no meaning yet.
        let Ok(index) = ImageIndex::open(bad) else {
            continue;
        };
        for ino in 0..8 {
            let Some(node) = index.node(Ino(ino)) else {
                continue;
            };
            let _ = (
                index.name(&node, 0),
                index.lookup(&node, b"c"),
                index.symlink_target(&node),
            );
            let _ = (
                index.extents(&node, 0, 9).count(),
                index.xattrs(&node).count(),
            );
        }
        let meaningful = 4096 * 8 + 16 * 8 <= bit;
        assert!(!meaningful || index.verify().is_err(), "bit {bit}");
    }
}

#[test]
fn extents_are_cut_to_the_range() {
    let mut builder = LayerIndexBuilder::default();
    let extents = vec![
        TarExtent {
            file_offset: 10,
            layer_offset: 1000,
            len: 10,
        },
        TarExtent {
            file_offset: 30,
            layer_offset: 2000,
            len: 10,
        },
        TarExtent {
            file_offset: 50,
            layer_offset: 0,
            len: 0,
        },
    ];
    let entry = TarEntry {
        path: b"sparse".to_vec(),
        kind: TarKind::File { size: 50, extents },
        mode: 0,
        uid: 0,
        gid: 0,
        mtime_seconds: 0,
        mtime_nanoseconds: 0,
        xattrs: vec![
            (b"user.a".to_vec(), b"1".to_vec()),
            (b"user.b".to_vec(), vec![]),
            (b"security.selinux".to_vec(), b"x".to_vec()),
            (b"user.c".to_vec(), b"2".to_vec()),
        ],
    };
    builder.push_entry(&entry).unwrap();
    builder.push_chunk(&ChunkDigest::of(b""));
    let layer = LayerIndex::decode(builder.finish(DiffId::of(b""), 4096)).unwrap();
    let mut merge = Merge::new(10);
    merge.add_layer(&layer, BlobDigest::of(b""), 1).unwrap();
    let index = ImageIndex::open(merge.finish(ManifestDigest::of(b"")).unwrap()).unwrap();
    let node = index.node(Ino(2)).unwrap();
    let of = |offset, len| {
        let extents = index.extents(&node, offset, len);
        extents
            .map(|it| (it.file_offset, it.layer_offset, it.len))
            .collect::<Vec<_>>()
    };
    assert_eq!(of(0, 50), [(10, 1000, 10), (30, 2000, 10)]);
    assert_eq!(of(0, 10), []);
    assert_eq!(of(15, 20), [(15, 1005, 5), (30, 2000, 5)]);
    assert_eq!(of(19, 11), [(19, 1009, 1)]);
    assert_eq!(of(39, u64::MAX), [(39, 2009, 1)]);
    assert_eq!(of(20, 10), []);
    let xattrs: Vec<_> = index.xattrs(&node).collect();
    assert_eq!(
        xattrs,
        [(&b"user.a"[..], &b"1"[..]), (&b"user.c"[..], &b"2"[..])]
    );
}
