//! Reads what kubelet says about the pod that a volume is for.
//!
//! With `podInfoOnMount` kubelet puts it into the volume context, over whatever the pod's author wrote
//! there; without, the author's word would stand. So the driver's CSIDriver object has to ask for it
//! where anything depends on it. Tokens are in the secrets (`serviceAccountTokenInSecrets`), or in the
//! volume context, of a cluster that cannot do better.

use std::collections::BTreeMap;

use crate::{
    mount::{MountError, PodInfo},
    secret::Secret,
};

const NAMESPACE: &str = "csi.storage.k8s.io/pod.namespace";
const NAME: &str = "csi.storage.k8s.io/pod.name";
const UID: &str = "csi.storage.k8s.io/pod.uid";
const SERVICE_ACCOUNT: &str = "csi.storage.k8s.io/serviceAccount.name";
const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// Longest name (Kubernetes, "Object Names and IDs": a DNS subdomain).
const MAX_NAME_BYTES: usize = 253;

/// Longest tokens: two or three of some KiB, and the message to the agent holds them.
const MAX_TOKENS_BYTES: usize = 64 << 10;

/// Returns the pod, if kubelet says which it is, with the tokens of its service account.
///
/// # Errors
/// [`MountError::Invalid`] if a name cannot be one: names become parts of URLs. Also if the tokens are
/// too long.
pub(super) fn pod(
    secrets: &BTreeMap<String, String>,
    context: &BTreeMap<String, String>,
) -> Result<Option<PodInfo>, MountError> {
    let (Some(namespace), Some(name), Some(uid), Some(service_account)) = (
        context.get(NAMESPACE),
        context.get(NAME),
        context.get(UID),
        context.get(SERVICE_ACCOUNT),
    ) else {
        return Ok(None);
    };
    for (field, value) in [
        (NAMESPACE, namespace),
        (NAME, name),
        (UID, uid),
        (SERVICE_ACCOUNT, service_account),
    ] {
        let is_name = !value.is_empty()
            && value.len() <= MAX_NAME_BYTES
            && value.starts_with(|it: char| it.is_ascii_alphanumeric())
            && value
                .bytes()
                .all(|it| it.is_ascii_lowercase() || it.is_ascii_digit() || b"-.".contains(&it));
        if !is_name {
            return Err(invalid(
                field,
                "is not a name in Kubernetes: it is kubelet's to set, leave it out",
            ));
        }
    }
    Ok(Some(PodInfo {
        namespace: namespace.clone(),
        name: name.clone(),
        uid: uid.clone(),
        service_account: service_account.clone(),
        tokens: tokens(secrets, context)?,
    }))
}

/// Returns the tokens as they came, empty if there are none.
fn tokens(
    secrets: &BTreeMap<String, String>,
    context: &BTreeMap<String, String>,
) -> Result<Secret<String>, MountError> {
    let tokens = secrets.get(TOKENS).or_else(|| context.get(TOKENS));
    let tokens = tokens.map_or("", String::as_str);
    if MAX_TOKENS_BYTES < tokens.len() {
        let reason = format!("has {} bytes, {MAX_TOKENS_BYTES} are allowed", tokens.len());
        return Err(invalid(TOKENS, reason));
    }
    Ok(Secret::new(tokens.to_owned()))
}

fn invalid(field: &'static str, reason: impl Into<String>) -> MountError {
    MountError::Invalid {
        field: field.into(),
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        let pairs = pairs.iter();
        pairs
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    fn whole(account: &str) -> BTreeMap<String, String> {
        map(&[
            (NAMESPACE, "team-a"),
            (NAME, "web-0"),
            (UID, "6a1c2b1e-0000-4000-8000-000000000000"),
            (SERVICE_ACCOUNT, account),
            (TOKENS, "from the context"),
        ])
    }

    #[test]
    fn the_pod_is_known_if_kubelet_says_all_of_it() {
        let found = pod(&map(&[]), &whole("default")).unwrap().unwrap();
        assert_eq!(
            (found.namespace.as_str(), found.service_account.as_str()),
            ("team-a", "default")
        );
        assert_eq!(found.tokens.expose(), "from the context");
        assert_eq!(pod(&map(&[]), &map(&[])).unwrap(), None);
        assert_eq!(
            pod(&map(&[]), &map(&[(NAMESPACE, "team-a")])).unwrap(),
            None
        );
    }

    #[test]
    fn what_is_no_name_never_becomes_part_of_a_url() {
        let long = "a".repeat(254);
        for account in [
            "",
            "..",
            "../secrets/x",
            "a/b",
            "A",
            "a?b",
            "a\n",
            "a%2f",
            &long,
        ] {
            let error = pod(&map(&[]), &whole(account)).unwrap_err().to_string();
            assert!(
                error.contains("serviceAccount.name: is not a name"),
                "{error}"
            );
        }
    }

    #[test]
    fn tokens_in_secrets_win_and_are_bounded() {
        let context = whole("default");
        let secrets = map(&[(TOKENS, "from the secrets")]);
        let found = |secrets| tokens(secrets, &context).unwrap().expose().clone();
        assert_eq!(found(&secrets), "from the secrets");
        assert_eq!(found(&map(&[])), "from the context");
        let long = map(&[(TOKENS, &"x".repeat(MAX_TOKENS_BYTES + 1))]);
        let error = tokens(&long, &context).unwrap_err().to_string();
        assert!(error.contains("65537 bytes, 65536 are allowed"), "{error}");
        assert_eq!(tokens(&map(&[]), &map(&[])).unwrap().expose(), "");
    }
}
