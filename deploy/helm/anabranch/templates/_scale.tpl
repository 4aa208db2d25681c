{{/*
How many pods a role's workload has: (root, role). Where an autoscaler changes that, an upgrade leaves it as it is.
*/}}
{{- define "anabranch.replicas" -}}
{{- $root := .root -}}
{{- $role := .role -}}
{{- $replicas := (index $root.Values $role).replicas -}}
{{- $name := include "anabranch.fullname" $root -}}
{{- if and $root.Values.autoscaler.enabled (not $root.Values.autoscaler.dryRun) -}}
{{- if eq $root.Values.mode "kuberay" -}}
{{- range dig "spec" "workerGroupSpecs" (list) (lookup "ray.io/v1" "RayCluster" $root.Release.Namespace $name) -}}
{{- if eq .groupName $role -}}{{- $replicas = .replicas -}}{{- end -}}
{{- end -}}
{{- else -}}
{{- $replicas = dig "spec" "replicas" $replicas (lookup "apps/v1" "StatefulSet" $root.Release.Namespace (printf "%s-%s" $name $role)) -}}
{{- end -}}
{{- end -}}
{{- $replicas -}}
{{- end -}}
