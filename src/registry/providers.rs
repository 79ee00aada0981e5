//! Asks kubelet's credential provider plugins for the credentials of an image.
//!
//! Follows kubelet (kubernetes, `pkg/credentialprovider/plugin/plugin.go`), so that a node's
//! `CredentialProviderConfig` and plugins can be used as they are: which plugins are asked
//! (`matchImages`), what they are told, and for how long and for which images an answer holds
//! (`cacheKeyType`). A plugin runs as the user of this process, with its rights and its environment:
//! in the agent, which has the network that plugins need, and no privileges that they could use.
//!
//! `config` reads the file (pure), `answer` understands what plugins say (pure), `exec` runs one.

mod answer;
mod config;
mod exec;

use std::{
    collections::HashMap,
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use sha2::{Digest as _, Sha256};
use tokio::{sync::Semaphore, time::Instant};

pub(crate) use self::config::ProviderConfig;
use self::{answer::CacheKeyType, config::CacheType};
use super::{
    config::RegistryConfigError,
    credentials::{Credentials, DockerConfig},
    requester::{ServiceAccount, VolumeRequester},
};
use crate::secret::Secret;

/// Longest configuration: those that clouds ship have some KiB.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Plugins that run at once: each is a process of some 30 MB for a second or two.
const MAX_RUNNING: usize = 4;

/// Answers that are kept; a node of 110 pods pulls from far fewer registries.
const MAX_ANSWERS: usize = 1024;

/// Whether what was said before counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Freshness {
    /// Answers from before are used for as long as they hold.
    Cached,
    /// Everybody is asked anew: what was said before has been refused.
    Anew,
}

/// The plugins of a node.
#[derive(Debug)]
pub(crate) struct Providers {
    bin_dir: PathBuf,
    providers: Vec<ProviderConfig>,
    running: Semaphore,
    /// std Mutex: held for a map operation, never across an await.
    answers: Mutex<HashMap<AnswerKey, Answer>>,
}

/// What a plugin said.
#[derive(Debug, Clone)]
struct Answer {
    users: DockerConfig,
    asked: Instant,
    /// How long it holds.
    until: Instant,
}

/// What an answer is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct AnswerKey {
    provider: usize,
    images: CacheKeyType,
    /// The image's repository or registry, or nothing.
    scope: String,
    /// Whose: a hash of the service account or its token, where the plugin was told one.
    owner: Option<[u8; 32]>,
}

/// What a plugin is told of the pod's service account.
struct Told {
    owner: [u8; 32],
    token: Secret<String>,
    annotations: Vec<(String, String)>,
}

/// What came of asking one plugin.
#[derive(Debug)]
pub(crate) struct Asked {
    /// The plugin's name.
    pub(crate) provider: String,
    /// Its credentials for the image, or why there are none.
    pub(crate) outcome: Result<Said, String>,
}

/// What a plugin has said for an image.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) users: Vec<Credentials>,
    /// When it is asked again, if it is not at once.
    pub(crate) until: Option<Instant>,
    /// Whether it said so before, and was not asked now.
    pub(crate) is_from_memory: bool,
}

impl Providers {
    /// Reads the configuration at `config_file`, and looks whether its plugins are in `bin_dir`.
    ///
    /// # Errors
    /// [`RegistryConfigError::Providers`] says what is wrong.
    pub(crate) fn open(config_file: &Path, bin_dir: &Path) -> Result<Self, RegistryConfigError> {
        let wrong = |reason: String| RegistryConfigError::Providers {
            path: config_file.to_owned(),
            reason,
        };
        let text = read_bounded(config_file).map_err(wrong)?;
        let providers = config::parse(&text).map_err(wrong)?;
        for provider in &providers {
            let program = bin_dir.join(&provider.name);
            if !program.is_file() {
                return Err(wrong(format!(
                    "there is no plugin {}: put it there, or correct credential_provider_bin_dir",
                    program.display()
                )));
            }
        }
        Ok(Self {
            bin_dir: bin_dir.to_owned(),
            providers,
            running: Semaphore::new(MAX_RUNNING),
            answers: Mutex::default(),
        })
    }

    /// The first plugin that wants to see annotations of service accounts.
    pub(crate) fn wants_annotations(&self) -> Option<&str> {
        let mut all = self.providers.iter();
        let found = all.find(|it| it.token.as_ref().is_some_and(|it| it.wants_annotations()));
        found.map(|it| it.name.as_str())
    }

    /// Asks the plugins that are for the repository, in the order of the file.
    ///
    /// A plugin that fails is none that fails the volume: as kubelet, the next way is tried.
    pub(crate) async fn ask(
        &self,
        host: &str,
        repository: &str,
        requester: Option<&VolumeRequester>,
        account: Option<&ServiceAccount>,
        freshness: Freshness,
    ) -> Vec<Asked> {
        let (mut asked, began) = (Vec::new(), Instant::now());
        for (nth, provider) in self.providers.iter().enumerate() {
            if !provider.matches(host, repository) {
                continue;
            }
            let outcome = match told(provider, requester, account) {
                Ok(told) => {
                    self.ask_one(nth, host, repository, told.as_ref(), freshness)
                        .await
                }
                Err(reason) => Err(reason),
            };
            if let Err(reason) = &outcome {
                tracing::warn!(
                    provider = provider.name,
                    registry = host,
                    reason,
                    "a credential provider gave no credentials"
                );
            }
            let outcome = outcome.map(|it| Said {
                users: it.users.for_repository(host, repository).collect(),
                until: (it.asked < it.until).then_some(it.until),
                is_from_memory: it.asked < began,
            });
            asked.push(Asked {
                provider: provider.name.clone(),
                outcome,
            });
        }
        asked
    }

    async fn ask_one(
        &self,
        nth: usize,
        host: &str,
        repository: &str,
        told: Option<&Told>,
        freshness: Freshness,
    ) -> Result<Answer, String> {
        let not_before = match freshness {
            Freshness::Cached => None,
            Freshness::Anew => Some(Instant::now()),
        };
        if let Some(known) = self.known(nth, host, repository, told, not_before) {
            return Ok(known);
        }
        let slot = self.running.acquire().await;
        let _slot = slot.map_err(|_| "the process is stopping".to_owned())?;
        // Who had to wait finds what was answered meanwhile.
        if let Some(known) = self.known(nth, host, repository, told, not_before) {
            return Ok(known);
        }
        let asked = Instant::now();
        let provider = &self.providers[nth];
        let image = format!("{host}/{repository}");
        let token = told.map(|it| it.token.expose().as_str());
        let annotations = told.map_or(&[][..], |it| it.annotations.as_slice());
        let request = provider.request(&image, token, annotations);
        let program = self.bin_dir.join(&provider.name);
        let output = exec::run(&program, provider, &request, token).await?;
        let answer = answer::parse(&output, &provider.api_version)?;
        let lives = answer.cache.unwrap_or(provider.default_cache);
        let (users, until) = (answer.users, asked + lives);
        let said = Answer {
            users,
            asked,
            until,
        };
        if !lives.is_zero() {
            let key = answer_key(nth, answer.images, host, repository, told);
            let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
            answers.retain(|_, it| asked < it.until);
            if answers.len() < MAX_ANSWERS {
                answers.insert(key, said.clone());
            }
        }
        Ok(said)
    }

    /// An answer that holds still, and was asked for at `not_before` or later.
    fn known(
        &self,
        nth: usize,
        host: &str,
        repository: &str,
        told: Option<&Told>,
        not_before: Option<Instant>,
    ) -> Option<Answer> {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        // In kubelet's order.
        [
            CacheKeyType::Image,
            CacheKeyType::Registry,
            CacheKeyType::Global,
        ]
        .into_iter()
        .filter_map(|images| answers.get(&answer_key(nth, images, host, repository, told)))
        .find(|it| Instant::now() < it.until && not_before.is_none_or(|from| from <= it.asked))
        .cloned()
    }
}

fn answer_key(
    provider: usize,
    images: CacheKeyType,
    host: &str,
    repository: &str,
    told: Option<&Told>,
) -> AnswerKey {
    let scope = match images {
        CacheKeyType::Image => format!("{host}/{repository}"),
        CacheKeyType::Registry => host.to_owned(),
        CacheKeyType::Global => String::new(),
    };
    AnswerKey {
        provider,
        images,
        scope,
        owner: told.map(|it| it.owner),
    }
}

/// What a plugin is to be told of the pod's service account: nothing, if it did not ask for it.
///
/// # Errors
/// If it cannot be told what it demands.
fn told(
    provider: &ProviderConfig,
    requester: Option<&VolumeRequester>,
    account: Option<&ServiceAccount>,
) -> Result<Option<Told>, String> {
    let Some(wanted) = &provider.token else {
        return Ok(None);
    };
    let token = requester.and_then(|it| it.tokens.get(&wanted.audience));
    let pod = requester.and_then(|it| it.pod.as_ref());
    let (Some(token), Some(pod)) = (token, pod) else {
        if wanted.is_required {
            return Err(format!(
                "it wants a token of the pod's service account for the audience {:?}: have kubelet give one (tokenRequests and podInfoOnMount of the CSIDriver)",
                wanted.audience
            ));
        }
        return Ok(None);
    };
    let has = |key: &String| account.and_then(|it| it.annotations.get(key)).cloned();
    let mut annotations = Vec::new();
    for key in &wanted.required_annotations {
        let value = has(key).ok_or_else(|| {
            format!("it wants the service account {pod} to have the annotation {key:?}")
        })?;
        annotations.push((key.clone(), value));
    }
    let optional = wanted.optional_annotations.iter();
    annotations.extend(optional.filter_map(|key| Some((key.clone(), has(key)?))));
    let mut hash = Sha256::new();
    match wanted.cache {
        CacheType::ServiceAccount => hash.update(format!("account {pod}")),
        CacheType::Token => hash.update(format!("token {}", token.expose())),
    }
    // Who changes an annotation is answered anew.
    for (key, value) in &annotations {
        hash.update(format!("\0{key}\0{value}"));
    }
    Ok(Some(Told {
        owner: hash.finalize().into(),
        token: token.clone(),
        annotations,
    }))
}

fn read_bounded(path: &Path) -> Result<String, String> {
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(MAX_CONFIG_BYTES + 1).read_to_string(&mut text))
        .map_err(|err| err.to_string())?;
    if MAX_CONFIG_BYTES < text.len() as u64 {
        return Err(format!("it is longer than {MAX_CONFIG_BYTES} bytes"));
    }
    Ok(text)
}
