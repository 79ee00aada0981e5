//! Reads a directory of `hosts.toml` files, laid out as containerd's `certs.d`.
//!
//! ```text
//! <dir>/<host>[:<port>]/hosts.toml      or <host>_<port>_
//! <dir>/_default/hosts.toml             for registries without a directory
//! ```
//!
//! Follows containerd (`core/remotes/docker/config/hosts.go`). A key that is unknown is refused by name,
//! not passed over: a mirror that is asked otherwise than was meant is found late.

use std::{
    collections::BTreeMap,
    fs,
    io::Read as _,
    path::{Path, PathBuf},
};

use reqwest::{
    Url,
    header::{HeaderMap, HeaderName, HeaderValue},
};
use serde::Deserialize;
use toml::Spanned;

use super::{
    endpoint::{Abilities, EndpointSettings, RegistryEndpoints},
    reference::{DOCKER_HUB, canonical_host, check_host},
    tls::{Files, Trust},
    transport::host_of,
};

/// The directory for registries that have none.
const DEFAULT: &str = "_default";

/// What each directory holds.
const FILE: &str = "hosts.toml";

/// Longest file.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Most hosts of a file: each one is asked for what the others do not give.
const MAX_HOSTS: usize = 16;

/// Stands for the name of a registry without `server`.
const NO_SERVER: &str = "https://registry.invalid";

/// What a directory says of registries.
#[derive(Debug, Default)]
pub(crate) struct HostsDir {
    by_registry: BTreeMap<String, Registry>,
    default: Option<Registry>,
}

/// What a file says of one registry, or of all others.
#[derive(Debug, Clone)]
struct Registry {
    mirrors: Vec<EndpointSettings>,
    /// The registry itself, at [`NO_SERVER`] if it is where its name says.
    origin: EndpointSettings,
    place: Place,
}

/// Where a registry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Where `server` says.
    Said,
    /// Where its name says, which for the default is not known yet.
    ByName,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileFormat {
    server: Option<String>,
    /// In the file's order, which is that in which they are asked, by the place of each.
    #[serde(default)]
    host: BTreeMap<String, Spanned<HostFormat>>,
    // What else stands at the top is the server's, as in `HostFormat`.
    capabilities: Option<Vec<Capability>>,
    ca: Option<OneOrMore<PathBuf>>,
    client: Option<Client>,
    #[serde(default)]
    skip_verify: bool,
    #[serde(default)]
    override_path: bool,
    #[serde(default)]
    header: BTreeMap<String, OneOrMore<String>>,
    #[serde(default)]
    dial_timeout: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct HostFormat {
    capabilities: Option<Vec<Capability>>,
    ca: Option<OneOrMore<PathBuf>>,
    client: Option<Client>,
    skip_verify: bool,
    override_path: bool,
    header: BTreeMap<String, OneOrMore<String>>,
    /// Taken and not used: `connect_timeout_seconds` holds for all hosts.
    dial_timeout: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Capability {
    Pull,
    Resolve,
    Push,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum OneOrMore<T> {
    One(T),
    More(Vec<T>),
}

/// A certificate to show, with its key in the same file or another.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Client {
    One(PathBuf),
    Several(Vec<OneOrMore<PathBuf>>),
}

impl<T> OneOrMore<T> {
    fn as_slice(&self) -> &[T] {
        match self {
            Self::One(it) => std::slice::from_ref(it),
            Self::More(it) => it,
        }
    }
}

/// Whether `skip_verify` may stand in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SkipVerify {
    Refused,
    Allowed,
}

impl HostsDir {
    /// Reads all files below `dir`.
    ///
    /// # Errors
    /// The file, and what is wrong with it.
    pub(crate) fn read(dir: &Path, skip_verify: SkipVerify) -> Result<Self, (PathBuf, String)> {
        let listed = fs::read_dir(dir).map_err(|err| (dir.to_owned(), err.to_string()))?;
        let mut found = Self::default();
        for entry in listed {
            let entry = entry.map_err(|err| (dir.to_owned(), err.to_string()))?;
            let file = entry.path().join(FILE);
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            // Docker's layout has certificates there alone.
            if !file.is_file() {
                continue;
            }
            let wrong = |reason| (file.clone(), reason);
            let host = host_of_directory(&name).map_err(wrong)?;
            let registry = read_bounded(&file)
                .and_then(|text| parse(&text, &entry.path(), skip_verify))
                .map_err(wrong)?;
            match host {
                None => found.default = Some(registry),
                Some(host) => {
                    // `host_port_` is looked for first, as containerd does.
                    if name.ends_with('_') || !found.by_registry.contains_key(&host) {
                        found.by_registry.insert(host, registry);
                    }
                }
            }
        }
        Ok(found)
    }

    /// What it says of a registry, if anything.
    pub(crate) fn endpoints(&self, registry: &str) -> Option<RegistryEndpoints> {
        let found = self.by_registry.get(registry).or(self.default.as_ref())?;
        let mut origin = EndpointSettings {
            // Errors and credentials are about the registry, wherever it is.
            host: registry.to_owned(),
            ..found.origin.clone()
        };
        if found.place == Place::ByName {
            let name = if registry == DOCKER_HUB {
                "registry-1.docker.io"
            } else {
                registry
            };
            let path = origin.base.as_ref().map_or("/v2/", Url::path);
            origin.base = Url::parse(&format!("https://{name}{path}")).ok();
        }
        // A file may name the registry itself among the hosts: that is no mirror, and what it says of it holds.
        let is_itself = |it: &&EndpointSettings| it.base == origin.base;
        let (itself, mirrors): (Vec<_>, Vec<_>) = found.mirrors.iter().partition(is_itself);
        for it in itself {
            if let Trust::Files(_) = it.trust {
                origin.trust = it.trust.clone();
            }
            origin.headers.extend(it.headers.clone());
        }
        Some(RegistryEndpoints {
            mirrors: mirrors.into_iter().cloned().collect(),
            origin,
            always_ask_origin: false,
        })
    }

    /// Files that connections need.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Files> {
        let registries = self.by_registry.values().chain(&self.default);
        let endpoints = registries.flat_map(|it| it.mirrors.iter().chain([&it.origin]));
        endpoints.filter_map(|it| match &it.trust {
            Trust::Files(files) => Some(files),
            Trust::None | Trust::System => None,
        })
    }
}

/// The registry that a directory's name stands for; `None` for the default.
fn host_of_directory(name: &str) -> Result<Option<String>, String> {
    if name == DEFAULT {
        return Ok(None);
    }
    let host = match name.strip_suffix('_').and_then(|it| it.rsplit_once('_')) {
        Some((host, port)) => format!("{host}:{port}"),
        None => name.to_owned(),
    };
    check_host(&host).map_err(|reason| format!("its directory is no host[:port]: {reason}"))?;
    Ok(Some(canonical_host(&host)))
}

fn parse(text: &str, dir: &Path, skip_verify: SkipVerify) -> Result<Registry, String> {
    // The error's own text shows the line, which may have a secret in a header.
    let file: FileFormat = toml::from_str(text).map_err(|err| {
        let before = err.span().and_then(|it| text.get(..it.start));
        let line = before.unwrap_or_default().matches('\n').count() + 1;
        format!("line {line}: {}", err.message())
    })?;
    let own = HostFormat {
        capabilities: file.capabilities,
        ca: file.ca,
        client: file.client,
        skip_verify: file.skip_verify,
        override_path: file.override_path,
        header: file.header,
        dial_timeout: file.dial_timeout,
    };
    let mut hosts: Vec<_> = file.host.into_iter().collect();
    hosts.sort_by_key(|(_, it)| it.span().start);
    if MAX_HOSTS < hosts.len() {
        return Err(format!(
            "it has {} hosts, {MAX_HOSTS} are taken",
            hosts.len()
        ));
    }
    let skips = own.skip_verify || hosts.iter().any(|(_, it)| it.get_ref().skip_verify);
    if skip_verify == SkipVerify::Refused && skips {
        return Err(
            "skip_verify lets everybody on the way read passwords and change images: name the host's ca, or set registry.allow_skip_verify"
                .to_owned(),
        );
    }
    let mirrors = hosts.iter();
    let mirrors = mirrors.map(|(url, it)| endpoint(url, it.get_ref(), dir));
    let (server, place) = match &file.server {
        Some(url) => (url.as_str(), Place::Said),
        None => (NO_SERVER, Place::ByName),
    };
    Ok(Registry {
        mirrors: mirrors.collect::<Result<_, _>>()?,
        origin: endpoint(server, &own, dir)?,
        place,
    })
}

/// What is said of one host.
fn endpoint(text: &str, it: &HostFormat, dir: &Path) -> Result<EndpointSettings, String> {
    let wrong = |reason: &str| format!("host {text:?}: {reason}");
    let with_scheme = if text.contains("://") {
        text.to_owned()
    } else {
        format!("https://{text}")
    };
    let mut base = Url::parse(&with_scheme)
        .ok()
        .filter(|it| matches!(it.scheme(), "http" | "https") && it.has_host())
        .filter(|it| it.username().is_empty() && it.password().is_none())
        .filter(|it| it.query().is_none() && it.fragment().is_none())
        .ok_or_else(|| wrong("it must be written https://HOST[:PORT][/PATH], or http://"))?;
    let path = base.path().trim_end_matches('/');
    let path = if it.override_path || path.ends_with("/v2") {
        format!("{path}/")
    } else {
        format!("{path}/v2/")
    };
    base.set_path(&path);
    let files = Files {
        authorities: it
            .ca
            .iter()
            .flat_map(|it| it.as_slice())
            .map(|it| dir.join(it))
            .collect(),
        client: match &it.client {
            None => None,
            Some(client) => Some(client_files(client, dir).map_err(|it| wrong(&it))?),
        },
        skip_verify: it.skip_verify,
    };
    let mut headers = HeaderMap::new();
    for (name, values) in &it.header {
        let name: HeaderName = name
            .parse()
            .map_err(|_| wrong(&format!("{name:?} is no header's name")))?;
        for value in values.as_slice() {
            let mut value: HeaderValue = value
                .parse()
                .map_err(|_| wrong(&format!("the value of header {name} is malformed")))?;
            value.set_sensitive(true);
            headers.append(name.clone(), value);
        }
    }
    let can = |wanted| {
        it.capabilities
            .as_ref()
            .is_none_or(|it| it.contains(&wanted))
    };
    Ok(EndpointSettings {
        host: canonical_host(&host_of(&base)),
        trust: match base.scheme() {
            "http" => Trust::None,
            _ if files == Files::default() => Trust::System,
            _ => Trust::Files(files),
        },
        base: Some(base),
        headers,
        abilities: Abilities {
            resolve: can(Capability::Resolve),
            pull: can(Capability::Pull),
        },
    })
}

/// The file of the certificate, and that of its key. Of several, the first: a connection shows one.
fn client_files(client: &Client, dir: &Path) -> Result<(PathBuf, PathBuf), String> {
    let pair = match client {
        Client::One(file) => std::slice::from_ref(file),
        Client::Several(several) => several.first().map_or(&[][..], OneOrMore::as_slice),
    };
    match pair {
        [both] => Ok((dir.join(both), dir.join(both))),
        [certificate, key] if !key.as_os_str().is_empty() => {
            Ok((dir.join(certificate), dir.join(key)))
        }
        [both, _] => Ok((dir.join(both), dir.join(both))),
        _ => Err("client must be a file, or pairs of certificate and key".to_owned()),
    }
}

fn read_bounded(path: &Path) -> Result<String, String> {
    let mut text = String::new();
    fs::File::open(path)
        .and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text))
        .map_err(|err| err.to_string())?;
    if MAX_FILE_BYTES < text.len() as u64 {
        return Err(format!("it is longer than {MAX_FILE_BYTES} bytes"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, name: &str, text: &str) {
        fs::create_dir_all(dir.join(name)).unwrap();
        let mut file = fs::File::create(dir.join(name).join(FILE)).unwrap();
        std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
    }

    fn read(text: &str) -> Result<HostsDir, String> {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "docker.io", text);
        HostsDir::read(dir.path(), SkipVerify::Refused).map_err(|(_, reason)| reason)
    }

    #[test]
    fn hosts_are_asked_in_the_files_order_with_what_is_said_of_each() {
        let found = read(
            r#"
server = "https://registry-1.docker.io"

[host."https://z.example:5000"]
  capabilities = ["pull"]
  ca = "ca.crt"
  client = [["client.cert", "client.key"]]
  [host."https://z.example:5000".header]
    x-one = "1"
    x-two = ["2", "3"]

[host."http://a.example/v2/hub"]
  capabilities = ["pull", "resolve"]
  override_path = true

[host."https://m.example/proxy"]
"#,
        )
        .unwrap();
        let endpoints = found.endpoints("docker.io").unwrap();
        let told: Vec<_> = endpoints
            .mirrors
            .iter()
            .map(|it| {
                (
                    it.host.as_str(),
                    it.url("team/app", "blobs/x").unwrap().to_string(),
                )
            })
            .collect();
        assert_eq!(
            told,
            [
                (
                    "z.example:5000",
                    "https://z.example:5000/v2/team/app/blobs/x".to_owned()
                ),
                (
                    "a.example",
                    "http://a.example/v2/hub/team/app/blobs/x".to_owned()
                ),
                (
                    "m.example",
                    "https://m.example/proxy/v2/team/app/blobs/x".to_owned()
                ),
            ]
        );
        let first = &endpoints.mirrors[0];
        assert_eq!(
            first.abilities,
            Abilities {
                resolve: false,
                pull: true
            }
        );
        assert_eq!(first.headers.get_all("x-two").iter().count(), 2);
        let Trust::Files(files) = &first.trust else {
            panic!("{:?}", first.trust);
        };
        assert!(files.authorities[0].ends_with("docker.io/ca.crt"));
        let (certificate, key) = files.client.as_ref().unwrap();
        assert!(certificate.ends_with("client.cert") && key.ends_with("client.key"));
        assert_eq!(endpoints.mirrors[1].trust, Trust::None);
        assert_eq!(endpoints.mirrors[2].abilities, Abilities::ALL);
        assert_eq!(endpoints.origin.host, "docker.io");
        assert_eq!(
            endpoints.origin.base.as_ref().unwrap().as_str(),
            "https://registry-1.docker.io/v2/"
        );
        assert!(found.endpoints("quay.io").is_none());
        assert_eq!(found.files().count(), 1);
    }

    #[test]
    fn directories_are_found_as_containerd_finds_them() {
        let dir = tempfile::tempdir().unwrap();
        let mirror = |name: &str| format!("[host.\"https://{name}\"]\n");
        write(dir.path(), "r.x:5000", &mirror("plain"));
        write(dir.path(), "r.x_5000_", &mirror("underscores"));
        write(dir.path(), "index.docker.io", &mirror("hub"));
        write(dir.path(), DEFAULT, &mirror("default"));
        fs::create_dir(dir.path().join("docker-layout.x")).unwrap();
        let found = HostsDir::read(dir.path(), SkipVerify::Refused).unwrap();
        for (registry, mirror, origin) in [
            ("r.x:5000", "underscores", "https://r.x:5000/v2/"),
            ("docker.io", "hub", "https://registry-1.docker.io/v2/"),
            ("other.x", "default", "https://other.x/v2/"),
        ] {
            let endpoints = found.endpoints(registry).unwrap();
            assert_eq!(endpoints.mirrors[0].host, mirror);
            assert_eq!(endpoints.origin.base.as_ref().unwrap().as_str(), origin);
        }
        assert!(
            found.endpoints("default").unwrap().mirrors.is_empty(),
            "no mirror of itself"
        );
    }

    #[test]
    fn what_stands_at_the_top_is_about_the_registry_itself_also_without_server() {
        let dir = tempfile::tempdir().unwrap();
        let text = "ca = \"ca.crt\"\nclient = \"client.pem\"\nheader = {x-one = \"1\"}\n";
        for name in ["r.x", DEFAULT] {
            write(dir.path(), name, text);
        }
        write(dir.path(), "s.x", "override_path = true");
        let found = HostsDir::read(dir.path(), SkipVerify::Refused).unwrap();
        assert_eq!(found.files().count(), 2);
        for (registry, directory, base) in [
            ("r.x", "r.x", "https://r.x/v2/"),
            ("o.x:5000", DEFAULT, "https://o.x:5000/v2/"),
        ] {
            let origin = found.endpoints(registry).unwrap().origin;
            assert_eq!(origin.host, registry);
            assert_eq!(origin.base.unwrap().as_str(), base);
            assert_eq!(origin.headers["x-one"], "1");
            let Trust::Files(files) = origin.trust else {
                panic!("{:?}", origin.trust);
            };
            let at = |file: &str| dir.path().join(directory).join(file);
            assert_eq!(files.authorities, [at("ca.crt")]);
            assert_eq!(files.client, Some((at("client.pem"), at("client.pem"))));
            assert!(found.files().any(|it| *it == files), "they are not read");
        }
        // So does what stands under its own URL, before that.
        let text = "ca = \"ca.crt\"\n[host.\"https://t.x\"]\nca = \"own.crt\"\nheader = {x-two = \"2\"}\n[host.\"https://m.x\"]\n";
        write(dir.path(), "t.x", text);
        let found = HostsDir::read(dir.path(), SkipVerify::Refused).unwrap();
        let endpoints = found.endpoints("t.x").unwrap();
        assert_eq!(endpoints.mirrors.len(), 1);
        assert_eq!(endpoints.origin.headers["x-two"], "2");
        let Trust::Files(files) = endpoints.origin.trust else {
            panic!("{:?}", endpoints.origin.trust);
        };
        assert_eq!(files.authorities, [dir.path().join("t.x/own.crt")]);
        let origin = found.endpoints("s.x").unwrap().origin;
        assert_eq!(origin.base.unwrap().as_str(), "https://s.x/");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, expected) in [
            ("servre = \"x\"", "unknown field `servre`"),
            (
                "[host.\"https://m\"]\nskip_verfy = true",
                "unknown field `skip_verfy`",
            ),
            (
                "[host.\"https://m\"]\nskip_verify = true",
                "set registry.allow_skip_verify",
            ),
            ("skip_verify = true", "set registry.allow_skip_verify"),
            (
                "[host.\"ftp://m\"]",
                "host \"ftp://m\": it must be written https://",
            ),
            (
                "[host.\"https://u:hunter2@m\"]\n[host.\"https://\"]",
                "it must be written https://",
            ),
            ("server = \"https://s?x=1\"", "it must be written https://"),
            ("capabilities = [\"fly\"]", "unknown variant `fly`"),
            ("client = []", "client must be a file"),
            ("[header]\n\"a b\" = \"x\"", "\"a b\" is no header's name"),
            (
                "[header]\na = \"hunter2\\n\"",
                "the value of header a is malformed",
            ),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "a b", "");
        let (file, error) = HostsDir::read(dir.path(), SkipVerify::Refused).unwrap_err();
        assert!(file.ends_with("a b/hosts.toml"));
        assert!(error.contains("no host[:port]"), "{error}");
        write(dir.path(), "r.x", "skip_verify = true");
        fs::remove_dir_all(dir.path().join("a b")).unwrap();
        let found = HostsDir::read(dir.path(), SkipVerify::Allowed).unwrap();
        let Trust::Files(files) = found.endpoints("r.x").unwrap().origin.trust else {
            panic!("no files");
        };
        assert!(files.skip_verify);
    }
}
