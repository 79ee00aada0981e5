{{/* Names, labels and paths that the templates share. */}}

{{- define "clip-csi.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "clip-csi.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains (include "clip-csi.name" .) .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "clip-csi.name" .) | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "clip-csi.namespace" -}}
{{- default .Release.Namespace .Values.namespaceOverride }}
{{- end }}

{{/* What selects the pods of this release; a component is added where it is used. Immutable in a DaemonSet. */}}
{{- define "clip-csi.selectorLabels" -}}
app.kubernetes.io/name: {{ include "clip-csi.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "clip-csi.labels" -}}
{{ include "clip-csi.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* A whole image reference from {registry, repository, tag, digest}; a digest wins over a tag. */}}
{{- define "clip-csi.image" -}}
{{- $name := .image.repository }}
{{- if .image.registry }}{{ $name = printf "%s/%s" .image.registry .image.repository }}{{ end }}
{{- if .image.digest }}{{ printf "%s@%s" $name .image.digest }}{{ else }}{{ printf "%s:%s" $name (default .defaultTag .image.tag) }}{{ end }}
{{- end }}

{{- define "clip-csi.driverImage" -}}
{{- if not .Values.image.registry }}
{{- fail "image.registry is not set: no image of clip-csi is published, so build one (docs/OPERATIONS.md, Install), push it to a registry of yours, and give --set image.registry=HOST[:PORT]" }}
{{- end }}
{{- include "clip-csi.image" (dict "image" .Values.image "defaultTag" .Chart.AppVersion) }}
{{- end }}

{{/* Paths on the node. Containers see them at the same place, so that a path means the same to kubelet and to the driver. */}}
{{- define "clip-csi.pluginDir" -}}
{{ .Values.node.kubeletPath }}/plugins/{{ .Values.csiDriver.name }}
{{- end }}

{{- define "clip-csi.socket" -}}
{{ include "clip-csi.pluginDir" . }}/csi.sock
{{- end }}

{{/* Where the roles of a node meet. One per driver, so that a second one on the node is no trouble. */}}
{{- define "clip-csi.runDir" -}}
{{ .Values.node.runPath }}/{{ .Values.csiDriver.name }}
{{- end }}

{{/* The user of the agent and of the server, as the image has it: their directories are made for it. */}}
{{- define "clip-csi.uid" -}}
65532
{{- end }}

{{/* What the pods of both DaemonSets have in common. */}}
{{- define "clip-csi.podSettings" -}}
# Whoever needs a token of the Kubernetes API gets one of its own.
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if .Values.node.priorityClass.create }}
priorityClassName: {{ include "clip-csi.fullname" . }}-node
{{- else if .Values.node.priorityClassName }}
priorityClassName: {{ .Values.node.priorityClassName }}
{{- end }}
nodeSelector:
  kubernetes.io/os: linux
  {{- with .Values.node.nodeSelector }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .Values.node.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.node.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Whether the agent asks the Kubernetes API for anything: "true" or "false". */}}
{{- define "clip-csi.usesApi" -}}
{{ or .Values.node.startupTaint.enabled .Values.agent.events.enabled .Values.registries.serviceAccountPullSecrets.enabled .Values.prewarm.enabled }}
{{- end }}

{{/* Arguments that all roles take. */}}
{{- define "clip-csi.commonArgs" -}}
- --run-dir={{ include "clip-csi.runDir" . }}
- --log-format={{ .Values.log.format }}
- --log-level={{ .Values.log.level }}
{{- end }}

{{- define "clip-csi.node.serviceAccountName" -}}
{{- if .Values.node.serviceAccount.create }}
{{- default (printf "%s-node" (include "clip-csi.fullname" .)) .Values.node.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.node.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "clip-csi.controller.serviceAccountName" -}}
{{- if .Values.controller.serviceAccount.create }}
{{- default (printf "%s-controller" (include "clip-csi.fullname" .)) .Values.controller.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.controller.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "clip-csi.prewarm.serviceAccountName" -}}
{{- if .Values.prewarm.serviceAccount.create }}
{{- default (printf "%s-prewarm" (include "clip-csi.fullname" .)) .Values.prewarm.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.prewarm.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* JSON array of the ConfigMaps with certificate authorities that registries name, each once. */}}
{{- define "clip-csi.caConfigMaps" -}}
{{- $names := list }}
{{- range .Values.registries.hosts }}
{{- with .caBundle }}{{ $names = append $names .configMap }}{{ end }}
{{- end }}
{{- $names | uniq | sortAlpha | toJson }}
{{- end }}
