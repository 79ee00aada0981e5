//! Every metric of the driver: names, units, labels, in one place.
//!
//! Labels come from closed sets only; an image, a digest, a pod or a path is never a label, those
//! belong in logs. `docs/METRICS.md` has the table, and a test compares it with [`Metrics`].

use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::{SystemTime, UNIX_EPOCH},
};

use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::{disk, health::State, sys};

/// Where the bytes of a read came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    /// The local disk cache.
    Disk,
    /// The remote content cache.
    ContentCache,
    /// The OCI registry.
    Registry,
}

impl Tier {
    /// All tiers, in the order in which they are asked.
    pub const ALL: [Self; 3] = [Self::Disk, Self::ContentCache, Self::Registry];

    /// The value of the label `tier`.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::ContentCache => "content_cache",
            Self::Registry => "registry",
        }
    }
}

/// How a tier answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It had the bytes.
    Hit,
    /// It did not have them.
    Miss,
    /// It is broken, or what it had was wrong.
    Error,
}

impl Outcome {
    /// All outcomes.
    pub const ALL: [Self; 3] = [Self::Hit, Self::Miss, Self::Error];

    /// The value of the label `outcome`.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
            Self::Error => "error",
        }
    }
}

/// Upper bounds for the time a read takes, from a page-cache hit to a slow registry.
const READ_BUCKETS_SECONDS: &[f64] = &[
    50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0,
    2.5, 5.0, 10.0, 30.0,
];

/// Upper bounds for the time a CSI call or an index takes, up to kubelet's limit of two minutes.
const CALL_BUCKETS_SECONDS: &[f64] = &[
    5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
];

/// What the controller that has images warmed tells: the others are a node's, and zeros of them would look like a
/// node without a server.
const OF_PREWARM_CONTROLLER: [&str; 7] = [
    "clip_csi_build_info",
    "clip_csi_layer_decompress",
    "clip_csi_prewarm_",
    "clip_csi_process_",
    "clip_csi_registry_",
    "clip_csi_remote_",
    "clip_csi_verify_failures",
];

/// The metrics of one process.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
    role: Role,
    /// The disk whose space is read when the metrics are; set once, when the cache is opened.
    cache_disk: Arc<OnceLock<PathBuf>>,
    /// Reads by the tier that was asked and how it answered.
    pub tier_reads: IntCounterVec,
    /// Bytes of the layer that a tier delivered.
    pub tier_read_bytes: IntCounterVec,
    /// Time until a tier had delivered.
    pub tier_read_duration: HistogramVec,
    /// FUSE requests by operation and outcome.
    pub fuse_requests: IntCounterVec,
    /// Layers decompressed from the registry's bytes, by outcome.
    pub layer_decompressions: IntCounterVec,
    /// Parts of layers read at random from the registry, by outcome.
    pub layer_random_reads: IntCounterVec,
    /// Chunks given to readers past the local disk, by what was wrong with that.
    pub chunks_served_through: IntCounterVec,
    /// Chunks of images that were to be fetched before anybody asks, by what became of it.
    pub prefetch_chunks: IntCounterVec,
    /// Bytes that decompression produced.
    pub layer_decompressed_bytes: IntCounter,
    /// Waiters that joined a layer's fill instead of starting their own.
    pub single_flight_followers: IntCounter,
    /// Bytes that the local disk cache takes on disk.
    pub layer_cache_bytes: IntGauge,
    /// Bytes that it may take; 0 if the disk alone is the bound.
    pub layer_cache_capacity_bytes: IntGauge,
    /// Free bytes of its disk.
    pub layer_cache_disk_free_bytes: IntGauge,
    /// All bytes of its disk.
    pub layer_cache_disk_size_bytes: IntGauge,
    /// Layers evicted from it, by the bound that demanded it.
    pub layer_cache_evictions: IntCounterVec,
    /// Extents of layers in use evicted from it, by the bound that demanded it.
    pub layer_cache_extent_evictions: IntCounterVec,
    /// Bytes of evicted layers and extents.
    pub layer_cache_evicted_bytes: IntCounter,
    /// Layers in the local disk cache.
    pub layer_cache_layers: IntGauge,
    /// Bytes or digests that did not match, by the tier they came from.
    pub verify_failures: IntCounterVec,
    /// Requests to the remote content cache by operation and outcome.
    pub remote_requests: IntCounterVec,
    /// Time of requests to the remote content cache.
    pub remote_request_duration: HistogramVec,
    /// Reads that the remote content cache was asked for a second time, by which request answered.
    pub remote_hedges: IntCounterVec,
    /// Whether the remote content cache is asked (1) or skipped after failures (0).
    pub remote_up: IntGauge,
    /// Waits for a layer that another node makes, by what ended them.
    pub remote_lease_waits: IntCounterVec,
    /// Layers whose upload to the remote content cache ended, by outcome.
    pub remote_uploads: IntCounterVec,
    /// Bytes uploaded to the remote content cache.
    pub remote_upload_bytes: IntCounter,
    /// Requests to registries by operation and class of status code.
    pub registry_requests: IntCounterVec,
    /// Compressed bytes received from registries.
    pub registry_read_bytes: IntCounter,
    /// Layers whose index was looked for in the registry, by outcome.
    pub pushed_index_lookups: IntCounterVec,
    /// Layers whose table of contents was read, by outcome.
    pub toc_lookups: IntCounterVec,
    /// Time to build an image's index, layers included.
    pub index_build_duration: Histogram,
    /// Whether kubelet knows the driver (1) or not yet (0).
    pub registered: IntGauge,
    /// Source mounts, one per image and options.
    pub mounts: IntGauge,
    /// Source mounts that the kernel serves by itself.
    pub kernel_mounts: IntGauge,
    /// Published volumes.
    pub volumes: IntGauge,
    /// Volumes whose mounts are dead.
    pub dead_volumes: IntGauge,
    /// Whether the node's volumes are in a state of ill health (1) or not (0), by state.
    pub health: IntGaugeVec,
    /// Whether a server is there that the node service can give mounts to (1) or not (0).
    pub serve_up: IntGauge,
    /// Mounts that a server took over from another one.
    pub serve_takeovers: IntCounter,
    /// Mounts that were given up because no server came in time, or none could go on with them.
    pub mounts_aborted: IntCounter,
    /// CSI calls by name and gRPC code.
    pub csi_requests: IntCounterVec,
    /// Time of CSI calls.
    pub csi_request_duration: HistogramVec,
    /// Whether this replica of the pre-warm controller leads (1) or waits (0).
    pub prewarm_leader: IntGauge,
    /// ImagePrewarms by phase.
    pub prewarm_objects: IntGaugeVec,
    /// Nodes that ImagePrewarms are for, by what became of it, over all of these.
    pub prewarm_nodes: IntGaugeVec,
    /// How long an ImagePrewarm has had something to do, of the one that has had it longest.
    pub prewarm_lag: IntGauge,
    /// Images that are being seeded.
    pub prewarm_seedings: IntGauge,
    /// Attempts to seed an image that ended, by outcome.
    pub prewarm_seed_attempts: IntCounterVec,
    /// Writes to the Kubernetes API for pre-warming, by what was written and outcome.
    pub prewarm_api_writes: IntCounterVec,
    /// ImagePrewarms that wait for their turn on this node, or are under way.
    pub prewarm_queue: IntGaugeVec,
    /// Warm-ups of this node that ended, by outcome.
    pub prewarm_warmups: IntCounterVec,
    /// Images filled because a pod was bound to this node that ended, by outcome.
    pub prewarm_pods: IntCounterVec,
    /// Bytes that warm-ups of this node wanted, by where they were.
    pub prewarm_bytes: IntCounterVec,
    /// Resident memory of this process.
    pub process_resident_memory_bytes: Gauge,
    /// Its highest value so far.
    pub process_resident_memory_highwater_bytes: Gauge,
    /// When this process started: a change is a restart.
    pub process_start_time: Gauge,
    /// One series with the value 1 that carries the version.
    pub build_info: IntCounterVec,
}

/// Which process of a node the metrics are of: the value of the label `role`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The CSI node service, or a process that does all.
    Node,
    /// The agent.
    Agent,
    /// The server.
    Serve,
    /// The controller that has images warmed.
    PrewarmController,
}

impl Role {
    const fn label(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Agent => "agent",
            Self::Serve => "serve",
            Self::PrewarmController => "prewarm-controller",
        }
    }
}

impl Metrics {
    /// Makes the metrics of the node service, or of a process that does all.
    pub fn new() -> Self {
        Self::of(Role::Node)
    }

    /// Makes the metrics, with every labelled series of the closed sets at zero, so that a ratio
    /// can be computed before the first event.
    ///
    /// # Panics
    /// If two metrics have one name, which a test excludes.
    pub fn of(role: Role) -> Self {
        let registry = Registry::new();
        let make = Maker {
            registry: &registry,
            role,
        };
        let metrics = Self {
            tier_reads: make.counters("tier_reads_total", "Reads by the tier that was asked and how it answered.", &["tier", "outcome"]),
            tier_read_bytes: make.counters("tier_read_bytes_total", "Bytes that a tier delivered to readers, or ahead of them.", &["tier"]),
            tier_read_duration: make.histograms("tier_read_duration_seconds", "Time until a tier had delivered the bytes of a read.", &["tier"], READ_BUCKETS_SECONDS),
            fuse_requests: make.counters("fuse_requests_total", "FUSE requests by operation and outcome.", &["op", "outcome"]),
            layer_decompressions: make.counters("layer_decompressions_total", "Layers decompressed from the registry's bytes, by outcome.", &["outcome"]),
            layer_decompressed_bytes: make.counter("layer_decompressed_bytes_total", "Bytes that decompression produced."),
            layer_random_reads: make.counters("layer_random_reads_total", "Parts of layers read at random from the registry, by outcome.", &["outcome"]),
            chunks_served_through: make.counters("chunks_served_through_total", "Chunks given to readers past the local disk, by what was wrong with that.", &["reason"]),
            prefetch_chunks: make.counters("prefetch_chunks_total", "Chunks that were to be fetched before anybody asks, by what became of it.", &["outcome"]),
            single_flight_followers: make.counter("single_flight_followers_total", "Waiters that joined a layer's fill instead of starting their own."),
            layer_cache_bytes: make.int_gauge("layer_cache_bytes", "Bytes that the local disk cache takes on disk."),
            layer_cache_capacity_bytes: make.int_gauge("layer_cache_capacity_bytes", "Bytes that the local disk cache may take (cache.max_bytes), 0 if the disk alone is the bound."),
            layer_cache_disk_free_bytes: make.int_gauge("layer_cache_disk_free_bytes", "Free bytes of the disk of the local disk cache."),
            layer_cache_disk_size_bytes: make.int_gauge("layer_cache_disk_size_bytes", "Size of the disk of the local disk cache."),
            layer_cache_evictions: make.counters("layer_cache_evictions_total", "Layers evicted from the local disk cache, by the bound that demanded it.", &["reason"]),
            layer_cache_extent_evictions: make.counters("layer_cache_extent_evictions_total", "Extents of layers in use evicted from the local disk cache, by the bound that demanded it.", &["reason"]),
            layer_cache_evicted_bytes: make.counter("layer_cache_evicted_bytes_total", "Bytes of layers and extents evicted from the local disk cache."),
            layer_cache_layers: make.int_gauge("layer_cache_layers", "Layers in the local disk cache."),
            verify_failures: make.counters("verify_failures_total", "Bytes that did not match their digest, by the tier they came from.", &["tier"]),
            remote_requests: make.counters("remote_requests_total", "Requests to the remote content cache by operation and outcome.", &["op", "outcome"]),
            remote_request_duration: make.histograms("remote_request_duration_seconds", "Time of requests to the remote content cache.", &["op"], READ_BUCKETS_SECONDS),
            remote_hedges: make.counters("remote_hedges_total", "Reads of the remote content cache that took long and were asked for again, by whether the second request answered first.", &["outcome"]),
            remote_up: make.int_gauge("remote_up", "Whether the remote content cache is asked (1), or skipped after failures or not configured (0)."),
            remote_lease_waits: make.counters("remote_lease_waits_total", "Waits for a layer that another node makes, by what ended them.", &["outcome"]),
            remote_uploads: make.counters("remote_uploads_total", "Layers whose upload to the remote content cache ended, by outcome.", &["outcome"]),
            remote_upload_bytes: make.counter("remote_upload_bytes_total", "Bytes uploaded to the remote content cache."),
            registry_requests: make.counters("registry_requests_total", "Requests to registries by operation and class of status code.", &["op", "code"]),
            registry_read_bytes: make.counter("registry_read_bytes_total", "Compressed bytes received from registries."),
            pushed_index_lookups: make.counters("pushed_index_lookups_total", "Layers whose index was looked for beside the image in the registry, by outcome.", &["outcome"]),
            toc_lookups: make.counters("toc_lookups_total", "Layers whose blob's table of contents was read to mount them by it, by outcome.", &["outcome"]),
            index_build_duration: make.histogram("index_build_duration_seconds", "Time to build an image's index, its layers included.", CALL_BUCKETS_SECONDS),
            registered: make.int_gauge("registered", "Whether kubelet has registered the driver (1) or not (0)."),
            mounts: make.int_gauge("mounts", "Source mounts: one per image and options."),
            kernel_mounts: make.int_gauge("kernel_mounts", "Those of the source mounts that the kernel serves by itself, without a server: of images that were whole on disk."),
            volumes: make.int_gauge("volumes", "Published volumes."),
            dead_volumes: make.int_gauge("dead_volumes", "Volumes whose mounts are dead, until they are published anew or unpublished."),
            health: make.int_gauges("health", "Whether the node's volumes are in a state of ill health (1) or not (0), judged every minute.", &["state"]),
            serve_up: make.int_gauge("serve_up", "Whether a server of FUSE mounts is connected to the node service (1) or not (0)."),
            serve_takeovers: make.counter("serve_takeovers_total", "Mounts that a server took over from another one."),
            mounts_aborted: make.counter("mounts_aborted_total", "Mounts given up because no server came in time, or none could go on with them."),
            csi_requests: make.counters("csi_requests_total", "CSI calls by name and gRPC code.", &["rpc", "code"]),
            csi_request_duration: make.histograms("csi_request_duration_seconds", "Time of CSI calls.", &["rpc"], CALL_BUCKETS_SECONDS),
            prewarm_leader: make.int_gauge("prewarm_leader", "Whether this replica of the pre-warm controller leads (1) or waits (0)."),
            prewarm_objects: make.int_gauges("prewarm_objects", "ImagePrewarms by phase.", &["phase"]),
            prewarm_nodes: make.int_gauges("prewarm_nodes", "Nodes that ImagePrewarms are for, by what became of it, over all of these.", &["warmup"]),
            prewarm_lag: make.int_gauge("prewarm_lag_seconds", "Age of the oldest ImagePrewarm that is not at its end."),
            prewarm_seedings: make.int_gauge("prewarm_seedings", "Images that are being put into the remote content cache."),
            prewarm_seed_attempts: make.counters("prewarm_seed_attempts_total", "Attempts to put an image into the remote content cache that ended, by outcome.", &["outcome"]),
            prewarm_api_writes: make.counters("prewarm_api_writes_total", "Writes to the Kubernetes API for pre-warming, by what was written and outcome.", &["object", "outcome"]),
            prewarm_queue: make.int_gauges("prewarm_queue", "ImagePrewarms that this node has to do with, by what it does.", &["warmup"]),
            prewarm_warmups: make.counters("prewarm_warmups_total", "Warm-ups of this node that ended, by outcome.", &["outcome"]),
            prewarm_pods: make.counters("prewarm_pods_total", "Fills of one image that ended, begun because a pod that uses it was bound to this node, by outcome.", &["outcome"]),
            prewarm_bytes: make.counters("prewarm_bytes_total", "Bytes that warm-ups of this node wanted, by the tier that had them.", &["tier"]),
            process_resident_memory_bytes: make.role_gauge("process_resident_memory_bytes", "Resident memory of this process (VmRSS)."),
            process_resident_memory_highwater_bytes: make.role_gauge("process_resident_memory_highwater_bytes", "Highest resident memory of this process so far (VmHWM)."),
            process_start_time: make.role_gauge("process_start_time_seconds", "When this process started, in seconds since 1970."),
            build_info: make.role_counters("build_info", "Always 1; the label carries the version.", &["version"]),
            cache_disk: Arc::default(),
            role,
            registry,
        };
        for state in State::ALL {
            metrics.health.with_label_values(&[state.label()]);
        }
        for reason in ["capacity", "disk", "inodes"] {
            metrics.layer_cache_evictions.with_label_values(&[reason]);
        }
        for reason in ["capacity", "disk"] {
            metrics
                .layer_cache_extent_evictions
                .with_label_values(&[reason]);
        }
        for reason in ["no_space", "io_error"] {
            metrics.chunks_served_through.with_label_values(&[reason]);
        }
        for tier in Tier::ALL {
            for outcome in Outcome::ALL {
                metrics
                    .tier_reads
                    .with_label_values(&[tier.label(), outcome.label()]);
            }
            metrics.tier_read_bytes.with_label_values(&[tier.label()]);
            metrics
                .tier_read_duration
                .with_label_values(&[tier.label()]);
            metrics.verify_failures.with_label_values(&[tier.label()]);
        }
        for outcome in ["ok", "error"] {
            metrics.layer_decompressions.with_label_values(&[outcome]);
            metrics.layer_random_reads.with_label_values(&[outcome]);
            metrics.remote_uploads.with_label_values(&[outcome]);
        }
        for outcome in ["fetched", "present", "skipped", "no_room", "error"] {
            metrics.prefetch_chunks.with_label_values(&[outcome]);
        }
        for outcome in ["hit", "miss", "untrusted", "error"] {
            metrics.pushed_index_lookups.with_label_values(&[outcome]);
        }
        for outcome in ["hit", "unusable", "empty", "error"] {
            metrics.toc_lookups.with_label_values(&[outcome]);
        }
        for outcome in ["won", "lost"] {
            metrics.remote_hedges.with_label_values(&[outcome]);
        }
        for outcome in ["made", "taken", "timeout", "error"] {
            metrics.remote_lease_waits.with_label_values(&[outcome]);
        }
        for op in ["get", "put", "delete", "lease", "release"] {
            for outcome in Outcome::ALL {
                metrics
                    .remote_requests
                    .with_label_values(&[op, outcome.label()]);
            }
            metrics.remote_request_duration.with_label_values(&[op]);
        }
        metrics.prewarm_at_zero();
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        metrics
            .process_start_time
            .set(now.unwrap_or_default().as_secs_f64());
        metrics
            .build_info
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .inc();
        metrics
    }

    /// Makes the series of pre-warming.
    fn prewarm_at_zero(&self) {
        for phase in [
            "Pending",
            "Seeding",
            "Distributing",
            "Ready",
            "Degraded",
            "Failed",
            "Suspended",
        ] {
            self.prewarm_objects.with_label_values(&[phase]);
        }
        for warmup in ["pending", "warming", "ready", "failed"] {
            self.prewarm_nodes.with_label_values(&[warmup]);
            self.prewarm_queue.with_label_values(&[warmup]);
        }
        for outcome in ["ok", "error"] {
            self.prewarm_seed_attempts.with_label_values(&[outcome]);
            self.prewarm_warmups.with_label_values(&[outcome]);
            self.prewarm_pods.with_label_values(&[outcome]);
            for object in ["status", "rollout", "event", "delete", "node"] {
                self.prewarm_api_writes
                    .with_label_values(&[object, outcome]);
            }
        }
        for tier in Tier::ALL {
            self.prewarm_bytes.with_label_values(&[tier.label()]);
        }
    }

    /// Counts a read that `tier` answered with `outcome`.
    pub fn tier_read(&self, tier: Tier, outcome: Outcome) {
        self.tier_reads
            .with_label_values(&[tier.label(), outcome.label()])
            .inc();
    }

    /// Names the directory whose disk is asked for its space when the metrics are written.
    pub fn watch_cache_disk(&self, dir: &Path) {
        // A process has one cache; the first one named is it.
        self.cache_disk.get_or_init(|| dir.to_owned());
    }

    /// Writes all metrics in Prometheus' text format, with the memory of this process and the space
    /// of the cache disk as they are now.
    ///
    /// # Errors
    /// If a metric cannot be encoded, which no metric of the driver can cause.
    pub fn encode(&self) -> prometheus::Result<String> {
        let memory = sys::memory();
        // Byte counts of a process are far below 2^52, so that f64 holds them exactly.
        self.process_resident_memory_bytes
            .set(memory.resident_bytes as f64);
        self.process_resident_memory_highwater_bytes
            .set(memory.highwater_bytes as f64);
        // An unknown space stays what it was last.
        if let Some(Ok(space)) = self.cache_disk.get().map(|it| disk::space(it)) {
            let gauge = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
            self.layer_cache_disk_free_bytes
                .set(gauge(space.free_bytes));
            self.layer_cache_disk_size_bytes
                .set(gauge(space.size_bytes));
        }
        let mut families = self.registry.gather();
        if self.role == Role::PrewarmController {
            let is_of_it = |name: &str| OF_PREWARM_CONTROLLER.iter().any(|it| name.starts_with(it));
            families.retain(|it| is_of_it(it.name()));
        }
        TextEncoder::new().encode_to_string(&families)
    }

    /// The registry: for the test that compares it with the documentation.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Makes a metric with the driver's prefix and registers it.
struct Maker<'a> {
    registry: &'a Registry,
    role: Role,
}

impl Maker<'_> {
    fn registered<C: prometheus::core::Collector + Clone + 'static>(
        &self,
        made: prometheus::Result<C>,
    ) -> C {
        let metric = made.expect("names, labels and buckets are constants that a test checks");
        self.registry
            .register(Box::new(metric.clone()))
            .expect("names are unique, a test checks");
        metric
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.registered(IntCounter::with_opts(
            Opts::new(name, help).namespace("clip_csi"),
        ))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.registered(IntCounterVec::new(
            Opts::new(name, help).namespace("clip_csi"),
            labels,
        ))
    }

    fn int_gauge(&self, name: &str, help: &str) -> IntGauge {
        self.registered(IntGauge::with_opts(
            Opts::new(name, help).namespace("clip_csi"),
        ))
    }

    fn int_gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.registered(IntGaugeVec::new(
            Opts::new(name, help).namespace("clip_csi"),
            labels,
        ))
    }

    /// One of which each process of a node has its own.
    fn role_gauge(&self, name: &str, help: &str) -> Gauge {
        self.registered(Gauge::with_opts(self.role_opts(name, help)))
    }

    fn role_counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.registered(IntCounterVec::new(self.role_opts(name, help), labels))
    }

    fn role_opts(&self, name: &str, help: &str) -> Opts {
        let opts = Opts::new(name, help).namespace("clip_csi");
        opts.const_label("role", self.role.label())
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let options = HistogramOpts::new(name, help)
            .namespace("clip_csi")
            .buckets(buckets.to_vec());
        self.registered(Histogram::with_opts(options))
    }

    fn histograms(&self, name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> HistogramVec {
        let options = HistogramOpts::new(name, help)
            .namespace("clip_csi")
            .buckets(buckets.to_vec());
        self.registered(HistogramVec::new(options, labels))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prewarm_controller_says_nothing_of_mounts_that_it_has_not() {
        let of = |role| Metrics::of(role).encode().unwrap();
        let (agent, controller) = (of(Role::Agent), of(Role::PrewarmController));
        for (name, is_of_it) in [
            ("clip_csi_serve_up", false),
            ("clip_csi_registered", false),
            ("clip_csi_prewarm_leader", true),
            ("clip_csi_remote_up", true),
            ("clip_csi_build_info", true),
        ] {
            assert!(agent.contains(&format!("\n{name}")), "{name}");
            assert_eq!(
                controller.contains(&format!("\n{name}")),
                is_of_it,
                "{name}"
            );
        }
    }
}
