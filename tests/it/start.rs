//! The program's start: a bad setting ends it with exit code 64 and a sentence that names it.

use std::{
    fs::File,
    io::Write as _,
    path::Path,
    process::{Command, Output, Stdio},
};

fn write(path: &Path, text: &str) {
    File::create(path)
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
}

/// Runs `clip-csi node` with this configuration; it must end by itself.
fn start(dir: &Path, config: &str) -> Output {
    let file = dir.join("config.toml");
    write(&file, config);
    Command::new(env!("CARGO_BIN_EXE_clip-csi"))
        .args(["node", "--node-id", "n1", "--config"])
        .arg(&file)
        .arg("--endpoint")
        .arg(format!("unix://{}/csi.sock", dir.display()))
        .arg("--state-dir")
        .arg(dir.join("state"))
        .arg("--cache-dir")
        .arg(dir.join("cache"))
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn a_bad_setting_ends_the_program_before_it_binds_or_makes_anything() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    write(&dir.path().join("broken.json"), "hunter2");
    let docker_config = |name: &str| format!("[registry]\ndocker_config_file = {:?}\n", path(name));
    for (config, expected) in [
        (
            "[registry]\nno_such_key = 1\n".to_owned(),
            "no_such_key".to_owned(),
        ),
        (
            docker_config("none.json"),
            format!(
                "registry docker_config_file {}: No such file",
                path("none.json")
            ),
        ),
        (
            docker_config("broken.json"),
            format!(
                "registry docker_config_file {}: it is not a",
                path("broken.json")
            ),
        ),
        (
            format!(
                "[registry.hosts.\"r.x\"]\nca_file = {:?}\n",
                path("none.pem")
            ),
            format!("registry ca_file {}", path("none.pem")),
        ),
        (
            "[remote]\nkind = \"redis\"\n".to_owned(),
            "needs remote.url".to_owned(),
        ),
    ] {
        let output = start(dir.path(), &config);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{config}: {stderr}");
        assert!(stderr.contains(&expected), "{config}: {stderr}");
        assert!(!stderr.contains("hunter2"), "{config}: {stderr}");
        for made in ["csi.sock", "state", "cache"] {
            assert!(!dir.path().join(made).exists(), "{config}: {made}");
        }
    }
}
