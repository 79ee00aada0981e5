//! Reads kubelet's `CredentialProviderConfig`.

use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

use super::answer::{MAX_CACHE, parse_duration};
use crate::registry::credentials::Key;

/// Versions of the file; their fields that count are the same.
const FILE_VERSIONS: [&str; 3] = [
    "kubelet.config.k8s.io/v1",
    "kubelet.config.k8s.io/v1beta1",
    "kubelet.config.k8s.io/v1alpha1",
];

/// Versions of what is said to plugins and by them, likewise.
const API_VERSIONS: [&str; 2] = [
    "credentialprovider.kubelet.k8s.io/v1",
    "credentialprovider.kubelet.k8s.io/v1beta1",
];

/// A plugin, and for which images it is asked.
#[derive(Debug)]
pub(crate) struct ProviderConfig {
    /// Its name, which is that of its program.
    pub(super) name: String,
    pub(super) api_version: String,
    match_images: Vec<Key>,
    /// How long an answer holds that does not say.
    pub(super) default_cache: Duration,
    pub(super) args: Vec<String>,
    pub(super) env: Vec<(String, String)>,
    /// What it wants to be told of the pod's service account.
    pub(super) token: Option<TokenAttributes>,
}

/// What a plugin wants to be told of a pod's service account.
#[derive(Debug)]
pub(super) struct TokenAttributes {
    pub(super) audience: String,
    pub(super) cache: CacheType,
    /// Whether it is not asked without.
    pub(super) is_required: bool,
    pub(super) required_annotations: Vec<String>,
    pub(super) optional_annotations: Vec<String>,
}

/// For whom an answer holds that came of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(super) enum CacheType {
    /// All pods of the service account.
    ServiceAccount,
    /// Who has the same token.
    Token,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct FileFormat {
    api_version: String,
    kind: String,
    #[serde(default)]
    providers: Vec<ProviderFormat>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ProviderFormat {
    name: String,
    #[serde(default)]
    match_images: Vec<String>,
    default_cache_duration: String,
    api_version: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<EnvFormat>,
    token_attributes: Option<TokenFormat>,
}

#[derive(Deserialize)]
struct EnvFormat {
    name: String,
    #[serde(default)]
    value: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TokenFormat {
    service_account_token_audience: String,
    cache_type: CacheType,
    require_service_account: bool,
    #[serde(default)]
    required_service_account_annotation_keys: Vec<String>,
    #[serde(default)]
    optional_service_account_annotation_keys: Vec<String>,
}

impl ProviderConfig {
    /// Whether it is asked for images of the repository.
    pub(super) fn matches(&self, host: &str, repository: &str) -> bool {
        self.match_images
            .iter()
            .any(|it| it.matches(host, repository))
    }

    /// What it is sent.
    pub(super) fn request(
        &self,
        image: &str,
        token: Option<&str>,
        annotations: &[(String, String)],
    ) -> Vec<u8> {
        let mut request = json!({
            "kind": "CredentialProviderRequest",
            "apiVersion": self.api_version,
            "image": image,
        });
        if let Some(token) = token {
            request["serviceAccountToken"] = json!(token);
            let annotations = annotations.iter();
            let annotations: serde_json::Map<_, _> = annotations
                .map(|(key, value)| (key.clone(), json!(value)))
                .collect();
            request["serviceAccountAnnotations"] = annotations.into();
        }
        request.to_string().into_bytes()
    }
}

impl TokenAttributes {
    pub(super) fn wants_annotations(&self) -> bool {
        !self.required_annotations.is_empty() || !self.optional_annotations.is_empty()
    }
}

/// Parses the file: YAML, of which JSON is a part.
///
/// # Errors
/// Says what is wrong with it.
pub(super) fn parse(text: &str) -> Result<Vec<ProviderConfig>, String> {
    let file: FileFormat = serde_saphyr::from_str(text)
        .map_err(|err| format!("it is no CredentialProviderConfig: {err}"))?;
    if file.kind != "CredentialProviderConfig"
        || !FILE_VERSIONS.contains(&file.api_version.as_str())
    {
        return Err(format!(
            "it is a {:?} of {:?}, not a CredentialProviderConfig of {}",
            file.kind, file.api_version, FILE_VERSIONS[0]
        ));
    }
    if file.providers.is_empty() {
        return Err("it has no providers".to_owned());
    }
    file.providers.into_iter().map(provider).collect()
}

fn provider(it: ProviderFormat) -> Result<ProviderConfig, String> {
    let wrong = |reason: String| format!("provider {:?}: {reason}", it.name);
    if it.name.is_empty() || it.name.starts_with('.') || it.name.contains(['/', ' ', '\0']) {
        return Err(wrong("its name must be that of a program".to_owned()));
    }
    if !API_VERSIONS.contains(&it.api_version.as_str()) {
        return Err(wrong(format!(
            "apiVersion {:?} is not supported: {} is",
            it.api_version,
            API_VERSIONS.join(" or ")
        )));
    }
    if it.match_images.is_empty() {
        return Err(wrong("matchImages is empty".to_owned()));
    }
    let default_cache = parse_duration(&it.default_cache_duration)
        .ok_or_else(|| wrong("defaultCacheDuration must be such as 12h or 10m".to_owned()))?
        .min(MAX_CACHE);
    if let Some(odd) = it
        .env
        .iter()
        .find(|it| it.name.is_empty() || it.name.contains(['=', '\0']) || it.value.contains('\0'))
    {
        return Err(wrong(format!("env {:?} is no variable's name", odd.name)));
    }
    Ok(ProviderConfig {
        match_images: it.match_images.iter().map(|it| Key::parse(it)).collect(),
        default_cache,
        args: it.args,
        env: it.env.into_iter().map(|it| (it.name, it.value)).collect(),
        token: it.token_attributes.map(|it| TokenAttributes {
            audience: it.service_account_token_audience,
            cache: it.cache_type,
            is_required: it.require_service_account,
            required_annotations: it.required_service_account_annotation_keys,
            optional_annotations: it.optional_service_account_annotation_keys,
        }),
        name: it.name,
        api_version: it.api_version,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ECR: &str = r#"
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: ecr-credential-provider
  matchImages:
  - "*.dkr.ecr.*.amazonaws.com"
  - public.ecr.aws/team
  defaultCacheDuration: "12h"
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  args: [get-credentials]
  env:
  - name: AWS_PROFILE
    value: example
  tokenAttributes:
    serviceAccountTokenAudience: sts.example
    cacheType: ServiceAccount
    requireServiceAccount: true
    optionalServiceAccountAnnotationKeys: [example/role]
"#;

    #[test]
    fn a_file_of_kubelet_is_read() {
        let providers = parse(ECR).unwrap();
        let it = &providers[0];
        assert_eq!(it.name, "ecr-credential-provider");
        assert_eq!(it.default_cache, Duration::from_secs(12 * 3600));
        assert_eq!(it.args, ["get-credentials"]);
        assert_eq!(it.env, [("AWS_PROFILE".to_owned(), "example".to_owned())]);
        for (host, repository, expected) in [
            ("1.dkr.ecr.eu-west-1.amazonaws.com", "a", true),
            ("1.dkr.ecr.amazonaws.com", "a", false),
            ("1.dkr.ecr.eu-west-1.amazonaws.com:444", "a", false),
            ("public.ecr.aws", "team/a", true),
            ("public.ecr.aws", "a", false),
            ("docker.io", "library/a", false),
        ] {
            assert_eq!(
                it.matches(host, repository),
                expected,
                "{host}/{repository}"
            );
        }
        let token = it.token.as_ref().unwrap();
        assert_eq!(token.audience, "sts.example");
        assert_eq!(token.cache, CacheType::ServiceAccount);
        assert!(token.is_required && token.wants_annotations());
        let request = it.request("r.x/a", Some("t"), &[("k".to_owned(), "v".to_owned())]);
        let request: serde_json::Value = serde_json::from_slice(&request).unwrap();
        let expected = json!({
            "kind": "CredentialProviderRequest", "apiVersion": API_VERSIONS[0], "image": "r.x/a",
            "serviceAccountToken": "t", "serviceAccountAnnotations": {"k": "v"},
        });
        assert_eq!(request, expected);
        let request = String::from_utf8(it.request("r.x/a", None, &[])).unwrap();
        assert!(!request.contains("serviceAccount"), "{request}");
    }

    #[test]
    fn json_is_read_as_well() {
        let text = format!(
            r#"{{"apiVersion":"{}","kind":"CredentialProviderConfig","providers":[{{"name":"p","matchImages":["r.x"],"defaultCacheDuration":"0","apiVersion":"{}"}}]}}"#,
            FILE_VERSIONS[1], API_VERSIONS[1]
        );
        let it = &parse(&text).unwrap()[0];
        assert!(it.default_cache.is_zero() && it.token.is_none());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (from, to, expected) in [
            (
                "kind: CredentialProviderConfig",
                "kind: Pod",
                "it is a \"Pod\" of",
            ),
            (
                "kubelet.config.k8s.io/v1",
                "kubelet.config.k8s.io/v9",
                "not a CredentialProviderConfig of kubelet.config.k8s.io/v1",
            ),
            (
                "name: ecr-credential-provider",
                "name: ../../bin/sh",
                "its name must be that of a program",
            ),
            (
                "credentialprovider.kubelet.k8s.io/v1",
                "credentialprovider.kubelet.k8s.io/v1alpha1",
                "is not supported",
            ),
            (
                "\"12h\"",
                "\"soon\"",
                "defaultCacheDuration must be such as 12h",
            ),
            (
                "name: AWS_PROFILE",
                "name: \"A=B\"",
                "is no variable's name",
            ),
            (
                "cacheType: ServiceAccount",
                "cacheType: Sometimes",
                "no CredentialProviderConfig",
            ),
            ("providers:", "provider:", "it has no providers"),
        ] {
            let text = ECR.replace(from, to);
            assert_ne!(text, ECR, "{from}");
            let error = parse(&text).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
