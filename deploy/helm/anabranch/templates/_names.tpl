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

{{/* host:port at which the controller is reached. */}}
{{- define "anabranch.controllerAddress" -}}
{{ include "anabranch.fullname" . }}-controller:8600
{{- end -}}

{{/* Where the registry is; empty if there is none. */}}
{{- define "anabranch.registryUrl" -}}
{{- if and .Values.registry.url .Values.registry.builtIn -}}
{{- fail "registry.url and registry.builtIn: there is one registry; give one of the two" -}}
{{- else if .Values.registry.builtIn -}}
redis://{{ include "anabranch.fullname" . }}-redis:6379/0
{{- else if .Values.registry.url -}}
{{ .Values.registry.url }}
{{- end -}}
{{- end -}}
