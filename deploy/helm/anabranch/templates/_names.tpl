{{/* What all objects' names begin with. */}}
{{- define "anabranch.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Labels that select the pods of the release. */}}
{{- define "anabranch.releaseSelector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Labels that select the pods of a component: (root, component). */}}
{{- define "anabranch.selector" -}}
{{ include "anabranch.releaseSelector" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Labels of every object: (root, component). */}}
{{- define "anabranch.labels" -}}
{{ include "anabranch.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* The image of processes that name no other. */}}
{{- define "anabranch.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default .Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{/* The host of a Service: (root, name). */}}
{{- define "anabranch.serviceHost" -}}
{{ include "anabranch.fullname" .root }}-{{ .name }}.{{ .root.Release.Namespace }}.svc
{{- end -}}

{{/* What Services call gRPC, for meshes and load balancers. */}}
{{- define "anabranch.grpcProtocol" -}}
{{- if .Values.tls.existingSecret }}https{{ else }}kubernetes.io/h2c{{ end }}
{{- end -}}

{{/* host:port at which the controller is reached. */}}
{{- define "anabranch.controllerAddress" -}}
{{ include "anabranch.serviceHost" (dict "root" . "name" "controller") }}:8600
{{- end -}}

{{/* What the certificate calls every pod: they reach each other by addresses, which it cannot know. */}}
{{- define "anabranch.memberName" -}}
{{ include "anabranch.fullname" . }}.{{ .Release.Namespace }}.svc
{{- end -}}

{{/* Where the registry is; empty if there is none. */}}
{{- define "anabranch.registryUrl" -}}
{{- if and .Values.registry.url .Values.registry.builtIn -}}
{{- fail "registry.url and registry.builtIn: there is one registry; give one of the two" -}}
{{- else if and .Values.tls.existingSecret (or .Values.registry.builtIn (hasPrefix "redis://" (.Values.registry.url | default ""))) -}}
{{- fail "tls: a Redis in plain text stays out; give a registry.url that begins with rediss://, not registry.builtIn" -}}
{{- else if .Values.registry.builtIn -}}
redis://{{ include "anabranch.fullname" . }}-redis:6379/0
{{- else if .Values.registry.url -}}
{{ .Values.registry.url }}
{{- end -}}
{{- end -}}
