//! The command line: what a user may type.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Mounts OCI images lazily: files appear at once, their bytes are fetched when they are read.
#[derive(Debug, Parser)]
#[command(name = "clip-csi", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Settings that every command takes.
    #[command(flatten)]
    pub common: Common,
}

/// Settings that every command takes.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// Configuration file (TOML, see docs/CONFIGURATION.md).
    #[arg(long, global = true, env = "CLIP_CSI_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Directory of the local disk cache; overrides `cache.dir`.
    #[arg(long, global = true, env = "CLIP_CSI_CACHE_DIR", value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Log lines as text, or as JSON for machines.
    #[arg(
        long,
        global = true,
        env = "CLIP_CSI_LOG_FORMAT",
        value_enum,
        default_value = "text"
    )]
    pub log_format: LogFormat,
    /// What to log: `error`, `warn`, `info`, `debug` or `trace`, also per module, as in
    /// `info,clip_csi=debug`.
    #[arg(long, global = true, env = "CLIP_CSI_LOG_LEVEL", value_name = "LEVEL")]
    pub log_level: Option<String>,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve CSI on a Unix socket, and mount what `serve` serves.
    Node(NodeArgs),
    /// Fetch what the mounts of a node need, keep its cache, and serve /metrics for all its processes.
    Agent(AgentArgs),
    /// Serve the mounts of a node.
    Serve(ServeArgs),
    /// Serve CSI Identity and Controller on a Unix socket: volumes for PersistentVolumeClaims.
    Controller(ControllerArgs),
    /// Put images into the remote content cache and pace nodes that fill from it, as ImagePrewarm objects ask.
    PrewarmController(PrewarmControllerArgs),
    /// Give directories to a user, all that is in them included: for an init container.
    Own(OwnArgs),
    /// Say whether a process of the node answers: exit code 0 if it does.
    Status(StatusArgs),
    /// Mount an image at a directory, read-only.
    Mount(MountArgs),
    /// Unmount what `mount` mounted.
    Unmount {
        /// The directory.
        dir: PathBuf,
    },
    /// Put an image into the remote content cache, so that nodes need not ask its registry for layers.
    Warm(WarmArgs),
    /// Build, push or look at image indexes.
    #[command(subcommand)]
    Index(IndexCommand),
    /// Look after the local disk cache.
    #[command(subcommand)]
    Cache(CacheCommand),
}

/// Where the processes of a node meet.
#[derive(Debug, Clone, Args)]
pub struct RunDirArgs {
    /// Directory of the sockets by which the processes of this node talk; it belongs to the user of
    /// `agent` and `serve`.
    #[arg(
        long,
        env = "CLIP_CSI_RUN_DIR",
        value_name = "DIR",
        default_value = "/run/clip-csi"
    )]
    pub run_dir: PathBuf,
}

/// Settings of `clip-csi agent`.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Where the processes of this node meet.
    #[command(flatten)]
    pub run: RunDirArgs,
    /// Address of /metrics, /healthz and /readyz; none are served without it.
    #[arg(long, env = "CLIP_CSI_METRICS_ADDR", value_name = "ADDRESS:PORT")]
    pub metrics_addr: Option<SocketAddr>,
    /// Remove taints with this key from the node once kubelet has registered the driver; needs a pod
    /// whose service account may get CSINodes, and get and patch Nodes.
    #[arg(
        long,
        env = "CLIP_CSI_STARTUP_TAINT",
        value_name = "KEY",
        requires = "node_id"
    )]
    pub startup_taint: Option<String>,
    /// Write events of the node when its mounts are lost; needs a pod whose service account may create
    /// events in the namespace default.
    #[arg(long, env = "CLIP_CSI_EVENTS", requires = "node_id")]
    pub events: bool,
    /// Write events of pods, too, when their volumes are slow or dead; needs the right to create them in all
    /// namespaces.
    #[arg(long, env = "CLIP_CSI_POD_EVENTS", requires = "events")]
    pub pod_events: bool,
    /// Warm this node as ImagePrewarm objects ask; needs a pod whose service account may get Nodes, follow
    /// ImagePrewarms, and write NodeImageCaches.
    #[arg(long, env = "CLIP_CSI_PREWARM", requires = "node_id")]
    pub prewarm: bool,
    /// Look at the pods that are bound to this node, and fill at once what ImagePrewarms have of their images; needs a
    /// service account that may list and watch pods.
    #[arg(long, env = "CLIP_CSI_DISCOVER", requires = "prewarm")]
    pub discover: bool,
    /// File that says how to reach the Kubernetes API for --prewarm, outside of a pod.
    #[arg(
        long,
        env = "CLIP_CSI_KUBECONFIG",
        value_name = "FILE",
        requires = "prewarm"
    )]
    pub kubeconfig: Option<PathBuf>,
    /// Name of this node in Kubernetes.
    #[arg(long, env = "NODE_ID")]
    pub node_id: Option<String>,
    /// Name of the driver in Kubernetes.
    #[arg(long, env = "CLIP_CSI_DRIVER_NAME", default_value = "csi.clip-csi.dev")]
    pub driver_name: String,
}

/// Settings of `clip-csi serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Where the processes of this node meet.
    #[command(flatten)]
    pub run: RunDirArgs,
}

/// Settings of `clip-csi controller`.
#[derive(Debug, Args)]
pub struct ControllerArgs {
    /// Socket to serve CSI on.
    #[arg(
        long,
        env = "CSI_ENDPOINT",
        default_value = "unix:///run/clip-csi/csi.sock"
    )]
    pub endpoint: String,
    /// Name of the driver in Kubernetes.
    #[arg(long, env = "CLIP_CSI_DRIVER_NAME", default_value = "csi.clip-csi.dev")]
    pub driver_name: String,
    /// Address of /metrics, /healthz and /readyz; none are served without it.
    #[arg(long, env = "CLIP_CSI_METRICS_ADDR", value_name = "ADDRESS:PORT")]
    pub metrics_addr: Option<SocketAddr>,
}

/// Settings of `clip-csi prewarm-controller`.
#[derive(Debug, Args)]
pub struct PrewarmControllerArgs {
    /// Namespace of the lease by which one of the replicas leads.
    #[arg(long, env = "POD_NAMESPACE")]
    pub lease_namespace: String,
    /// Name of that lease.
    #[arg(long, env = "CLIP_CSI_LEASE_NAME", default_value = "clip-csi-prewarm")]
    pub lease_name: String,
    /// Name of this replica in the lease: its pod's.
    #[arg(long, env = "POD_NAME")]
    pub identity: String,
    /// Name of the driver in Kubernetes, in whose name events are.
    #[arg(long, env = "CLIP_CSI_DRIVER_NAME", default_value = "csi.clip-csi.dev")]
    pub driver_name: String,
    /// Look at pods and at what makes pods, for ImagePrewarms with spec.workloads; needs a service account that may
    /// list and watch them.
    #[arg(long, env = "CLIP_CSI_DISCOVER")]
    pub discover: bool,
    /// Address of /metrics, /healthz and /readyz; none are served without it.
    #[arg(long, env = "CLIP_CSI_METRICS_ADDR", value_name = "ADDRESS:PORT")]
    pub metrics_addr: Option<SocketAddr>,
    /// File that says how to reach the Kubernetes API, outside of a pod.
    #[arg(long, env = "CLIP_CSI_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
}

/// Settings of `clip-csi own`.
#[derive(Debug, Args)]
pub struct OwnArgs {
    /// User that the directories are to belong to.
    #[arg(long)]
    pub uid: u32,
    /// Group that they are to belong to.
    #[arg(long)]
    pub gid: u32,
    /// The directories; they are made if they are not there.
    #[arg(required = true)]
    pub dirs: Vec<PathBuf>,
}

/// Settings of `clip-csi status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Where the processes of this node meet.
    #[command(flatten)]
    pub run: RunDirArgs,
    /// Which process.
    #[arg(value_enum)]
    pub role: StatusRole,
}

/// A process that can be asked how it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StatusRole {
    /// `clip-csi node`.
    Node,
    /// `clip-csi serve`.
    Serve,
}

/// Settings of `clip-csi node`.
#[derive(Debug, Args)]
pub struct NodeArgs {
    /// Socket to serve CSI on.
    #[arg(
        long,
        env = "CSI_ENDPOINT",
        default_value = "unix:///run/clip-csi/csi.sock"
    )]
    pub endpoint: String,
    /// Where the processes of this node meet.
    #[command(flatten)]
    pub run: RunDirArgs,
    /// Fetch and serve in this process too: mounts end with it.
    #[arg(long)]
    pub in_process: bool,
    /// Name of this node in Kubernetes.
    #[arg(long, env = "NODE_ID")]
    pub node_id: String,
    /// Name of the driver in Kubernetes.
    #[arg(long, env = "CLIP_CSI_DRIVER_NAME", default_value = "csi.clip-csi.dev")]
    pub driver_name: String,
    /// Directory for mounts and their records.
    #[arg(
        long,
        env = "CLIP_CSI_STATE_DIR",
        default_value = "/var/lib/clip-csi/state"
    )]
    pub state_dir: PathBuf,
    /// Register the driver with kubelet through a socket in this directory, which kubelet watches,
    /// such as /var/lib/kubelet/plugins_registry; without it, a sidecar does.
    #[arg(long, env = "CLIP_CSI_REGISTRATION_DIR", value_name = "DIR")]
    pub registration_dir: Option<PathBuf>,
    /// Remove taints with this key from the node once kubelet has registered the driver; needs a pod
    /// whose service account may get CSINodes, and get and patch Nodes.
    #[arg(long, env = "CLIP_CSI_STARTUP_TAINT", value_name = "KEY")]
    pub startup_taint: Option<String>,
    /// Address of /metrics, /healthz and /readyz; none are served without it.
    #[arg(long, env = "CLIP_CSI_METRICS_ADDR", value_name = "ADDRESS:PORT")]
    pub metrics_addr: Option<SocketAddr>,
}

/// Which image, and how to get it.
#[derive(Debug, Clone, Args)]
pub struct ImageArgs {
    /// The image: `registry/repository:tag` or `registry/repository@sha256:…`.
    pub image: String,
    /// Platform to choose from a multi-arch image, such as `linux/arm64`; this machine's if absent.
    #[arg(long)]
    pub platform: Option<String>,
    /// Docker config file with credentials [default: `registry.docker_config_file`, or else
    /// ~/.docker/config.json if it is there].
    #[arg(long, value_name = "FILE")]
    pub docker_config: Option<PathBuf>,
    /// Registry host that speaks plain http; may be given again.
    #[arg(long, value_name = "HOST[:PORT]")]
    pub plain_http: Vec<String>,
}

/// Settings of `clip-csi mount`.
#[derive(Debug, Args)]
pub struct MountArgs {
    /// The image.
    #[command(flatten)]
    pub image: ImageArgs,
    /// The directory to mount at; it must exist.
    pub dir: PathBuf,
    /// Use this index of those that were pushed beside the image, whoever has pushed it, and fail
    /// if it cannot be had.
    #[arg(long, value_name = "DIGEST")]
    pub index_digest: Option<String>,
    /// What to fetch of the image before anybody reads it: `none`, `recorded` (what was read first when
    /// it was mounted before) or `all`; as configured if absent.
    #[arg(long, value_name = "WHAT")]
    pub prefetch: Option<String>,
    /// Serve in the foreground until the mount ends, instead of in the background.
    #[arg(long)]
    pub foreground: bool,
}

/// Settings of `clip-csi warm`.
#[derive(Debug, Args)]
pub struct WarmArgs {
    /// The image.
    #[command(flatten)]
    pub image: ImageArgs,
    /// How much of the image must be there at the end; layers that the remote does not know are put there
    /// whole in any case.
    #[arg(long, value_enum, default_value = "all")]
    pub what: WarmWhatArg,
    /// Bytes per second at most; 0: any number.
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    pub bytes_per_second: u64,
    /// Push the image's index beside it, too, as `index push` does.
    #[arg(long, conflicts_with = "local")]
    pub push_index: bool,
    /// Fill the local disk cache instead: out of the remote content cache, for an image by digest without
    /// asking its registry; where no remote is configured, from the registry.
    #[arg(long)]
    pub local: bool,
}

/// How much of an image is to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WarmWhatArg {
    /// What a mount needs before its first read.
    Index,
    /// And the chunks that were read first when the image was mounted before.
    Recorded,
    /// All of it.
    All,
}

/// Build, push or look at image indexes.
#[derive(Debug, Subcommand)]
pub enum IndexCommand {
    /// Build the index of an image, which leaves its layers in the cache.
    Build {
        /// The image.
        #[command(flatten)]
        image: ImageArgs,
        /// Also write the index to this file.
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Push the index of an image beside it, so that nodes mount the image before they have read its
    /// layers; needs credentials with the right to push.
    Push {
        /// The image.
        #[command(flatten)]
        image: ImageArgs,
    },
    /// Print what an index file contains.
    Inspect {
        /// A `.clip` file.
        file: PathBuf,
        /// Also print every path.
        #[arg(long)]
        tree: bool,
    },
}

/// Look after the local disk cache.
#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// List the layers.
    Ls,
    /// Compare every chunk with its digest; wrong ones are dropped and fetched anew.
    Verify,
    /// Remove layers that are not in use, by DiffID (`sha256:…`), or all.
    Rm {
        /// The layers.
        layers: Vec<String>,
        /// All layers and image indexes.
        #[arg(long, conflicts_with = "layers")]
        all: bool,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
