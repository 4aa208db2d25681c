{{/* Bytes of a size such as 4GiB or 100MB. */}}
{{- define "anabranch.bytes" -}}
{{- $units := dict "KiB" 1024 "MiB" 1048576 "GiB" 1073741824 "TiB" 1099511627776 -}}
{{- $units = merge $units (dict "kB" 1000 "MB" 1000000 "GB" 1000000000 "TB" 1000000000000) -}}
{{- mul (regexFind "^[0-9]+" . | int64) (get $units (regexFind "[A-Za-z]+$" .)) -}}
{{- end -}}

{{/* Bytes of one of Kubernetes' quantities, such as 4Gi. */}}
{{- define "anabranch.quantityBytes" -}}
{{- $units := dict "" 1.0 "m" 0.001 "k" 1000.0 "M" 1000000.0 "G" 1000000000.0 "T" 1000000000000.0 -}}
{{- $units = merge $units (dict "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0) -}}
{{- mulf (regexFind "^[0-9.]+" . | float64) (get $units (regexFind "[A-Za-z]*$" .)) | int64 -}}
{{- end -}}

{{/* Memory of an attention worker's container in MiB: its arena, unless that lies on a GPU, and the margin. */}}
{{- define "anabranch.attentionMebibytes" -}}
{{- $attention := .Values.attention -}}
{{- $bytes := include "anabranch.bytes" $attention.memoryMargin | int64 -}}
{{- if eq $attention.device "cpu" -}}
{{- $bytes = add $bytes (include "anabranch.bytes" $attention.arena | int64) -}}
{{- end -}}
{{- div (add $bytes 1048575) 1048576 -}}
{{- end -}}

{{/* Seconds a pod gets to finish or hand over: all of its arena at the bandwidth, and half a minute. */}}
{{- define "anabranch.drainSeconds" -}}
{{- if .Values.drain.seconds -}}
{{- .Values.drain.seconds | int64 -}}
{{- else -}}
{{- $bandwidth := include "anabranch.bytes" .Values.drain.bandwidth | int64 -}}
{{- $arena := include "anabranch.bytes" .Values.attention.arena | int64 -}}
{{- add 30 (div (add $arena (sub $bandwidth 1)) $bandwidth) -}}
{{- end -}}
{{- end -}}

{{/* Resources of a role's container: (root, role). Fails where an attention worker's memory cannot hold its arena. */}}
{{- define "anabranch.resources" -}}
{{- $values := index .root.Values .role -}}
{{- $requests := deepCopy $values.resources.requests -}}
{{- $limits := deepCopy $values.resources.limits -}}
{{- if eq .role "attention" -}}
{{- $needed := include "anabranch.attentionMebibytes" .root | int64 -}}
{{- range $kind, $given := dict "requests" $requests "limits" $limits -}}
{{- if not (hasKey $given "memory") -}}
{{- $_ := set $given "memory" (printf "%dMi" $needed) -}}
{{- else if lt (include "anabranch.quantityBytes" $given.memory | int64) (mul $needed 1048576) -}}
{{- fail (printf "attention.resources.%s.memory: %s does not hold attention.arena %s and attention.memoryMargin %s, together %dMi: raise it, leave it out, or lower the arena" $kind $given.memory $values.arena $values.memoryMargin $needed) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (eq $values.device "cuda") (not (hasKey $limits "nvidia.com/gpu")) -}}
{{- $_ := set $limits "nvidia.com/gpu" "1" -}}
{{- end -}}
{{- toYaml (dict "requests" $requests "limits" $limits) -}}
{{- end -}}
