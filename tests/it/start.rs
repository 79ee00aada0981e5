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

/// Runs `clip-csi node` with this configuration and these words; it must end by itself.
fn start(dir: &Path, config: &str, words: &[&str]) -> Output {
    let file = dir.join("config.toml");
    write(&file, config);
    Command::new(env!("CARGO_BIN_EXE_clip-csi"))
        .args(["node", "--in-process", "--node-id", "n1", "--config"])
        .arg(&file)
        .arg("--endpoint")
        .arg(format!("unix://{}/csi.sock", dir.display()))
        .arg("--state-dir")
        .arg(dir.join("state"))
        .arg("--cache-dir")
        .arg(dir.join("cache"))
        .args(words)
        .env_remove("KUBERNETES_SERVICE_HOST")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Fails unless the start ends with exit code 64 and a text that has `expected`.
fn refuse(dir: &Path, config: &str, words: &[&str], expected: &str) {
    let output = start(dir, config, words);
    let stderr = String::from_utf8_lossy(&output.stderr);
    let case = format!("{config}{words:?}: {stderr}");
    assert_eq!(output.status.code(), Some(64), "{case}");
    assert!(stderr.contains(expected), "{expected}: {case}");
    assert!(!stderr.contains("hunter2"), "{case}");
    for made in ["csi.sock", "state", "cache"] {
        assert!(!dir.join(made).exists(), "{made}: {case}");
    }
}

#[test]
fn a_bad_setting_ends_the_program_before_it_binds_or_makes_anything() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    write(&dir.path().join("broken.json"), "hunter2");
    for (config, expected) in [
        ("[registry]\nno_such_key = 1\n", "no_such_key"),
        (
            "[registry]\ndocker_config_file = \"none.json\"\n",
            "registry docker_config_file none.json: No such file",
        ),
        (
            "[registry]\ndocker_config_file = \"DIR/broken.json\"\n",
            "broken.json: it is not a .dockerconfigjson: line 1",
        ),
        (
            "[registry.hosts.\"r.x\"]\nca_file = \"none.pem\"\n",
            "registry ca_file none.pem: No such file",
        ),
        (
            "[registry.hosts.\"r.x\"]\nmirrors = [\"http://m\"]\n",
            "mirror \"http://m\" of r.x must be written host[:port]",
        ),
        ("[remote]\nkind = \"redis\"\n", "needs remote.url"),
    ] {
        refuse(
            dir.path(),
            &config.replace("DIR/", &path("")),
            &[],
            expected,
        );
    }
    for (words, expected) in [
        (["--driver-name", "9"], "driver name \"9\" is malformed"),
        (
            ["--startup-taint", "a=b:NoSchedule"],
            "--startup-taint: taint key \"a=b:NoSchedule\" is malformed: give the key alone",
        ),
        (
            ["--startup-taint", "a/b"],
            "--startup-taint: not in a pod of a cluster: set automountServiceAccountToken for this pod",
        ),
    ] {
        refuse(dir.path(), "", &words, expected);
    }
}
