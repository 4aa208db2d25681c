{{/* What no container of ours may do. */}}
{{- define "anabranch.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "anabranch.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Where a role's pods may run: its values, (root, role). */}}
{{- define "anabranch.scheduling" -}}
{{- $values := index .root.Values .role -}}
{{- with $values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.topologySpread }}
{{- $labels := include "anabranch.selector" (dict "root" $.root "component" $.role) | fromYaml }}
topologySpreadConstraints:
{{- range . }}
  - {{- toYaml (merge (deepCopy .) (dict "labelSelector" (dict "matchLabels" $labels))) | nindent 4 }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Environment of a role's container, (root, role). */}}
{{- define "anabranch.environment" -}}
{{- $threads := dig .role "threads" 1 .root.Values.config -}}
- {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
{{- if has .role (list "dense" "attention") }}
- {name: POD_INDEX, valueFrom: {fieldRef: {fieldPath: "metadata.labels['apps.kubernetes.io/pod-index']"}}}
{{- end }}
- {name: HOME, value: /tmp}
- {name: OMP_NUM_THREADS, value: {{ $threads | quote }}}
- {name: OMP_WAIT_POLICY, value: PASSIVE}
- {name: PYTHONUNBUFFERED, value: "1"}
- {name: TOKENIZERS_PARALLELISM, value: "false"}
{{- with .root.Values.registry.passwordSecret }}
{{- if .name }}
- name: ANABRANCH_REGISTRY_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key }}}}
{{- end }}
{{- end }}
{{- with (index .root.Values .role).extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/*
How the kubelet asks whether a service is served, or the process lives: (root, port, service). It speaks gRPC in plain
text only: with certificates the metrics' port tells what the process answers to a peer.
*/}}
{{- define "anabranch.probe" -}}
{{- if .root.Values.tls.existingSecret -}}
httpGet: {port: metrics, path: /health{{ with .service }}/{{ . }}{{ end }}}
{{- else -}}
grpc: {port: {{ .port }}{{ with .service }}, service: {{ . }}{{ end }}}
{{- end -}}
{{- end -}}

{{/* The kubelet's three questions: (root, port, service). Draining is not ready, but alive. */}}
{{- define "anabranch.probes" -}}
{{- $alive := include "anabranch.probe" (dict "root" .root "port" .port "service" "") -}}
startupProbe:
  {{ $alive }}
  periodSeconds: 5
  failureThreshold: {{ div (add .root.Values.probes.startupSeconds 4) 5 }}
  timeoutSeconds: 5
readinessProbe:
  {{ include "anabranch.probe" . }}
  periodSeconds: 5
  timeoutSeconds: 5
livenessProbe:
  {{ $alive }}
  periodSeconds: 10
  failureThreshold: 6
  timeoutSeconds: 5
{{- end -}}

{{/* The init containers that bring the model: (root, readsModel). */}}
{{- define "anabranch.modelFetch" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- if and .readsModel (eq $values.model.delivery "fetch") -}}
- name: model
  image: {{ include "anabranch.image" $root }}
  imagePullPolicy: {{ $values.image.pullPolicy }}
  command: [anabranch, model, fetch, {{ with $values.model.source }}{{ . | quote }}, --name, {{ end }}{{ $values.model.name | quote }}]
  env:
    - {name: HOME, value: /tmp}
    - {name: ANABRANCH_CACHE, value: /models}
    {{- with $values.model.extraEnv }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  resources:
    requests: {cpu: 250m, memory: 512Mi}
    limits: {memory: 2Gi}
  securityContext: {{- include "anabranch.containerSecurity" $root | nindent 4 }}
  volumeMounts:
    - {name: model, mountPath: /models}
    - {name: scratch, mountPath: /tmp}
{{- end -}}
{{- end -}}

{{/* The configuration file and the certificate it names, in every pod that speaks to members. */}}
{{- define "anabranch.configMounts" -}}
- {name: config, mountPath: /etc/anabranch/config, readOnly: true}
{{- if .Values.tls.existingSecret }}
- {name: tls, mountPath: /etc/anabranch/tls, readOnly: true}
{{- end }}
{{- end -}}

{{- define "anabranch.configVolumes" -}}
- name: config
  configMap: {name: {{ include "anabranch.fullname" . }}-config}
{{- with .Values.tls.existingSecret }}
- name: tls
  secret:
    secretName: {{ . }}
    defaultMode: 0440
    items: [{key: tls.crt, path: tls.crt}, {key: tls.key, path: tls.key}, {key: ca.crt, path: ca.crt}]
{{- end }}
{{- end -}}

{{/* What a role's container sees of its volumes: (root, role, readsModel). */}}
{{- define "anabranch.mounts" -}}
{{- $values := .root.Values -}}
{{ include "anabranch.configMounts" .root }}
- {name: scratch, mountPath: /tmp}
{{- if and .readsModel (ne $values.model.delivery "image") }}
- {name: model, mountPath: /models, readOnly: true}
{{- end }}
{{- if and (eq .role "gateway") $values.apiKeys.existingSecret }}
- {name: keys, mountPath: /etc/anabranch/keys, readOnly: true}
{{- end }}
{{- end -}}

{{/* A pod's volumes: (root, role, readsModel). */}}
{{- define "anabranch.volumes" -}}
{{- $values := .root.Values -}}
{{ include "anabranch.configVolumes" .root }}
- name: scratch
  emptyDir: {sizeLimit: 1Gi}
{{- if and .readsModel (ne $values.model.delivery "image") }}
- name: model
  {{- if eq $values.model.delivery "claim" }}
  persistentVolumeClaim: {claimName: {{ $values.model.claim }}, readOnly: true}
  {{- else }}
  emptyDir: {sizeLimit: {{ $values.model.fetchSpace }}}
  {{- end }}
{{- end }}
{{- if and (eq .role "gateway") $values.apiKeys.existingSecret }}
- name: keys
  secret:
    secretName: {{ $values.apiKeys.existingSecret }}
    items: [{key: {{ $values.apiKeys.key }}, path: keys.yaml}]
{{- end }}
{{- end -}}

{{/*
The pod of a role: root, role, command, ports (name -> number), service (whose health is readiness), readsModel,
pauseSeconds (before it is told to end).
*/}}
{{- define "anabranch.pod" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- $own := index $values .role -}}
metadata:
  labels: {{- include "anabranch.selector" (dict "root" $root "component" .role) | nindent 4 }}
  annotations:
    checksum/config: {{ include "anabranch.checksum" $root }}
spec:
  serviceAccountName: {{ include "anabranch.fullname" $root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add (include "anabranch.drainSeconds" $root | int64) .pauseSeconds 10 }}
  securityContext: {{- include "anabranch.podSecurity" $root | nindent 4 }}
  {{- with $values.image.pullSecrets }}
  imagePullSecrets:
  {{- range . }}
    - name: {{ . }}
  {{- end }}
  {{- end }}
  {{- with include "anabranch.scheduling" . | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with include "anabranch.modelFetch" . }}
  initContainers: {{- . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ .role }}
      image: {{ $own.image | default (include "anabranch.image" $root) }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      command: {{- toYaml .command | nindent 8 }}
      env: {{- include "anabranch.environment" . | nindent 8 }}
      ports:
        {{- range $name, $port := .ports }}
        - {name: {{ $name }}, containerPort: {{ $port }}}
        {{- end }}
      resources: {{- include "anabranch.resources" . | nindent 8 }}
      {{- include "anabranch.probes" (dict "root" $root "port" .ports.grpc "service" .service) | nindent 6 }}
      {{- if .pauseSeconds }}
      lifecycle:
        preStop:
          exec: {command: [sleep, {{ .pauseSeconds | quote }}]}
      {{- end }}
      securityContext: {{- include "anabranch.containerSecurity" $root | nindent 8 }}
      volumeMounts: {{- include "anabranch.mounts" . | nindent 8 }}
  volumes: {{- include "anabranch.volumes" . | nindent 4 }}
{{- end -}}

{{/* The command of a worker whose number is its ordinal: (root, role). */}}
{{- define "anabranch.workerCommand" -}}
{{- toYaml (list "python" "-m" (printf "workers.%s" .role) "--config" "/etc/anabranch/config/config.yaml" "--index" "$(POD_INDEX)" "--controller" (include "anabranch.controllerAddress" .root)) -}}
{{- end -}}
