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

{{- define "clip-csi.node.serviceAccountName" -}}
{{- if .Values.node.serviceAccount.create }}
{{- default (printf "%s-node" (include "clip-csi.fullname" .)) .Values.node.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.node.serviceAccount.name }}
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
