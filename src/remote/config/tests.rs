//! Tests of the configuration.

use super::*;
use crate::{clock::SystemClock, disk};

fn opened(config: &RemoteConfig) -> Result<Option<ContentCache>, RemoteConfigError> {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    open(config, &Metrics::new(), &clock)
}

fn parsed(text: &str) -> Result<RemoteConfig, toml::de::Error> {
    toml::from_str(text)
}

#[test]
fn by_default_there_is_no_remote() {
    let config = parsed("").unwrap();
    assert_eq!(config, RemoteConfig::default());
    assert!(opened(&config).unwrap().is_none());
}

#[test]
fn unknown_settings_are_refused() {
    let error = parsed("kind = \"dir\"\npaht = \"/x\"").unwrap_err();
    assert!(error.to_string().contains("paht"), "{error}");
    assert!(parsed("kind = \"memcached\"").is_err());
}

#[test]
fn each_engine_opens_without_its_remote() {
    let dir = parsed("kind = \"dir\"\npath = \"/nonexistent/x\"").unwrap();
    assert_eq!(opened(&dir).unwrap().unwrap().engine(), "dir");
    // Nothing listens on port 1.
    let redis = parsed("kind = \"redis\"\nurl = \"redis://127.0.0.1:1\"").unwrap();
    assert_eq!(opened(&redis).unwrap().unwrap().engine(), "redis");
    let s3 = "kind = \"s3\"\ns3 = { bucket = \"b\", endpoint = \"https://127.0.0.1:1\" }";
    assert_eq!(
        opened(&parsed(s3).unwrap()).unwrap().unwrap().engine(),
        "s3"
    );
    assert!(!std::path::Path::new("/nonexistent").exists());
}

#[test]
fn no_secret_is_printed() {
    let config = parsed("kind = \"redis\"\nurl = \"redis://:hunter2@127.0.0.1:1\"").unwrap();
    let cache = opened(&config).unwrap().unwrap();
    let shown = format!("{config:?} {cache:?}");
    assert!(!shown.contains("hunter2"), "{shown}");
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| {
        let path = dir.path().join(name);
        disk::publish(&path, format!("hunter2-{name}").as_bytes()).unwrap();
        path
    };
    let config = parsed(&format!(
        "kind = \"s3\"\ns3 = {{ bucket = \"b\", access_key_file = {:?}, secret_key_file = {:?} }}",
        file("id"),
        file("secret")
    ));
    let config = config.unwrap();
    let cache = opened(&config).unwrap().unwrap();
    let shown = format!("{config:?} {cache:?}");
    assert!(!shown.contains("hunter2"), "{shown}");
}

#[test]
fn errors_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        disk::publish(&path, content).unwrap();
        path.display().to_string()
    };
    let short = file("short", &[b'k'; 31]);
    // The line end does not count.
    let line = file("line", b"1234567890123456789012345678901\n");
    let good = file("good", b"12345678901234567890123456789012\n");
    let huge = file("huge", &[b'k'; 5000]);
    let binary = file("binary", &[0xff; 40]);
    let redis = "kind = \"redis\"\nurl = \"redis://127.0.0.1:1\"";
    let s3 = "kind = \"s3\"\ns3 = { bucket = \"b";
    for (text, expected) in [
        ("kind = \"dir\"".to_owned(), "needs remote.path"),
        ("kind = \"redis\"".to_owned(), "needs remote.url"),
        ("kind = \"redis\"\nurl = \"x\"".to_owned(), "redis://"),
        (
            format!("{redis}\nconnect_timeout_ms = 0"),
            "connect_timeout_ms must not be 0",
        ),
        (
            format!("{redis}\nrequest_timeout_ms = 0"),
            "request_timeout_ms must not be 0",
        ),
        ("kind = \"s3\"".to_owned(), "needs remote.s3.bucket"),
        (
            format!("{s3}\", access_key_file = \"{good}\" }}"),
            "needs remote.s3.secret_key_file",
        ),
        (
            format!("{s3}\", secret_key_file = \"{good}\" }}"),
            "needs remote.s3.access_key_file",
        ),
        (
            format!("{s3}\", access_key_file = \"/nonexistent\", secret_key_file = \"{good}\" }}"),
            "remote.s3.access_key_file /nonexistent: check that",
        ),
        (
            format!("{s3}\", endpoint = \"http://127.0.0.1:1\" }}"),
            "with allow_http = true",
        ),
        (
            format!("{s3}\", endpoint = \"127.0.0.1:1\", allow_http = true }}"),
            "endpoint must be https://",
        ),
        (
            format!("{s3}\", ca_file = \"{good}\" }}"),
            "it holds no certificate",
        ),
        (
            format!("{redis}\nhmac_key_file = \"/nonexistent\""),
            "remote.hmac_key_file /nonexistent: check that",
        ),
        (
            format!("{redis}\npassword_file = \"/nonexistent\""),
            "remote.password_file /nonexistent: check that",
        ),
        (
            format!("{redis}\npassword_file = \"{binary}\""),
            "remote.password_file",
        ),
        (
            format!("{redis}\nhmac_key_file = \"{huge}\""),
            "remote.hmac_key_file",
        ),
        (
            format!("{redis}\nhmac_key_file = \"{short}\""),
            "has 31 bytes: it must have at least 32; make one with `openssl rand",
        ),
        (
            format!("{redis}\nhmac_key_file = \"{line}\""),
            "has 31 bytes",
        ),
    ] {
        let error = opened(&parsed(&text).unwrap()).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}\n{error}");
    }
    let config = format!("{redis}\nhmac_key_file = \"{good}\"\npassword_file = \"{good}\"");
    assert!(opened(&parsed(&config).unwrap()).unwrap().is_some());
}
