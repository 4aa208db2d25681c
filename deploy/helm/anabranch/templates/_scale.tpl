{{/*
How many pods a worker's StatefulSet has: (root, role). Where an autoscaler changes that, an upgrade leaves it as it is.
*/}}
{{- define "anabranch.replicas" -}}
{{- $values := index .root.Values .role -}}
{{- $live := dict -}}
{{- if and .root.Values.autoscaler.enabled (not .root.Values.autoscaler.dryRun) -}}
{{- $live = lookup "apps/v1" "StatefulSet" .root.Release.Namespace (printf "%s-%s" (include "anabranch.fullname" .root) .role) -}}
{{- end -}}
{{- dig "spec" "replicas" $values.replicas $live -}}
{{- end -}}
