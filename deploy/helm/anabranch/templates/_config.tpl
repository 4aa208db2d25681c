{{/* The folder of the model, in every pod that reads it. */}}
{{- define "anabranch.modelFolder" -}}
{{- $model := .Values.model -}}
{{- if and $model.source (ne $model.delivery "fetch") -}}{{- fail "model.source: only model.delivery: fetch fetches it" -}}{{- end -}}
{{- if eq $model.delivery "fetch" -}}
{{- if $model.path -}}{{- fail "model.path: a fetched model has its own folder; leave it out, or choose another model.delivery" -}}{{- end -}}
/models/models/{{ $model.name }}
{{- else if eq $model.delivery "claim" -}}
{{- if not $model.claim -}}{{- fail "model.claim: name the PersistentVolumeClaim that holds the model" -}}{{- end -}}
/models/{{ $model.path | default "" | trimPrefix "/" }}
{{- else -}}
{{- if not (hasPrefix "/" ($model.path | default "")) -}}{{- fail "model.path: name the model's folder in the image, from / on" -}}{{- end -}}
{{ $model.path }}
{{- end -}}
{{- end -}}

{{/* The configuration file: what the chart sets, and values' config. */}}
{{- define "anabranch.config" -}}
{{- $values := .Values -}}
{{- if and (eq (int $values.attention.replicas) 0) (not (dig "dense" "local_arena" 0 $values.config)) -}}
{{- fail "attention.replicas: 0 keeps the cache in the dense workers: give it room, for example config.dense.local_arena: 1GiB" -}}
{{- end -}}
{{- $set := dict
  "model" (dict "path" (include "anabranch.modelFolder" .) "name" $values.model.name "dtype" $values.model.dtype)
  "gateway" (dict "replicas" $values.gateway.replicas "host" "0.0.0.0" "port" 8650 "http_port" 8651)
  "dense" (dict "replicas" $values.dense.replicas "device" $values.dense.device "host" "0.0.0.0" "port" 8610)
  "attention" (dict "replicas" $values.attention.replicas "device" $values.attention.device "host" "0.0.0.0" "port" 8620 "arena" $values.attention.arena)
  "controller" (dict "host" "0.0.0.0" "port" 8600 "drain_grace_s" (include "anabranch.drainSeconds" . | int64))
  "placement" (dict "own_addresses" true)
  "security" (include "anabranch.security" . | fromYaml)
  "telemetry" (dict "metrics_port" 9400)
-}}
{{- if eq $values.mode "kuberay" -}}
{{- $_ := set $set "ray" (dict "address" "127.0.0.1:6379") -}}
{{- $_ := set $set.placement "exclusive" true -}}
{{- if $values.autoscaler.enabled -}}
{{- /* The file has the most; how many there are is the number of nodes in the groups. */}}
{{- $_ := set $set.placement "elastic" true -}}
{{- $_ := set $set.dense "replicas" $values.autoscaler.dense.most -}}
{{- if $values.attention.replicas -}}{{- $_ := set $set.attention "replicas" $values.autoscaler.attention.most -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- /* A lane over TCP is plain text. */}}
{{- if and $values.networkPolicy.enabled (not $values.tls.existingSecret) -}}
{{- $_ := set $set "lanes" (dict "transports" (list "tcp" "grpc") "fenced_network" true) -}}
{{- else -}}
{{- $_ := set $set "lanes" (dict "transports" (list "grpc")) -}}
{{- end -}}
{{- with include "anabranch.registryUrl" . -}}
{{- $cluster := printf "%s.%s" $.Release.Namespace (include "anabranch.fullname" $) | trunc 64 -}}
{{- $_ := set $set "registry" (dict "url" . "cluster" $cluster) -}}
{{- end -}}
{{- if $values.monitoring.prices -}}
{{- $_ := set $set.telemetry "cost" (dict "prices" "/etc/anabranch/config/prices.toml") -}}
{{- end -}}
{{- toYaml (mustMerge (deepCopy $values.config) $set) -}}
{{- end -}}

{{/* The part of it that says who may connect. */}}
{{- define "anabranch.security" -}}
{{- $tls := .Values.tls -}}
{{- if $tls.existingSecret -}}
tls:
  certificate: /etc/anabranch/tls/tls.crt
  key: /etc/anabranch/tls/tls.key
  authority: /etc/anabranch/tls/ca.crt
  mutual: {{ $tls.mutual }}
  member_name: {{ include "anabranch.memberName" . }}
{{- else if $tls.mutual -}}
{{- fail "tls.mutual: needs certificates; name the Secret that holds them in tls.existingSecret" -}}
{{- else -}}
insecure: true
{{- end }}
{{- if .Values.apiKeys.existingSecret }}
api_keys_file: /etc/anabranch/keys/keys.yaml
{{- end }}
{{- end -}}

{{/*
Changes with what a running process would have to read again. Not with the number of pods: scaling restarts
nobody. (The number of dense workers says whose attention workers are whose, unless all share them.)
*/}}
{{- define "anabranch.checksum" -}}
{{- $config := include "anabranch.config" . | fromYaml -}}
{{- $_ := unset $config.gateway "replicas" -}}
{{- $_ := set $config.attention "replicas" (gt (int $config.attention.replicas) 0) -}}
{{- if eq (dig "placement" "instances" "shared" $config) "shared" -}}
{{- $_ := unset $config.dense "replicas" -}}
{{- end -}}
{{- toYaml $config | sha256sum -}}
{{- end -}}
