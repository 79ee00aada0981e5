//! Runs a credential provider plugin: within a time, with bounded output, and nothing of it left.

use std::{path::Path, process::Stdio, time::Duration};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    process::Command,
    time::timeout,
};

use super::config::ProviderConfig;

/// How long a plugin may take; kubelet's own bound (`pluginExecTimeout`).
const DEADLINE: Duration = Duration::from_secs(60);

/// Longest answer: a token of a few KiB for some registries.
const MAX_OUTPUT_BYTES: u64 = 1 << 20;

/// How much of what a plugin says on its stderr is repeated: it is for a log.
const MAX_SHOWN_CHARS: usize = 300;

/// Ends the plugin and whatever it has started.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            // It is gone already, when all went well.
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}

/// Runs the plugin with `request` as its input and returns its output.
///
/// It inherits the environment, as kubelet's do, so that proxies and roles of the cloud hold for it.
///
/// # Errors
/// Says what went wrong, with what the plugin said on stderr; its output is never quoted.
///
/// # Cancellation
/// Safe: the plugin is killed.
pub(super) async fn run(
    program: &Path,
    provider: &ProviderConfig,
    request: &[u8],
    token: Option<&str>,
) -> Result<Vec<u8>, String> {
    let outcome = run_within(DEADLINE, program, provider, request).await;
    // What it was told in confidence is not repeated, should it repeat it.
    let outcome = outcome.map_err(|reason| match token {
        Some(token) if !token.is_empty() => reason.replace(token, "<redacted>"),
        Some(_) | None => reason,
    });
    outcome.map_err(|reason| reason.chars().take(MAX_SHOWN_CHARS).collect())
}

async fn run_within(
    deadline: Duration,
    program: &Path,
    provider: &ProviderConfig,
    request: &[u8],
) -> Result<Vec<u8>, String> {
    let mut child = Command::new(program)
        .args(&provider.args)
        .envs(provider.env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|err| format!("running {}: {err}", program.display()))?;
    let pid = child.id().and_then(|it| i32::try_from(it).ok());
    let group = Group(pid.and_then(Pid::from_raw));
    let (Some(mut stdin), Some(stdout), Some(stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err("it has no pipes".to_owned());
    };
    let work = async {
        let feed = async {
            // One that does not read what it is told may answer nevertheless.
            let _ = stdin.write_all(request).await;
            drop(stdin);
        };
        let ((), output, said) = tokio::join!(feed, read(stdout), read(stderr));
        (child.wait().await, output, said)
    };
    let (status, output, said) = timeout(deadline, work)
        .await
        .map_err(|_| format!("it did not end within {} s", deadline.as_secs_f32()))?;
    // Waited for: its number may be another's by now.
    let mut group = group;
    group.0 = None;
    let status = status.map_err(|err| format!("waiting for it: {err}"))?;
    if !status.success() {
        let said = String::from_utf8_lossy(&said);
        return Err(format!("it ended with {status} and said {:?}", said.trim()));
    }
    if MAX_OUTPUT_BYTES < output.len() as u64 {
        return Err(format!(
            "its answer is longer than {MAX_OUTPUT_BYTES} bytes"
        ));
    }
    Ok(output)
}

/// Reads a byte more than is allowed, and throws the rest away: one that says more must not hang.
async fn read(mut pipe: impl AsyncRead + Unpin) -> Vec<u8> {
    let mut kept = Vec::new();
    // What breaks is an answer that is too short, which is seen where it is parsed.
    let _ = (&mut pipe)
        .take(MAX_OUTPUT_BYTES + 1)
        .read_to_end(&mut kept)
        .await;
    let _ = tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await;
    kept
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::registry::providers::config;

    /// A plugin that is a line of shell.
    fn plugin(line: &str) -> ProviderConfig {
        let text = serde_json::json!({
            "apiVersion": "kubelet.config.k8s.io/v1", "kind": "CredentialProviderConfig",
            "providers": [{
                "name": "sh", "matchImages": ["r.x"], "defaultCacheDuration": "1h",
                "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
                "args": ["-c", line], "env": [{"name": "FROM_CONFIG", "value": "v"}],
            }],
        });
        config::parse(&text.to_string()).unwrap().remove(0)
    }

    async fn output(line: &str, request: &[u8]) -> Result<String, String> {
        let output = run(Path::new("/bin/sh"), &plugin(line), request, Some("t0ken")).await;
        output.map(|it| String::from_utf8(it).unwrap())
    }

    #[tokio::test]
    async fn a_plugin_reads_its_input_and_environment() {
        let line = "printf '%s %s ' \"$FROM_CONFIG\" \"${PATH:+inherited}\"; cat";
        assert_eq!(output(line, b"asked").await.unwrap(), "v inherited asked");
        // Larger than a pipe, and not read at all.
        let large = vec![b'x'; 1 << 20];
        assert_eq!(output("cat", &large).await.unwrap().len(), 1 << 20);
        assert_eq!(output("echo ok", &large).await.unwrap(), "ok\n");
    }

    #[tokio::test]
    async fn failures_are_told_without_output_and_token() {
        let line = "echo hunter2; echo no role for t0ken >&2; exit 3";
        let error = output(line, b"").await.unwrap_err();
        assert!(error.contains("exit status: 3"), "{error}");
        assert!(error.contains("no role for <redacted>"), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
        let error = output("head -c 3000000 /dev/zero", b"").await.unwrap_err();
        assert_eq!(error, "its answer is longer than 1048576 bytes");
        let error = output("head -c 3000000 /dev/zero >&2; exit 1", b"")
            .await
            .unwrap_err();
        assert!(error.len() < 1000, "{}", error.len());
        let missing = run(Path::new("/nonexistent/p"), &plugin(""), b"", None).await;
        assert!(missing.unwrap_err().contains("running /nonexistent/p"));
    }

    #[tokio::test]
    async fn one_that_hangs_is_killed_with_what_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let alive = dir.path().join("alive");
        let line = format!("(sleep 4; touch {}) & sleep 60", alive.display());
        let started = Instant::now();
        let within = Duration::from_millis(300);
        let error = run_within(within, Path::new("/bin/sh"), &plugin(&line), b"").await;
        assert_eq!(error.unwrap_err(), "it did not end within 0.3 s");
        assert!(started.elapsed() < Duration::from_millis(3500));
        tokio::time::sleep(Duration::from_millis(4500)).await;
        assert!(!alive.exists(), "its child lives");
    }
}
