{{/*
The configuration files from the values: that of the agent, and one for the node service and the server, which need
nothing of what is said about registries and the remote. A value that is null is left out, so that the driver's own default holds and is written in
one place only (docs/CONFIGURATION.md).
*/}}

{{/* Lines "snake_case = 1" for those of .keys that are set in .values. int64: Helm reads numbers as floating point. */}}
{{- define "clip-csi.tomlIntegers" -}}
{{- $values := .values }}
{{- range .keys }}
{{- $value := index $values . }}
{{- if not (kindIs "invalid" $value) }}
{{ snakecase . }} = {{ int64 $value }}
{{- end }}
{{- end }}
{{- end }}

{{/* What is in both. */}}
{{- define "clip-csi.settings" -}}
[fuse]
{{- include "clip-csi.tomlIntegers" (dict "values" .Values.fuse "keys" (list "threadsPerMount" "readThreads" "readAheadKib")) }}

[node]
{{- include "clip-csi.tomlIntegers" (dict "values" .Values.node "keys" (list "publishWaitSeconds" "drainSeconds" "serverDeadlineSeconds" "idleSourceSeconds" "maxWritableBytes" "maxVolumes" "publishesPerSecond")) }}
{{- with .Values.node.kernelMounts }}
kernel_mounts = {{ . | toJson }}
{{- end }}
{{- end }}

{{- define "clip-csi.mountsConfig" -}}
[cache]
dir = {{ .Values.cache.hostPath | toJson }}

{{ include "clip-csi.settings" . }}
{{- end }}

{{/* The remote content cache. */}}
{{- define "clip-csi.remoteConfig" -}}
[remote]
kind = {{ .Values.remote.kind | toJson }}
{{- if eq .Values.remote.kind "redis" }}
url = {{ required "remote.url is not set: remote.kind redis needs redis://HOST:PORT/DB" .Values.remote.url | toJson }}
{{- else if eq .Values.remote.kind "dir" }}
path = {{ required "remote.path is not set: remote.kind dir needs a directory that all nodes share" .Values.remote.path | toJson }}
{{- end }}
{{- /* Also without a remote: indexes beside images are authenticated by it. */}}
{{- with .Values.remote.existingSecret }}
{{- if and .name .hmacKey }}
hmac_key_file = {{ printf "/etc/clip-csi/secrets/remote/%s" .hmacKey | toJson }}
{{- end }}
{{- end }}
{{- if ne .Values.remote.kind "none" }}
{{- with .Values.remote.existingSecret }}
{{- if and .name .passwordKey }}
password_file = {{ printf "/etc/clip-csi/secrets/remote/%s" .passwordKey | toJson }}
{{- end }}
{{- end }}
{{- include "clip-csi.tomlIntegers" (dict "values" .Values.remote "keys" (list "chunkTtlSeconds" "connectTimeoutMs" "requestTimeoutMs" "maxIndexBytes" "uploadQueueLayers" "uploadAttempts" "leaseWaitSeconds")) }}
{{- end }}
{{- if eq .Values.remote.kind "s3" }}

[remote.s3]
bucket = {{ required "remote.s3.bucket is not set: remote.kind s3 needs a bucket" .Values.remote.s3.bucket | toJson }}
{{- range $key := list "endpoint" "region" "prefix" }}
{{- with index $.Values.remote.s3 $key }}
{{ $key }} = {{ . | toJson }}
{{- end }}
{{- end }}
{{- if .Values.remote.s3.allowHttp }}
allow_http = true
{{- end }}
{{- with .Values.remote.existingSecret }}
{{- if and .name .accessKeyIdKey }}
access_key_file = {{ printf "/etc/clip-csi/secrets/remote/%s" .accessKeyIdKey | toJson }}
secret_key_file = {{ printf "/etc/clip-csi/secrets/remote/%s" (required "remote.existingSecret.secretAccessKeyKey is not set: accessKeyIdKey needs it" .secretAccessKeyKey) | toJson }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Registries: of a node if .onNode, or else of a pod that has no files of one. */}}
{{- define "clip-csi.registryConfig" -}}
[registry]
{{- if .Values.registries.existingSecret }}
docker_config_file = "/etc/clip-csi/secrets/registry/.dockerconfigjson"
{{- end }}
{{- if .onNode }}
{{- with .Values.registries.hostsDir }}
hosts_dir = {{ . | toJson }}
{{- end }}
{{- if .Values.registries.allowSkipVerify }}
allow_skip_verify = true
{{- end }}
{{- with .Values.registries.credentialProviders }}
{{- if or .configFile .binDir }}
credential_provider_config = {{ required "registries.credentialProviders.configFile is not set: binDir needs it" .configFile | toJson }}
credential_provider_bin_dir = {{ required "registries.credentialProviders.binDir is not set: configFile needs it" .binDir | toJson }}
{{- end }}
{{- end }}
{{- if .Values.registries.serviceAccountPullSecrets.enabled }}
service_account_pull_secrets = true
{{- end }}
{{- end }}
{{- if not .Values.registries.usePushedIndexes }}
use_pushed_indexes = false
{{- end }}
{{- if .Values.registries.trustPinnedIndexes }}
trust_pinned_indexes = true
{{- end }}
{{- if .Values.registries.trustPullPolicyNever }}
trust_pull_policy_never = true
{{- end }}
{{- with .Values.registries.insecureHosts }}
insecure_hosts = {{ toJson . }}
{{- end }}
{{- include "clip-csi.tomlIntegers" (dict "values" .Values.registries "keys" (list "connectTimeoutSeconds" "readTimeoutSeconds" "retries" "maxBackoffSeconds" "maxWaitSeconds" "maxManifestBytes" "maxLayers")) }}
{{- range $host, $settings := .Values.registries.hosts }}

[registry.hosts.{{ $host | toJson }}]
{{- if $settings.plainHttp }}
plain_http = true
{{- end }}
{{- with $settings.caBundle }}
ca_file = {{ printf "/etc/clip-csi/ca/%s/%s" .configMap (default "ca.crt" .key) | toJson }}
{{- end }}
{{- with $settings.mirrors }}
mirrors = {{ toJson . }}
{{- end }}
{{- if $settings.alwaysAskOrigin }}
always_ask_origin = true
{{- end }}
{{- end }}
{{- end }}

{{- define "clip-csi.agentConfig" -}}
[cache]
dir = {{ .Values.cache.hostPath | toJson }}
{{- include "clip-csi.tomlIntegers" (dict "values" .Values.cache "keys" (list "maxBytes" "highWatermarkPercent" "lowWatermarkPercent" "minFreeBytes" "minFreeInodes" "maxLayerBytes" "maxLayerEntries" "maxLayerIndexBytes" "maxIndexNodes" "maxDecompressions" "stallTimeoutSeconds")) }}
{{- with .Values.cache.prefetch }}
prefetch = {{ . | toJson }}
{{- end }}

{{ include "clip-csi.remoteConfig" . }}

{{ include "clip-csi.registryConfig" (dict "Values" .Values "onNode" true) }}

{{ include "clip-csi.settings" . }}
{{- if .Values.prewarm.enabled }}

[prewarm]
{{- include "clip-csi.tomlIntegers" (dict "values" .Values.prewarm.node "keys" (list "parallelImages" "bytesPerSecond" "evictUnusedForSeconds")) }}
{{- end }}
{{- end }}

{{/* Of the controller that has images warmed: its cache holds what it is about to upload. */}}
{{- define "clip-csi.prewarmConfig" -}}
[cache]
dir = "/cache"
{{- include "clip-csi.tomlIntegers" (dict "values" .Values.cache "keys" (list "maxLayerBytes" "maxLayerEntries" "maxLayerIndexBytes" "maxIndexNodes" "maxDecompressions" "stallTimeoutSeconds")) }}

{{ include "clip-csi.remoteConfig" . }}

{{ include "clip-csi.registryConfig" (dict "Values" .Values "onNode" false) }}

[node]
{{- /* What it does after uploads have ended, or were given up, takes less than five seconds. */}}
drain_seconds = {{ max 1 (sub (int64 .Values.prewarm.terminationGracePeriodSeconds) 5) }}

[prewarm]
{{- include "clip-csi.tomlIntegers" (dict "values" .Values.prewarm "keys" (list "parallelImages" "bytesPerSecond")) }}
{{- end }}
