//! The programs of the roles that shall be small: the node service and the server.
//!
//! A process has resident what it runs of its program and what the kernel maps around that, so that a
//! large program is resident to a good part even where little of it runs. `clip-csi` reads command
//! line and configuration, then replaces itself by a program that lies beside it, which has no code
//! for networks, TLS or registries.

use std::{
    ffi::OsStr,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Command, ExitCode},
};

use anyhow::{Context, anyhow};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{sys, telemetry};

/// How a program logs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LogSettings {
    pub(super) is_json: bool,
    pub(super) level: String,
}

impl LogSettings {
    /// Sets logging up.
    ///
    /// # Errors
    /// If the level is malformed.
    pub fn start(&self) -> anyhow::Result<()> {
        let format = if self.is_json {
            telemetry::LogFormat::Json
        } else {
            telemetry::LogFormat::Text
        };
        telemetry::init(format, self.level.parse()?)?;
        Ok(())
    }
}

/// Replaces this process by the program `name`; returns only if that fails.
pub(super) fn become_program(name: &str, settings: &impl Serialize) -> anyhow::Error {
    let path = match std::env::current_exe() {
        Ok(path) => path.with_file_name(name),
        Err(err) => return anyhow!(err).context("looking for this program"),
    };
    match serde_json::to_string(settings) {
        Ok(settings) => {
            let err = Command::new(&path).arg0(name).arg(settings).exec();
            anyhow!(err).context(format!(
                "starting {}, which is installed beside clip-csi",
                path.display()
            ))
        }
        Err(err) => err.into(),
    }
}

/// What such a program does first and last: reads its settings, runs, prints what went wrong.
pub fn main<S: DeserializeOwned>(run: impl FnOnce(S) -> anyhow::Result<ExitCode>) -> ExitCode {
    sys::tune_allocator();
    let settings = std::env::args_os().nth(1);
    let settings = settings.as_deref().and_then(OsStr::to_str);
    let outcome = settings
        .context("this program is started by clip-csi node or clip-csi serve")
        .and_then(|it| serde_json::from_str(it).context("settings"))
        .and_then(run);
    match outcome {
        Ok(code) => code,
        Err(err) => super::fail(&err, super::exit_code(&err)),
    }
}

/// The program that runs now, to be started again.
pub(super) fn this_program() -> PathBuf {
    PathBuf::from("/proc/self/exe")
}
