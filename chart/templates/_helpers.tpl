{{- define "k8scifar.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ default $.Chart.AppVersion .tag }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Training processes in each pod. */ -}}
{{- define "k8scifar.processes" -}}
{{- ternary .Values.gpu.perNode .Values.processesPerNode .Values.gpu.enabled | int64 -}}
{{- end -}}

{{- /* The trainer's configuration: `train` with the release's name as default, and with GPUs never the CPU. */ -}}
{{- define "k8scifar.config" -}}
{{- $train := deepCopy .Values.train -}}
{{- if not $train.name -}}
{{- $_ := set $train "name" .Release.Name -}}
{{- end -}}
{{- if and .Values.gpu.enabled (not (dig "hardware" "device" "" $train)) -}}
{{- $_ := set $train "hardware" (merge (dict "device" "cuda") (default dict $train.hardware)) -}}
{{- end -}}
{{- if .Values.local.enabled -}}
{{- $_ := set $train "distributed" (merge (dict "storage" "local") (default dict $train.distributed)) -}}
{{- end -}}
{{- toYaml $train -}}
{{- end -}}

{{- define "k8scifar.scalesDown" -}}
{{- and (eq .Values.completion.policy "scaleDown") (eq .Values.workload.kind "StatefulSet") -}}
{{- end -}}

{{- /* Whether training goes on without a machine that has been away for long. */ -}}
{{- define "k8scifar.isElastic" -}}
{{- $wanted := .Values.elastic.enabled -}}
{{- if kindIs "invalid" $wanted -}}
{{- $wanted = and (ne .Values.workload.kind "Job") (gt (int .Values.nodes) 1) -}}
{{- end -}}
{{ $wanted }}
{{- end -}}

{{- define "k8scifar.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.user.uid | int64 }}
runAsGroup: {{ .Values.user.gid | int64 }}
{{- with .Values.user.supplementalGroups }}
supplementalGroups:
  {{- range . }}
  - {{ . | int64 }}
  {{- end }}
{{- end }}
{{- /* A storage class may make a folder that belongs to root. */}}
{{- $group := ternary .Values.user.gid .Values.user.fsGroup (and .Values.local.enabled (kindIs "invalid" .Values.user.fsGroup)) }}
{{- if not (kindIs "invalid" $group) }}
fsGroup: {{ $group | int64 }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "k8scifar.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}
