//! Looks after images that are in use: records what is wanted of them first, and fetches what was
//! recorded before (`replay`).
//!
//! An image has one [`ImageUse`], shared by all who use it; the one who wants most is heeded. Its task
//! looks for the image's profile, beside its index on disk and then in the remote content cache, and
//! replays it. Without one, or with one that ended early, it records what is wanted, and keeps that in
//! both places for the next mount, here or on another node. Nobody waits for any of it.
//!
//! What is recorded is what was not on disk when it was wanted: what a stream brings in time, or another
//! image has brought, is in no need of being fetched ahead.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Semaphore, watch},
    task::JoinSet,
    time::Instant,
};
use tracing::{debug, info, warn};

use super::{
    catalog,
    evict::MAX_IMAGES,
    recording::Recording,
    store::{Inner, Layer, LayerStore},
};
use crate::{
    digest::ManifestDigest,
    disk,
    index::profile::{self, MAX_PROFILE_BYTES, Profile, Touch},
    metrics::Tier,
    tier::Prefetch,
};

/// The images in use, and what looks after them.
#[derive(Debug)]
pub(super) struct Images {
    /// std Mutex: held for a map operation, never across an await.
    open: Mutex<HashMap<ManifestDigest, Weak<Open>>>,
    /// std Mutex: held to add or take tasks, never across an await.
    tasks: Mutex<JoinSet<()>>,
    is_stopping: watch::Sender<bool>,
    /// Parts of layers that are read at random for nobody: one at a time leaves readers the other.
    pub(super) random_reads: Semaphore,
    /// What is being fetched for nobody, and may not be written yet.
    coming_bytes: AtomicU64,
}

/// A part of what is coming.
#[derive(Debug)]
pub(super) struct Coming<'a> {
    coming_bytes: &'a AtomicU64,
    bytes: u64,
}

impl Drop for Coming<'_> {
    fn drop(&mut self) {
        self.coming_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Default for Images {
    fn default() -> Self {
        Self {
            open: Mutex::default(),
            tasks: Mutex::default(),
            is_stopping: watch::Sender::new(false),
            random_reads: Semaphore::new(1),
            coming_bytes: AtomicU64::new(0),
        }
    }
}

/// Says that an image is in use. The last one dropped ends what is done for it.
#[derive(Debug, Clone)]
pub struct ImageUse {
    _open: Arc<Open>,
}

/// An image in use.
#[derive(Debug)]
struct Open {
    /// Dropped, it ends the image's task.
    wants: watch::Sender<Prefetch>,
    recording: Arc<Recording>,
}

/// The images in use that have a layer, and which of theirs it is.
#[derive(Debug, Default)]
pub(super) struct Users(
    /// std Mutex: held to look through it, never across an await.
    Mutex<Vec<(Weak<Open>, u32)>>,
);

impl Users {
    fn add(&self, open: &Arc<Open>, layer: u32) {
        let mut users = lock(&self.0);
        users.retain(|it| 0 < it.0.strong_count());
        // A layer that is there twice is the lower one.
        if !users
            .iter()
            .any(|it| Weak::as_ptr(&it.0) == Arc::as_ptr(open))
        {
            users.push((Arc::downgrade(open), layer));
        }
    }

    /// Notes that somebody wants a chunk that is not there.
    pub(super) fn touched(&self, chunk: u32) {
        for (open, layer) in lock(&self.0).iter() {
            if let Some(open) = open.upgrade() {
                let touch = Touch {
                    layer: *layer,
                    chunk,
                };
                open.recording.touch(touch, Instant::now());
            }
        }
    }

    /// What whoever wants most wants; `None` if no image is known to use the layer.
    pub(super) fn wants(&self) -> Option<Prefetch> {
        let users = lock(&self.0);
        let open = users.iter().filter_map(|it| it.0.upgrade());
        open.map(|it| *it.wants.borrow()).max()
    }
}

impl LayerStore {
    /// Says that the image `manifest`, whose layers `layers` are, is in use, and what is wanted of it:
    /// without a word, what is configured.
    ///
    /// Returns at once. What is fetched is so beside all else, and stops with the last use.
    pub fn use_image(
        &self,
        manifest: ManifestDigest,
        layers: &[Arc<Layer>],
        wants: Option<Prefetch>,
    ) -> ImageUse {
        let inner = self.inner();
        let wants = wants.unwrap_or(inner.config.prefetch);
        let mut images = lock(&inner.images.open);
        let known = images.get(&manifest).and_then(Weak::upgrade);
        let open = known.unwrap_or_else(|| {
            let open = Arc::new(Open {
                wants: watch::Sender::new(wants),
                recording: Arc::default(),
            });
            images.retain(|_, it| 0 < it.strong_count());
            images.insert(manifest, Arc::downgrade(&open));
            let image = Image {
                manifest,
                layers: layers.iter().map(Arc::downgrade).collect(),
                n_chunks: layers.iter().map(|it| it.file.n_chunks()).collect(),
                wants: open.wants.subscribe(),
                recording: Arc::clone(&open.recording),
            };
            let mut tasks = lock(&inner.images.tasks);
            while tasks.try_join_next().is_some() {}
            tasks.spawn_on(Arc::clone(inner).look_after(image), &inner.runtime);
            open
        });
        drop(images);
        open.wants.send_if_modified(|it| {
            let is_more = *it < wants;
            *it = wants.max(*it);
            is_more
        });
        for (at, layer) in (0..).zip(layers) {
            layer.users.add(&open, at);
        }
        ImageUse { _open: open }
    }
}

/// What an image's task knows. It keeps neither the image in use nor its layers open.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) manifest: ManifestDigest,
    pub(super) layers: Vec<Weak<Layer>>,
    /// Of each layer.
    n_chunks: Vec<u32>,
    wants: watch::Receiver<Prefetch>,
    recording: Arc<Recording>,
}

impl Image {
    /// Whether the disk has all of its layers.
    fn is_all_there(&self) -> bool {
        let mut layers = self.layers.iter();
        layers.all(|it| it.upgrade().is_some_and(|it| it.file.is_complete()))
    }

    /// Waits until somebody wants that much, for ever if nobody will.
    async fn wanted(&self, level: Prefetch) {
        let mut wants = self.wants.clone();
        if wants.wait_for(|it| level <= *it).await.is_err() {
            std::future::pending().await
        }
    }

    /// Waits until nobody uses the image any more.
    async fn unused(&self) {
        let mut wants = self.wants.clone();
        while wants.changed().await.is_ok() {}
    }
}

impl Inner {
    /// Looks after an image until nobody uses it, or the store is shut down.
    async fn look_after(self: Arc<Self>, image: Image) {
        let mut stopping = self.images.is_stopping.subscribe();
        let ended = async {
            tokio::select! {
                () = image.unused() => {}
                // The sender lives as long as `self`.
                _ = stopping.wait_for(|it| *it) => {}
            }
        };
        tokio::pin!(ended);
        let is_wanted = tokio::select! {
            // In this order, for images that are in use for a moment only.
            biased;
            () = image.wanted(Prefetch::Recorded) => true,
            () = &mut ended => false,
        };
        if !is_wanted {
            return;
        }
        // To the end in any case: what is recorded is added to what is known.
        let known = match image.is_all_there() {
            // What is on disk is neither recorded nor fetched: nobody need be asked.
            true => Profile {
                touches: Vec::new(),
                is_whole: true,
            },
            false => {
                let known = self.profile(image.manifest, &image.n_chunks).await;
                known.unwrap_or_default()
            }
        };
        let mut fetch = Box::pin(async {
            if !known.touches.is_empty() {
                self.replay(&image, &known.touches).await;
            }
            image.wanted(Prefetch::All).await;
            self.complete(&image).await;
            std::future::pending::<()>().await;
        });
        if !known.is_whole {
            let is_unused = tokio::select! {
                () = &mut ended => true,
                () = image.recording.over() => false,
                () = &mut fetch => false,
            };
            if is_unused {
                // First, because readers of other images may wait for what it has in hand.
                drop(fetch);
                return self.keep_recording(&image, &known).await;
            }
            tokio::select! {
                () = self.keep_recording(&image, &known) => {}
                () = &mut fetch => {}
            }
        }
        drop(image.recording.end());
        tokio::select! {
            () = &mut ended => {}
            () = &mut fetch => {}
        }
    }

    /// Says that so many bytes are coming for nobody, if the cache has room for them and all others
    /// that are.
    pub(super) fn announce(&self, bytes: u64) -> Option<Coming<'_>> {
        let coming_bytes = &self.images.coming_bytes;
        let others = coming_bytes.fetch_add(bytes, Ordering::Relaxed);
        let coming = Coming {
            coming_bytes,
            bytes,
        };
        self.room
            .has_spare(others.saturating_add(bytes))
            .then_some(coming)
    }

    /// The profile of an image whose layers have so many chunks: the one on disk, or the one in the
    /// remote content cache.
    pub(super) async fn profile(
        &self,
        manifest: ManifestDigest,
        n_chunks: &[u32],
    ) -> Option<Profile> {
        let path = self.paths.profile(manifest);
        let read = {
            let path = path.clone();
            self.runtime.spawn_blocking(move || read_profile(&path))
        };
        let wrong = |tier: Tier, err: &dyn std::fmt::Display| {
            let failures = &self.metrics.verify_failures;
            failures.with_label_values(&[tier.label()]).inc();
            warn!(image.manifest = %manifest, tier = tier.label(), error = %err,
                "profile of an image is unusable, recording it anew");
        };
        match read.await {
            Ok(Ok(content)) => match profile::decode(&content, manifest, n_chunks) {
                Ok(profile) => return Some(profile),
                Err(err) => {
                    wrong(Tier::Disk, &err);
                    // What stays is replaced by the next one.
                    let _ = std::fs::remove_file(&path);
                }
            },
            Ok(Err(err)) if err.kind() == io::ErrorKind::NotFound => {}
            Ok(Err(err)) => {
                debug!(path = %path.display(), error = %err, "profile of an image cannot be read");
            }
            Err(_) => return None,
        }
        let cache = &self.remote.as_ref()?.cache;
        let content = cache.profile(&manifest, MAX_PROFILE_BYTES).await?;
        match profile::decode(&content, manifest, n_chunks) {
            Ok(profile) => {
                self.keep_on_disk(manifest, content.into()).await;
                Some(profile)
            }
            Err(err) => {
                wrong(Tier::ContentCache, &err);
                None
            }
        }
    }

    /// Ends the recording, and keeps it on disk and in the remote content cache, with what was `known`
    /// before, if there is anything new.
    async fn keep_recording(&self, image: &Image, known: &Profile) {
        let manifest = image.manifest;
        let noted = image.recording.end();
        if noted.touches.is_empty() {
            return;
        }
        let n_new = noted.touches.len();
        let profile = known.clone().with(noted);
        let content = match profile::encode(manifest, &profile) {
            Ok(content) => content,
            Err(err) => return warn!(error = %err, "what was recorded is not kept"),
        };
        self.keep_on_disk(manifest, content.clone()).await;
        let is_shared = match &self.remote {
            Some(remote) => remote.cache.put_profile(&manifest, &content).await,
            None => false,
        };
        info!(image.manifest = %manifest, chunks = profile.touches.len(), new = n_new, shared = is_shared,
            "recorded what is read first of an image");
    }

    async fn keep_on_disk(&self, manifest: ManifestDigest, content: Vec<u8>) {
        let paths = self.paths.clone();
        let kept = self.runtime.spawn_blocking(move || {
            disk::publish_unsynced(&paths.profile(manifest), &content)?;
            catalog::remove_surplus_profiles(&paths, MAX_IMAGES)
        });
        if let Ok(Err(err)) = kept.await {
            // The next mount records it anew.
            debug!(image.manifest = %manifest, error = %err, "profile of an image is not kept on disk");
        }
    }
}

impl Images {
    /// Ends what is done for images, and waits until what was recorded is kept, at most until
    /// `deadline`.
    pub(super) async fn stop(&self, deadline: Duration) {
        self.is_stopping.send_replace(true);
        let mut tasks = std::mem::take(&mut *lock(&self.tasks));
        let ended = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(deadline, ended).await.is_err() {
            tasks.shutdown().await;
        }
    }
}

/// Reads a profile, or as much of what is none as shows that, and notes that it was used.
fn read_profile(path: &std::path::Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    if let Err(err) = disk::touch(&file) {
        // Then it is removed too early, if at all.
        debug!(path = %path.display(), error = %err, "noting the use of a profile");
    }
    let mut content = Vec::new();
    let limit = MAX_PROFILE_BYTES as u64 + 1;
    file.take(limit).read_to_end(&mut content)?;
    Ok(content)
}

/// Nothing that is locked here panics half-way.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
