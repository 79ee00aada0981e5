//! Tests of the parsers of manifests, with hostile input.

use serde_json::{Value, json};

use super::*;

const OCI: &str = OCI_IMAGE_MEDIA_TYPE;
const INDEX: &str = OCI_IMAGE_INDEX_MEDIA_TYPE;

fn digest(n: u8) -> String {
    ManifestDigest::of(&[n]).to_string()
}

fn descriptor(media_type: &str, n: u8) -> Value {
    json!({"mediaType": media_type, "digest": digest(n), "size": 10})
}

fn image() -> Value {
    json!({
        "schemaVersion": 2,
        "mediaType": OCI,
        "config": descriptor(IMAGE_CONFIG_MEDIA_TYPE, 0),
        "layers": [descriptor(IMAGE_LAYER_GZIP_MEDIA_TYPE, 1)],
    })
}

/// `value` with the field at a JSON pointer replaced, or removed by `Value::Null`.
fn with(mut value: Value, pointer: &str, new: Value) -> Value {
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    match value.pointer_mut(parent).unwrap() {
        Value::Object(map) if new.is_null() => drop(map.remove(key)),
        Value::Object(map) => drop(map.insert(key.to_owned(), new)),
        Value::Array(list) => list[key.parse::<usize>().unwrap()] = new,
        other => panic!("{other}"),
    }
    value
}

fn parse_value(value: &Value, content_type: Option<&str>) -> Result<Manifest, Fault> {
    parse(value.to_string().as_bytes(), content_type)
}

fn parse_image(value: &Value) -> OciImageManifest {
    match parse_value(value, None).unwrap() {
        Manifest::Image(manifest) => *manifest,
        Manifest::Index(_) => panic!("an index"),
    }
}

fn config(value: &Value) -> ImageConfig {
    parse_config(value.to_string().as_bytes()).unwrap()
}

fn text(fault: Fault) -> String {
    match fault {
        Fault::Unsupported(text) => format!("unsupported: {text}"),
        Fault::Wrong(text) => format!("wrong: {text}"),
    }
}

#[test]
fn the_kind_is_found_by_media_type_then_header_then_fields() {
    let bare_image = with(image(), "/mediaType", Value::Null);
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": []});
    let bare_index = with(index.clone(), "/mediaType", Value::Null);
    for (value, content_type, is_index) in [
        (&image(), None, false),
        (&image(), Some("text/plain"), false),
        (&bare_image, None, false),
        (&bare_image, Some(OCI), false),
        (&bare_image, Some("application/json; charset=utf-8"), false),
        (
            &with(image(), "/mediaType", json!(IMAGE_MANIFEST_MEDIA_TYPE)),
            None,
            false,
        ),
        (&index, None, true),
        (&bare_index, None, true),
        (
            &bare_index,
            Some("application/vnd.oci.image.index.v1+json; charset=utf-8"),
            true,
        ),
        (
            &with(
                index.clone(),
                "/mediaType",
                json!(IMAGE_MANIFEST_LIST_MEDIA_TYPE),
            ),
            None,
            true,
        ),
    ] {
        let parsed = parse_value(value, content_type).unwrap();
        assert_eq!(
            matches!(parsed, Manifest::Index(_)),
            is_index,
            "{value} {content_type:?}"
        );
    }
}

#[test]
fn what_is_no_manifest_is_refused() {
    for (value, expected) in [
        (json!([]), "wrong: the manifest is not JSON of a manifest"),
        (json!({}), "wrong: the manifest's schemaVersion is not 2"),
        (
            json!({"schemaVersion": 1, "fsLayers": [], "history": []}),
            "unsupported: it is an image of schema 1",
        ),
        (
            with(image(), "/schemaVersion", json!(3)),
            "wrong: the manifest's schemaVersion",
        ),
        (
            with(image(), "/schemaVersion", json!("2")),
            "wrong: the manifest is not JSON",
        ),
        (
            with(image(), "/mediaType", json!("application/x")),
            "unsupported: it has the manifest type \"application/x\"",
        ),
        (
            with(image(), "/mediaType", json!(INDEX)),
            "wrong: the manifest is not what its media type says",
        ),
        (
            with(image(), "/manifests", json!([])),
            "wrong: the manifest is not what its media type says",
        ),
        (
            with(image(), "/layers", json!({})),
            "wrong: the manifest is malformed",
        ),
        (
            with(image(), "/config", Value::Null),
            "wrong: the manifest is malformed",
        ),
        (
            with(image(), "/layers/0/size", json!("10")),
            "wrong: the manifest is malformed",
        ),
        (
            with(image(), "/layers/0/size", json!(1e30)),
            "wrong: the manifest is malformed",
        ),
        (
            json!({"schemaVersion": 2}),
            "wrong: the manifest is not what its media type says",
        ),
    ] {
        let fault = text(parse_value(&value, None).unwrap_err());
        assert!(fault.starts_with(expected), "{value}: {fault}");
    }
    assert!(parse(b"", None).is_err());
    assert!(parse(b"{\"schemaVersion\":2,\"schemaVersion\":2}", None).is_err());
    assert!(parse("[".repeat(100_000).as_bytes(), None).is_err());
}

#[test]
fn artifacts_are_no_images() {
    let helm = with(
        image(),
        "/config/mediaType",
        json!("application/vnd.cncf.helm.config.v1+json"),
    );
    let fault = text(config_desc(&parse_image(&helm)).unwrap_err());
    assert_eq!(
        fault,
        "unsupported: it is an artifact of type \"application/vnd.cncf.helm.config.v1+json\", not a container image"
    );
    let docker = with(
        image(),
        "/config/mediaType",
        json!(IMAGE_DOCKER_CONFIG_MEDIA_TYPE),
    );
    assert_eq!(config_desc(&parse_image(&docker)).unwrap().size_bytes, 10);
}

#[test]
fn layers_are_joined_with_their_diff_ids() {
    let manifest = parse_image(&image());
    let config = config(&json!({"rootfs": {"type": "layers", "diff_ids": [digest(9)]}}));
    let layer = LayerDesc {
        diff_id: DiffId::of(&[9]),
        blob: BlobDigest::of(&[1]),
        blob_bytes: 10,
        toc: None,
    };
    assert_eq!(layers(&manifest, &config, 1), Ok(vec![layer]));
}

#[test]
fn layers_that_cannot_be_mounted_are_refused() {
    let good = json!({"rootfs": {"diff_ids": [digest(9)]}});
    let typed = |it: &str| with(image(), "/layers/0/mediaType", json!(it));
    for (manifest, config_value, expected) in [
        (
            image(),
            json!({}),
            "wrong: the manifest has 1 layers, but its configuration has 0 diff_ids",
        ),
        (
            image(),
            json!({"rootfs": {"diff_ids": [digest(1), digest(2)]}}),
            "wrong: the manifest has 1 layers, but its configuration has 2",
        ),
        (
            image(),
            json!({"rootfs": {"diff_ids": ["sha256:../x"]}}),
            "wrong: diff_ids: digest",
        ),
        (
            with(image(), "/layers/0/size", json!(-1)),
            good.clone(),
            "wrong: the manifest gives a blob the size -1",
        ),
        (
            with(image(), "/layers/0/size", json!(i64::MAX)),
            good.clone(),
            "wrong: the manifest gives a blob the size 9223372036854775807",
        ),
        (
            with(image(), "/layers/0/digest", json!("sha512:00")),
            good.clone(),
            "wrong: the manifest: digest",
        ),
        (
            typed("application/vnd.oci.image.layer.v1.tar+gzip+encrypted"),
            good.clone(),
            "unsupported: a layer of it is encrypted",
        ),
        (
            typed("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
            good.clone(),
            "unsupported: a layer of it is not in the registry",
        ),
        (
            typed("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"),
            good.clone(),
            "unsupported: a layer of it is not in the registry",
        ),
        (
            typed("application/vnd.x"),
            good.clone(),
            "unsupported: a layer of it has the type \"application/vnd.x\"",
        ),
    ] {
        let fault = layers(&parse_image(&manifest), &config(&config_value), 8).unwrap_err();
        let fault = text(fault);
        assert!(fault.starts_with(expected), "{fault}");
    }
    let fault = layers(&parse_image(&image()), &config(&good), 0).unwrap_err();
    assert!(text(fault).contains("1 layers, more than max_layers = 0"));
}

#[test]
fn the_best_fitting_platform_is_chosen() {
    let entry = |n: u8, platform: Option<&str>, media_type: &str| {
        let mut entry = descriptor(media_type, n);
        if let Some(platform) = platform {
            let parts: Vec<&str> = platform.split('/').collect();
            entry["platform"] = json!({"os": parts[0], "architecture": parts[1]});
            if let Some(variant) = parts.get(2) {
                entry["platform"]["variant"] = json!(variant);
            }
        }
        entry
    };
    let of = |n: u8| ManifestDigest::of(&[n]);
    for (entries, wanted, expected) in [
        (
            vec![
                entry(1, Some("linux/arm64/v8"), OCI),
                entry(2, Some("linux/amd64"), OCI),
                entry(3, Some("unknown/unknown"), OCI),
            ],
            "linux/amd64",
            Choice::Manifest(of(2)),
        ),
        (
            vec![
                entry(1, Some("linux/arm64/v8"), OCI),
                entry(2, Some("linux/amd64"), OCI),
            ],
            "linux/arm64",
            Choice::Manifest(of(1)),
        ),
        (
            vec![
                entry(1, Some("linux/arm"), OCI),
                entry(2, Some("linux/arm/v6"), OCI),
                entry(3, Some("linux/arm/v7"), OCI),
            ],
            "linux/arm/v7",
            Choice::Manifest(of(3)),
        ),
        (
            vec![
                entry(1, Some("linux/amd64/v3"), OCI),
                entry(2, Some("linux/amd64"), OCI),
            ],
            "linux/amd64",
            Choice::Manifest(of(2)),
        ),
        (
            vec![
                entry(1, Some("linux/s390x"), OCI),
                entry(3, Some("unknown/unknown"), OCI),
            ],
            "linux/amd64",
            Choice::None(vec!["linux/s390x".to_owned()]),
        ),
        (
            vec![entry(1, None, OCI)],
            "linux/amd64",
            Choice::Manifest(of(1)),
        ),
        (
            vec![entry(1, None, INDEX), entry(2, None, INDEX)],
            "linux/amd64",
            Choice::Nested(vec![of(1), of(2)]),
        ),
        (
            vec![entry(1, Some("linux/amd64"), "application/x")],
            "linux/amd64",
            Choice::None(vec![]),
        ),
        (vec![], "linux/amd64", Choice::None(vec![])),
    ] {
        let value = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries});
        let Manifest::Index(index) = parse_value(&value, None).unwrap() else {
            panic!("no index");
        };
        assert_eq!(
            choose(&index, &wanted.parse().unwrap()),
            Ok(expected),
            "{value}"
        );
    }
}

#[test]
fn no_document_makes_a_parser_panic() {
    proptest::proptest!(|(cut in 0..400usize, at in 0..400usize, byte: u8)| {
        let mut bytes = image().to_string().into_bytes();
        let at = at % bytes.len();
        bytes[at] = byte;
        bytes.truncate(bytes.len() - cut % bytes.len());
        if let Ok(Manifest::Image(manifest)) = parse(&bytes, None) {
            let config = config(&json!({"rootfs": {"diff_ids": [digest(9)]}}));
            let _ = (config_desc(&manifest), layers(&manifest, &config, 8));
        }
        let _ = parse_config(&bytes);
    });
}
