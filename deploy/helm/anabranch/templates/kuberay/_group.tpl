{{/* Environment of Ray's nodes, beside what the operator adds: how soon one that is silent is given up. */}}
{{- define "anabranch.rayEnvironment" -}}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_health_check_initial_delay_ms, value: "1000"}
- {name: RAY_health_check_period_ms, value: "500"}
- {name: RAY_health_check_timeout_ms, value: "1000"}
- {name: RAY_health_check_failure_threshold, value: "3"}
{{- end -}}

{{/* Volumes of a pod that is a Ray node: Ray keeps its sockets in /tmp/ray, and objects in memory. */}}
{{- define "anabranch.rayVolumes" -}}
{{ include "anabranch.volumes" . }}
- name: shared-memory
  emptyDir: {medium: Memory, sizeLimit: 128Mi}
{{- end -}}

{{/* Memory of a role's container that is a Ray node: its own, and Ray's. */}}
{{- define "anabranch.rayResources" -}}
{{- $resources := include "anabranch.resources" . | fromYaml -}}
{{- $margin := include "anabranch.bytes" .root.Values.kuberay.memoryMargin | int64 -}}
{{- range $kind := list "requests" "limits" -}}
{{- $given := index $resources $kind -}}
{{- if hasKey $given "memory" -}}
{{- $bytes := add (include "anabranch.quantityBytes" $given.memory | int64) $margin -}}
{{- $_ := set $given "memory" (printf "%dMi" (div (add $bytes 1048575) 1048576)) -}}
{{- end -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* A worker group, each of whose pods is a Ray node with room for one process of the role: (root, role, readsModel, ports). */}}
{{- define "anabranch.rayGroup" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- $own := index $values .role -}}
{{- $resources := include "anabranch.rayResources" . | fromYaml -}}
{{- $scaled := and $values.autoscaler.enabled (ne .role "gateway") -}}
{{- $replicas := include "anabranch.replicas" (dict "root" $root "role" .role) -}}
groupName: {{ .role }}
replicas: {{ $replicas }}
minReplicas: {{ $scaled | ternary (dig .role "least" 0 $values.autoscaler) $replicas }}
maxReplicas: {{ $scaled | ternary (dig .role "most" 0 $values.autoscaler) $replicas }}
rayStartParams:
  num-cpus: {{ dig .role "threads" 1 $values.config | quote }}
  # Where Ray would take a part of the container's memory, the role gets all of it.
  memory: {{ include "anabranch.quantityBytes" $resources.limits.memory | quote }}
  object-store-memory: "78643200"
  resources: {{ printf "{\"anabranch_%s\": 1}" .role | quote | quote }}
template:
  metadata:
    labels: {{- include "anabranch.selector" (dict "root" $root "component" .role) | nindent 6 }}
    annotations:
      checksum/config: {{ include "anabranch.checksum" $root }}
  spec:
    serviceAccountName: {{ include "anabranch.fullname" $root }}
    automountServiceAccountToken: false
    enableServiceLinks: false
    terminationGracePeriodSeconds: {{ add (include "anabranch.drainSeconds" $root | int64) 10 }}
    securityContext: {{- include "anabranch.podSecurity" $root | nindent 6 }}
    {{- with $values.image.pullSecrets }}
    imagePullSecrets:
    {{- range . }}
      - name: {{ . }}
    {{- end }}
    {{- end }}
    {{- with include "anabranch.scheduling" . | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- with include "anabranch.modelFetch" . }}
    initContainers: {{- . | nindent 6 }}
    {{- end }}
    containers:
      - name: {{ .role }}
        image: {{ $own.image | default (include "anabranch.image" $root) }}
        imagePullPolicy: {{ $values.image.pullPolicy }}
        env:
          {{- include "anabranch.environment" . | nindent 10 }}
          {{- include "anabranch.rayEnvironment" $root | nindent 10 }}
        ports:
          {{- range $name, $port := .ports }}
          - {name: {{ $name }}, containerPort: {{ $port }}}
          {{- end }}
        resources: {{- toYaml $resources | nindent 10 }}
        {{- if eq .role "gateway" }}
        readinessProbe:
          {{ include "anabranch.probe" (dict "root" $root "port" .ports.grpc "service" "anabranch.v1.InferenceService") }}
          periodSeconds: 5
          timeoutSeconds: 5
        {{- end }}
        securityContext: {{- include "anabranch.containerSecurity" $root | nindent 10 }}
        volumeMounts:
          {{- include "anabranch.mounts" . | nindent 10 }}
          - {name: shared-memory, mountPath: /dev/shm}
    volumes: {{- include "anabranch.rayVolumes" . | nindent 6 }}
{{- end -}}
