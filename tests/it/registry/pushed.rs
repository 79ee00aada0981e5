//! Indexes that were pushed beside an image: found, believed or not, read.

use std::io;

use bytes::Bytes;
use serde_json::{Value, json};

use super::{
    Image, config,
    http_server::Reply,
    image_at,
    memory::{Api, MemoryRegistry},
    user,
};
use clip_csi::{
    digest::{BlobDigest, DiffId, ManifestDigest},
    integrity::IntegrityKey,
    metrics::Metrics,
    registry::{Credentials, LayerPush, PushedIndexOptions, RegistryClient, RegistryConfig},
    tier::{KeepPushed, PushedPart, SourceError},
};

const MAX_INDEX_BYTES: u64 = 1 << 20;

fn key(byte: u8) -> IntegrityKey {
    IntegrityKey::new(&[byte; 32]).unwrap()
}

fn layer() -> DiffId {
    DiffId::of(b"tar")
}

fn index() -> Bytes {
    Bytes::from(b"an index, which this module does not look into ".repeat(1000))
}

const ACCESS_MAP: &[u8] = b"an access map";

/// What was kept of a layer.
#[derive(Debug, Default, PartialEq, Eq)]
struct Kept {
    index: Vec<u8>,
    access_map: Option<Vec<u8>>,
    part: Option<PushedPart>,
    /// How many bytes came at once, at most.
    most_bytes: usize,
    /// How many bytes there is room for.
    room_bytes: Option<usize>,
}

impl KeepPushed for Kept {
    fn begin(&mut self, part: PushedPart) -> io::Result<()> {
        match part {
            PushedPart::Index => self.index.clear(),
            PushedPart::AccessMap => self.access_map = Some(Vec::new()),
        }
        self.part = Some(part);
        Ok(())
    }

    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.most_bytes = self.most_bytes.max(bytes.len());
        match self.part.unwrap() {
            PushedPart::Index => self.index.extend(bytes),
            PushedPart::AccessMap => self.access_map.as_mut().unwrap().extend(bytes),
        }
        match self.room_bytes {
            Some(room_bytes) if room_bytes < self.index.len() => {
                Err(io::ErrorKind::StorageFull.into())
            }
            _ => Ok(()),
        }
    }
}

/// A layer's index and access map.
type Pushed = (Vec<u8>, Option<Vec<u8>>);

fn pushed() -> Pushed {
    (index().to_vec(), Some(ACCESS_MAP.to_vec()))
}

fn layer_push(image: &Image) -> LayerPush {
    LayerPush {
        diff_id: layer(),
        blob: image.blob(),
        index: index(),
        access_map: Some(Bytes::from_static(ACCESS_MAP)),
    }
}

/// A client of an installation with `key`, and its metrics.
fn node(config: RegistryConfig, key: Option<IntegrityKey>) -> (RegistryClient, Metrics) {
    let metrics = Metrics::new();
    let options = PushedIndexOptions {
        key,
        max_index_bytes: MAX_INDEX_BYTES,
    };
    let client = RegistryClient::new(config, metrics.clone()).unwrap();
    (client.with_pushed_indexes(options), metrics)
}

fn plain(registry: &MemoryRegistry) -> RegistryConfig {
    config(&[registry.host()])
}

/// Pushes the image's index with a key or without.
async fn push(
    registry: &MemoryRegistry,
    image: &Image,
    key: Option<&IntegrityKey>,
) -> ManifestDigest {
    let (client, _) = node(plain(registry), None);
    let at = image_at(&registry.host());
    let layers = [layer_push(image), layer_push(image)];
    let pushed = client
        .push_index(&at, &Credentials::Anonymous, image.digest(), &layers, key)
        .await;
    pushed.unwrap().artifact
}

/// What a node finds for the image's layer.
async fn find(
    client: &RegistryClient,
    registry: &MemoryRegistry,
    image: &Image,
    pinned: Option<ManifestDigest>,
) -> Result<Option<Pushed>, SourceError> {
    let at = image_at(&registry.host());
    let blobs = client.image_blobs(&at, &Credentials::Anonymous, image.digest(), pinned);
    let mut kept = Kept::default();
    let found = blobs.layer_index(&layer(), &mut kept).await?;
    Ok(found.then_some((kept.index, kept.access_map)))
}

fn lookups(metrics: &Metrics, outcome: &str) -> u64 {
    let counter = &metrics.pushed_index_lookups;
    counter.with_label_values(&[outcome]).get()
}

#[tokio::test]
async fn what_was_pushed_is_found_with_the_referrers_api_and_without() {
    let image = Image::new();
    for api in [Api::Present, Api::Absent] {
        let registry = MemoryRegistry::start(&image, api).await;
        let artifact = push(&registry, &image, Some(&key(1))).await;
        let again = push(&registry, &image, Some(&key(1))).await;
        assert_eq!(artifact, again, "the same content has the same digest");
        let tag = format!("sha256-{}", image.digest().hex());
        let tagged = registry
            .content
            .lock()
            .unwrap()
            .manifests
            .get(&tag)
            .cloned();
        assert_eq!(tagged.is_some(), api == Api::Absent);
        if let Some(tagged) = tagged {
            let tagged: Value = serde_json::from_slice(&tagged).unwrap();
            assert_eq!(tagged["manifests"].as_array().unwrap().len(), 1);
        }
        let (client, metrics) = node(plain(&registry), Some(key(1)));
        let found = find(&client, &registry, &image, None).await.unwrap();
        assert_eq!(found, Some(pushed()));
        assert_eq!(lookups(&metrics, "hit"), 1);
        // A second image of the registry: that it has no API is known.
        find(&client, &registry, &image, None).await.unwrap();
        let n_asked = registry.server.requests("/referrers/").len();
        assert_eq!(n_asked, if api == Api::Present { 2 } else { 1 });
        let pinned = find(&client, &registry, &image, Some(artifact)).await;
        assert_eq!(pinned.unwrap(), Some(pushed()));
    }
}

#[tokio::test]
async fn an_image_without_an_index_costs_two_requests_and_its_layers_share_them() {
    let image = Image::new();
    let registry = MemoryRegistry::start(&image, Api::Absent).await;
    let (client, metrics) = node(plain(&registry), Some(key(1)));
    let at = image_at(&registry.host());
    let blobs = client.image_blobs(&at, &Credentials::Anonymous, image.digest(), None);
    let layers: Vec<_> = (0..9u8).map(|it| DiffId::of(&[it])).collect();
    let asked = layers.iter().map(async |it| {
        let mut kept = Kept::default();
        let found = blobs.layer_index(it, &mut kept).await;
        assert_eq!((found.unwrap(), kept), (false, Kept::default()));
    });
    futures_util::future::join_all(asked).await;
    let requests = registry.server.requests("");
    let paths: Vec<_> = requests.iter().map(|it| it.path.as_str()).collect();
    assert_eq!(paths.len(), 2, "{paths:?}");
    assert!(paths[0].contains("/referrers/sha256:"), "{paths:?}");
    assert!(paths[1].contains("/manifests/sha256-"), "{paths:?}");
    assert_eq!(lookups(&metrics, "miss"), 9);
}

#[tokio::test]
async fn nothing_is_asked_where_nothing_could_be_believed() {
    let image = Image::new();
    let registry = MemoryRegistry::start(&image, Api::Present).await;
    let artifact = push(&registry, &image, Some(&key(1))).await;
    let before = registry.server.requests("").len();
    // No key.
    let (client, _) = node(plain(&registry), None);
    let found = find(&client, &registry, &image, None).await;
    assert_eq!(found.unwrap(), None);
    // Switched off, pinned or not.
    let off = RegistryConfig {
        use_pushed_indexes: false,
        ..plain(&registry)
    };
    let (client, _) = node(off, Some(key(1)));
    for pinned in [None, Some(artifact)] {
        let found = find(&client, &registry, &image, pinned).await;
        assert_eq!(found.unwrap(), None);
    }
    assert_eq!(registry.server.requests("").len(), before);
}

#[tokio::test]
async fn what_nobody_who_is_believed_vouches_for_is_not_used() {
    let image = Image::new();
    for (signed_with, trusts, expected) in [
        (
            Some(key(2)),
            false,
            "not authenticated by this installation's key",
        ),
        (None, false, "not authenticated by this installation's key"),
        (None, true, ""),
    ] {
        let registry = MemoryRegistry::start(&image, Api::Present).await;
        let artifact = push(&registry, &image, signed_with.as_ref()).await;
        let config = RegistryConfig {
            trust_pinned_indexes: trusts,
            ..plain(&registry)
        };
        let (client, metrics) = node(config, Some(key(1)));
        let found = find(&client, &registry, &image, None).await;
        assert_eq!(found.unwrap(), None);
        assert_eq!(lookups(&metrics, "untrusted"), 1);
        match find(&client, &registry, &image, Some(artifact)).await {
            Ok(found) => assert!(trusts && found == Some(pushed())),
            Err(error) => {
                assert!(!trusts, "{error}");
                assert!(error.to_string().contains(expected), "{error}");
                assert!(!error.is_transient());
            }
        }
    }
}

#[tokio::test]
async fn a_pin_that_is_wrong_is_an_error_that_says_so() {
    let image = Image::new();
    let registry = MemoryRegistry::start(&image, Api::Present).await;
    let artifact = push(&registry, &image, Some(&key(1))).await;
    let (client, _) = node(plain(&registry), Some(key(1)));
    let pin = |digest| find(&client, &registry, &image, Some(digest));

    let missing = ManifestDigest::of(b"missing");
    let error = pin(missing).await.unwrap_err();
    let expected = format!(
        "index {missing} was not found at {}: check the name, and that it was pushed",
        registry.host()
    );
    assert_eq!(error.to_string(), expected);

    let error = pin(image.digest()).await.unwrap_err().to_string();
    assert!(error.contains("it is no index of this driver"), "{error}");

    let other = Image::of_platform("arm64", &json!({}));
    let at = image_at(&registry.host());
    let blobs = client.image_blobs(&at, &Credentials::Anonymous, other.digest(), Some(artifact));
    let mut kept = Kept::default();
    let error = blobs.layer_index(&layer(), &mut kept).await.unwrap_err();
    let error = error.to_string();
    let expected = format!(
        "index {artifact}: it is of image manifest {}, not of {}: correct indexDigest",
        image.digest(),
        other.digest()
    );
    assert_eq!(error, expected);

    // It is right, and has nothing about a layer: that can be read without.
    let blobs = client.image_blobs(&at, &Credentials::Anonymous, image.digest(), Some(artifact));
    let found = blobs.layer_index(&DiffId::of(b"other"), &mut kept).await;
    assert!(!found.unwrap());
    assert_eq!(kept, Kept::default());
}

/// Replaces the blob of the layer's index, in the artifact as well if `refer` says so.
fn replace_index(registry: &MemoryRegistry, artifact: ManifestDigest, with: &[u8]) {
    let mut content = registry.content.lock().unwrap();
    let manifest: Value =
        serde_json::from_slice(&content.manifests[&artifact.to_string()]).unwrap();
    let digest = manifest["layers"][0]["digest"].as_str().unwrap().to_owned();
    content.blobs.insert(digest, with.to_vec());
}

#[tokio::test]
async fn blobs_that_are_not_what_was_signed_are_not_used() {
    let image = Image::new();
    let registry = MemoryRegistry::start(&image, Api::Present).await;
    let artifact = push(&registry, &image, Some(&key(1))).await;
    let packed = zstd::bulk::compress(&index(), 12).unwrap();
    let mut changed = packed.clone();
    changed[20] ^= 1;
    for (what, wrong) in [
        ("changed", changed),
        ("truncated", packed[..packed.len() - 1].to_vec()),
        ("longer", [&packed[..], b"x"].concat()),
        ("empty", Vec::new()),
    ] {
        replace_index(&registry, artifact, &wrong);
        let (client, metrics) = node(plain(&registry), Some(key(1)));
        let found = find(&client, &registry, &image, None).await;
        assert_eq!(found.unwrap(), None, "{what}");
        assert_eq!(lookups(&metrics, "error"), 1, "{what}");
        let error = find(&client, &registry, &image, Some(artifact)).await;
        assert!(
            matches!(
                error,
                Err(SourceError::Protocol { .. } | SourceError::Unavailable { .. })
            ),
            "{what}: {error:?}"
        );
    }
    replace_index(&registry, artifact, &packed);
    let (client, _) = node(plain(&registry), Some(key(1)));
    let found = find(&client, &registry, &image, None).await;
    assert_eq!(found.unwrap(), Some(pushed()));
}

/// What is pushed may be larger than all that the process should hold.
#[tokio::test]
async fn an_index_comes_in_small_pieces() {
    let image = Image::new();
    let registry = MemoryRegistry::start(&image, Api::Present).await;
    let (client, _) = node(plain(&registry), Some(key(1)));
    let at = image_at(&registry.host());
    let large = Bytes::from(vec![7; usize::try_from(MAX_INDEX_BYTES).unwrap()]);
    let layers = [LayerPush {
        index: large.clone(),
        ..layer_push(&image)
    }];
    let (anybody, signed) = (Credentials::Anonymous, Some(&key(1)));
    let pushed = client.push_index(&at, &anybody, image.digest(), &layers, signed);
    pushed.await.unwrap();
    let blobs = client.image_blobs(&at, &anybody, image.digest(), None);
    let mut kept = Kept::default();
    assert!(blobs.layer_index(&layer(), &mut kept).await.unwrap());
    assert_eq!(kept.index, large);
    assert!(kept.most_bytes <= 64 << 10, "{}", kept.most_bytes);
    // Where it does not fit, it is not said to be there.
    let mut kept = Kept {
        room_bytes: Some(100_000),
        ..Kept::default()
    };
    assert!(!blobs.layer_index(&layer(), &mut kept).await.unwrap());
    assert!(kept.index.len() < 200_000, "it went on");
}

#[tokio::test]
async fn a_mirror_that_has_another_index_is_passed_over() {
    let image = Image::new();
    let origin = MemoryRegistry::start(&image, Api::Present).await;
    let mirror = MemoryRegistry::start(&image, Api::Present).await;
    let artifact = push(&origin, &image, Some(&key(1))).await;
    push(&mirror, &image, Some(&key(1))).await;
    let mut wrong = zstd::bulk::compress(&index(), 12).unwrap();
    let len = wrong.len();
    wrong[len - 5] ^= 1;
    replace_index(&mirror, artifact, &wrong);
    let mut config = config(&[origin.host(), mirror.host()]);
    config.hosts.get_mut(&origin.host()).unwrap().mirrors = vec![mirror.host()];
    let (client, _) = node(config, Some(key(1)));
    let n_asked = || {
        let requests = [&mirror, &origin].map(|it| it.server.requests("/blobs/sha256:"));
        requests.map(|it| it.iter().filter(|it| it.method == "GET").count())
    };
    assert_eq!(n_asked(), [0, 0]);
    for pinned in [None, Some(artifact)] {
        let found = find(&client, &origin, &image, pinned).await;
        assert_eq!(found.unwrap(), Some(pushed()));
    }
    // For index and access map, twice; and for the index again.
    assert_eq!(n_asked(), [4, 2]);
}

#[tokio::test]
async fn a_bomb_is_refused_although_it_is_signed() {
    let image = Image::new();
    let registry = MemoryRegistry::start(&image, Api::Present).await;
    let at = image_at(&registry.host());
    let (client, _) = node(plain(&registry), Some(key(1)));
    let bomb = LayerPush {
        index: vec![0; 2 << 20].into(),
        ..layer_push(&image)
    };
    let pushed = client
        .push_index(
            &at,
            &Credentials::Anonymous,
            image.digest(),
            &[bomb],
            Some(&key(1)),
        )
        .await;
    let artifact = pushed.unwrap().artifact;
    assert_eq!(find(&client, &registry, &image, None).await.unwrap(), None);
    let error = find(&client, &registry, &image, Some(artifact)).await;
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("is longer than cache.max_layer_index_bytes = 1048576"),
        "{error}"
    );
}

#[tokio::test]
async fn a_good_artifact_is_found_among_bad_ones() {
    let image = Image::new();
    let registry = MemoryRegistry::start(&image, Api::Absent).await;
    push(&registry, &image, Some(&key(1))).await;
    push(&registry, &image, Some(&key(2))).await;
    push(&registry, &image, None).await;
    let (client, _) = node(plain(&registry), Some(key(1)));
    let found = find(&client, &registry, &image, None).await;
    assert_eq!(found.unwrap(), Some(pushed()));
}

#[tokio::test]
async fn a_registry_that_fails_is_asked_once_and_the_image_does_without() {
    let image = Image::new();
    for status in [500, 503, 429, 403, 418, 302] {
        let registry = MemoryRegistry::scripted(&image, Api::Present, move |request, _| {
            let is_asked = request.path.contains("/referrers/");
            is_asked.then(|| Reply::new(status, ""))
        })
        .await;
        let (client, metrics) = node(plain(&registry), Some(key(1)));
        let found = find(&client, &registry, &image, None).await;
        assert_eq!(found.unwrap(), None, "{status}");
        assert_eq!(lookups(&metrics, "error"), 1, "{status}");
        assert_eq!(registry.server.requests("").len(), 1, "{status}");
    }
}

#[tokio::test]
async fn a_mirror_that_knows_no_index_is_not_the_last_word() {
    let image = Image::new();
    let origin = MemoryRegistry::start(&image, Api::Absent).await;
    let mirror = MemoryRegistry::start(&image, Api::Present).await;
    push(&origin, &image, Some(&key(1))).await;
    let mut config = config(&[origin.host(), mirror.host()]);
    config.hosts.get_mut(&origin.host()).unwrap().mirrors = vec![mirror.host()];
    let (client, _) = node(config, Some(key(1)));
    let found = find(&client, &origin, &image, None).await;
    assert_eq!(found.unwrap(), Some(pushed()));
    assert_eq!(mirror.server.requests("/referrers/").len(), 1);
}

#[tokio::test]
async fn a_lost_write_of_the_tag_is_made_good() {
    let image = Image::new();
    let other = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 3,
            "digest": ManifestDigest::of(b"sbom"), "artifactType": "application/vnd.example.sbom",
        }],
    });
    let tag = format!("sha256-{}", image.digest().hex());
    let (name, theirs) = (tag.clone(), other.to_string().into_bytes());
    let n_written = std::sync::atomic::AtomicU32::new(0);
    let registry = MemoryRegistry::scripted(&image, Api::Absent, move |request, content| {
        let is_write = request.method == "PUT" && request.path.ends_with(&name);
        if is_write && n_written.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0 {
            // Somebody who had read before writes after.
            content.manifests.insert(name.clone(), theirs.clone());
            return Some(Reply::new(201, ""));
        }
        None
    })
    .await;
    let artifact = push(&registry, &image, Some(&key(1))).await;
    let tagged = registry.content.lock().unwrap().manifests[&tag].clone();
    let tagged: Value = serde_json::from_slice(&tagged).unwrap();
    let listed: Vec<_> = tagged["manifests"].as_array().unwrap().iter().collect();
    assert_eq!(listed.len(), 2, "{tagged}");
    assert_eq!(listed[0], &other["manifests"][0]);
    assert_eq!(listed[1]["digest"], artifact.to_string().as_str());
}

#[tokio::test]
async fn who_may_not_push_is_told_so() {
    let image = Image::new();
    for status in [401, 403] {
        let registry = MemoryRegistry::scripted(&image, Api::Present, move |request, _| {
            let is_write = !matches!(request.method.as_str(), "GET" | "HEAD");
            is_write.then(|| Reply::new(status, "{}").with("www-authenticate", "Basic realm=\"r\""))
        })
        .await;
        let (client, _) = node(plain(&registry), None);
        let at = image_at(&registry.host());
        let error = client
            .push_index(
                &at,
                &user("hunter2"),
                image.digest(),
                &[layer_push(&image)],
                None,
            )
            .await
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("give some with the right to push"),
            "{error}"
        );
        assert!(!error.contains("hunter2"), "{error}");
    }
}

#[tokio::test]
async fn a_token_to_push_is_asked_for_and_goes_to_the_registry_alone() {
    let image = Image::new();
    let store = MemoryRegistry::start(&image, Api::Present).await;
    let tokens =
        super::http_server::HttpServer::start(|_| Reply::new(200, r#"{"token":"t"}"#)).await;
    let realm = format!("http://{}/token", tokens.host());
    let elsewhere = store.host();
    let registry = MemoryRegistry::scripted(&image, Api::Present, move |request, _| {
        if request.header("authorization") != Some("Bearer t") {
            let challenge =
                format!(r#"Bearer realm="{realm}",service="r",scope="repository:team/app:pull""#);
            return Some(Reply::new(401, "{}").with("www-authenticate", challenge));
        }
        // As registries do whose blobs are in an object store.
        (request.method == "POST").then(|| {
            let location = format!("http://{elsewhere}/v2/team/app/blobs/uploads/7?state=x");
            Reply::new(202, "").with("location", location)
        })
    })
    .await;
    let hosts = [registry.host(), store.host(), tokens.host()];
    let (client, _) = node(config(&hosts), None);
    let at = image_at(&registry.host());
    let layers = [layer_push(&image)];
    client
        .push_index(&at, &user("x"), image.digest(), &layers, None)
        .await
        .unwrap();
    let asked = tokens.requests("");
    assert_eq!(asked.len(), 1);
    assert_eq!(
        asked[0].path,
        "/token?service=r&scope=repository%3Ateam%2Fapp%3Apull%2Cpush"
    );
    let uploads = store.server.requests("uploads");
    assert_eq!(uploads.len(), 3);
    for upload in uploads {
        assert_eq!(upload.header("authorization"), None);
    }
    let empty = BlobDigest::of(b"{}").to_string();
    assert!(store.content.lock().unwrap().blobs.contains_key(&empty));
}

#[tokio::test]
async fn what_fails_for_a_while_is_pushed_again_and_what_is_there_is_not() {
    let image = Image::new();
    let failures = [
        ("POST", "uploads"),
        ("PUT", "uploads"),
        ("PUT", "manifests"),
    ];
    let left = std::sync::Mutex::new(failures.to_vec());
    let registry = MemoryRegistry::scripted(&image, Api::Present, move |request, _| {
        let mut left = left.lock().unwrap();
        let is_next = |(method, part): &(&str, &str)| {
            request.method == *method && request.path.contains(part)
        };
        let nth = left.iter().position(is_next)?;
        left.remove(nth);
        Some(Reply::new(503, ""))
    })
    .await;
    let artifact = push(&registry, &image, Some(&key(1))).await;
    let n_puts = |registry: &MemoryRegistry| {
        let uploads = registry.server.requests("uploads");
        uploads.iter().filter(|it| it.method == "PUT").count()
    };
    // Index, access map, configuration, and the one that failed.
    assert_eq!(n_puts(&registry), 4);
    assert_eq!(push(&registry, &image, Some(&key(1))).await, artifact);
    assert_eq!(n_puts(&registry), 4);
    let (client, _) = node(plain(&registry), Some(key(1)));
    let found = find(&client, &registry, &image, Some(artifact)).await;
    assert_eq!(found.unwrap(), Some(pushed()));
}
