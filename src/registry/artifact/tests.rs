use super::*;
use crate::registry::manifest::{self, Manifest};

fn key(byte: u8) -> IntegrityKey {
    IntegrityKey::new(&[byte; 32]).unwrap()
}

fn subject() -> Subject {
    Subject {
        media_type: OCI_IMAGE_MEDIA_TYPE.to_owned(),
        digest: ManifestDigest::from_bytes([0x11; 32]),
        size_bytes: 321,
    }
}

fn parts() -> Vec<Part> {
    let part = |kind, digest: u8, size_bytes| Part {
        kind,
        layer: DiffId::from_bytes([0x22; 32]),
        layer_blob: BlobDigest::from_bytes([0x33; 32]),
        digest: BlobDigest::from_bytes([digest; 32]),
        size_bytes,
    };
    vec![
        part(PartKind::LayerIndex, 0x44, 5),
        part(PartKind::AccessMap, 0x55, 0x0102),
    ]
}

fn parse(bytes: &[u8]) -> Result<Artifact, Fault> {
    match manifest::parse(bytes, None)? {
        Manifest::Image(manifest) => Artifact::parse(&manifest),
        Manifest::Index(_) => panic!("an index"),
    }
}

/// Changed? Then it is another artifact type; say so in docs/INDEX_FORMAT.md.
#[test]
fn golden_bytes_of_what_is_authenticated() {
    let content = [
        "636c69702d6373692e696e6465782e763100",
        &"11".repeat(32), // subject
        "01",             // layer index
        &"22".repeat(32), // DiffId
        &"33".repeat(32), // the layer's blob
        &"44".repeat(32), // digest
        "0500000000000000",
        "02", // access map
        &"22".repeat(32),
        &"33".repeat(32),
        &"55".repeat(32),
        "0201000000000000",
    ]
    .concat();
    let bytes = authenticated(&subject().digest, &parts());
    assert_eq!(to_hex(&bytes), content);
    // Computed by Python's hmac over the same bytes, with 32 times 7 as the key.
    let tag = "e9548b91f743df518d39098306a40cb7f93cd7b7d0a492b532e4cd6e317ad357";
    assert_eq!(to_hex(&key(7).tag(&bytes)), tag);
    let manifest: Value =
        serde_json::from_slice(&encode(&subject(), &parts(), Some(&key(7)))).unwrap();
    assert_eq!(manifest["annotations"]["dev.clip-csi.hmac-sha256"], tag);
    let digest = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";
    assert_eq!(manifest["config"]["digest"], digest);
    assert_eq!(manifest["layers"][0]["mediaType"], LAYER_INDEX_MEDIA_TYPE);
    assert_eq!(
        manifest["subject"]["digest"],
        subject().digest.to_string().as_str()
    );
}

#[test]
fn an_artifact_survives_encode_and_parse() {
    for key in [None, Some(key(1))] {
        let bytes = encode(&subject(), &parts(), key.as_ref());
        assert_eq!(bytes, encode(&subject(), &parts(), key.as_ref()));
        let artifact = parse(&bytes).unwrap();
        assert_eq!(artifact.subject, subject().digest);
        assert_eq!(artifact.parts, parts());
        assert_eq!(artifact.tag.is_some(), key.is_some());
        let layer = DiffId::from_bytes([0x22; 32]);
        for (kind, part) in [PartKind::LayerIndex, PartKind::AccessMap]
            .iter()
            .zip(&parts())
        {
            assert_eq!(artifact.part(*kind, &layer), Some(part));
            assert_eq!(artifact.part(*kind, &DiffId::of(b"other")), None);
        }
    }
}

#[test]
fn only_the_installations_key_vouches_and_for_every_field() {
    let good = parse(&encode(&subject(), &parts(), Some(&key(1)))).unwrap();
    assert!(good.is_authenticated_by(&key(1)));
    assert!(!good.is_authenticated_by(&key(2)));
    let unsigned = parse(&encode(&subject(), &parts(), None)).unwrap();
    assert!(!unsigned.is_authenticated_by(&key(1)));
    let changes: [fn(&mut Artifact); 9] = [
        |it| it.subject = ManifestDigest::of(b"other"),
        |it| it.parts[0].kind = PartKind::AccessMap,
        |it| it.parts[0].layer = DiffId::of(b"other"),
        |it| it.parts[0].layer_blob = BlobDigest::of(b"other"),
        |it| it.parts[0].digest = BlobDigest::of(b"other"),
        |it| it.parts[0].size_bytes += 1,
        |it| it.parts.swap(0, 1),
        |it| {
            it.parts.pop();
        },
        |it| it.tag = it.tag.map(|it| it.map(|byte| byte ^ 1)),
    ];
    for (nth, change) in changes.iter().enumerate() {
        let mut artifact = good.clone();
        change(&mut artifact);
        assert!(!artifact.is_authenticated_by(&key(1)), "change {nth}");
    }
}

#[test]
fn what_is_no_artifact_of_ours_is_refused() {
    let good = || -> Value { serde_json::from_slice(&encode(&subject(), &parts(), None)).unwrap() };
    let refused = |change: fn(&mut Value)| {
        let mut manifest = good();
        change(&mut manifest);
        parse(manifest.to_string().as_bytes()).unwrap_err()
    };
    assert!(parse(good().to_string().as_bytes()).is_ok());
    for (change, expected) in [
        (
            (|it: &mut Value| it["artifactType"] = json!("application/x")) as fn(&mut Value),
            "no index of this driver",
        ),
        (
            |it| {
                it.as_object_mut().unwrap().remove("subject");
            },
            "no usable subject",
        ),
        (
            |it| it["subject"]["digest"] = json!("sha512:00"),
            "no usable subject",
        ),
        (
            |it| it["layers"][0]["annotations"] = json!({}),
            "describes a blob wrongly",
        ),
        (
            |it| it["layers"][1]["digest"] = json!("md5:0"),
            "describes a blob wrongly",
        ),
        (
            |it| it["layers"][1]["size"] = json!(-1),
            "describes a blob wrongly",
        ),
        (
            |it| it["layers"][1]["size"] = json!(i64::MAX),
            "describes a blob wrongly",
        ),
        (
            |it| it["annotations"] = json!({AUTHENTICATION: "00"}),
            "malformed authentication code",
        ),
    ] {
        let (Fault::Unsupported(text) | Fault::Wrong(text)) = refused(change);
        assert!(text.contains(expected), "{text}");
    }
    let mut later = good();
    later["layers"].as_array_mut().unwrap().push(json!({
        "mediaType": "application/vnd.clip-csi.profile.v1", "digest": "sha256:x", "size": 1,
    }));
    assert_eq!(
        parse(later.to_string().as_bytes()).unwrap().parts,
        parts(),
        "what a later release adds is passed over"
    );
}

fn index(bytes: &[u8]) -> OciImageIndex {
    match manifest::parse(bytes, None).unwrap() {
        Manifest::Index(index) => index,
        Manifest::Image(_) => panic!("an image"),
    }
}

#[test]
fn the_tag_lists_each_artifact_once_and_keeps_what_others_put_there() {
    let signed = encode(&subject(), &parts(), Some(&key(1)));
    let unsigned = encode(&subject(), &parts(), None);
    let first = with_referrer(None, &signed).unwrap().unwrap();
    assert_eq!(with_referrer(Some(&first), &signed).unwrap(), None);
    let second = with_referrer(Some(&first), &unsigned).unwrap().unwrap();
    let listed: Vec<_> = index(&second)
        .manifests
        .iter()
        .map(|it| it.digest.clone())
        .collect();
    let digest = |it: &[u8]| ManifestDigest::of(it).to_string();
    assert_eq!(listed, [digest(&signed), digest(&unsigned)]);

    let foreign = json!({
        "schemaVersion": 2, "mediaType": OCI_IMAGE_INDEX_MEDIA_TYPE, "x-unknown": {"a": 1},
        "manifests": [{
            "mediaType": OCI_IMAGE_MEDIA_TYPE, "digest": "sha512:abc", "size": 3,
            "artifactType": "application/vnd.example.sbom", "x-more": true,
        }],
    });
    let merged = with_referrer(Some(foreign.to_string().as_bytes()), &signed).unwrap();
    let merged: Value = serde_json::from_slice(&merged.unwrap()).unwrap();
    assert_eq!(merged["x-unknown"], foreign["x-unknown"]);
    assert_eq!(merged["manifests"][0], foreign["manifests"][0]);
    assert_eq!(merged["manifests"][1]["artifactType"], ARTIFACT_TYPE);
    for wrong in ["", "[]", "{}", r#"{"manifests": {}}"#] {
        assert!(
            with_referrer(Some(wrong.as_bytes()), &signed).is_err(),
            "{wrong}"
        );
    }
}

#[test]
fn the_authenticated_and_the_latest_are_looked_at_first_and_few_in_all() {
    let entry = |name: &str, change: &Value| {
        let mut entry = json!({
            "mediaType": OCI_IMAGE_MEDIA_TYPE, "size": 100, "artifactType": ARTIFACT_TYPE,
            "digest": ManifestDigest::of(name.as_bytes()),
        });
        for (name, value) in change.as_object().unwrap() {
            entry[name] = value.clone();
        }
        entry
    };
    let signed = json!({"annotations": {AUTHENTICATION: "00"}});
    let chosen = |entries: &[Value]| {
        let list = json!({
            "schemaVersion": 2, "mediaType": OCI_IMAGE_INDEX_MEDIA_TYPE, "manifests": entries,
        });
        candidates(&index(list.to_string().as_bytes()), 1000)
    };
    let digests = |names: &[&str]| -> Vec<_> {
        let names = names.iter();
        names.map(|it| ManifestDigest::of(it.as_bytes())).collect()
    };
    let none = json!({});
    assert_eq!(
        chosen(&[
            entry("a", &signed),
            entry("b", &none),
            entry("c", &signed),
            entry("d", &none),
            entry("sbom", &json!({"artifactType": "application/x"})),
            entry("index", &json!({"mediaType": OCI_IMAGE_INDEX_MEDIA_TYPE})),
            entry("large", &json!({"size": 1001})),
            entry("negative", &json!({"size": -1})),
            entry("odd", &json!({"digest": "sha512:00"})),
        ]),
        digests(&["c", "a", "d", "b"])
    );
    let many: Vec<_> = (0..100).map(|it| entry(&it.to_string(), &none)).collect();
    assert_eq!(chosen(&many), digests(&["99", "98", "97", "96"]));
    assert_eq!(chosen(&[]), []);
}

proptest::proptest! {
    /// Errors are fine, panics are bugs.
    #[test]
    fn garbage_never_panics(text in "\\PC{0,60}", at in 0usize..400) {
        let mut bytes = encode(&subject(), &parts(), Some(&key(1)));
        let at = at.min(bytes.len());
        bytes.splice(at..(at + 1).min(bytes.len()), text.bytes());
        let _ = with_referrer(Some(&bytes), &bytes);
        if let Ok(Manifest::Image(manifest)) = manifest::parse(&bytes, None) {
            let _ = Artifact::parse(&manifest);
        }
    }
}
