{{- define "k8scifar.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- /* The objects' name: a DNS-1035 label of at most 40 letters, because a StatefulSet's revision and a Job's hash follow
     it. It is the release's name, followed by the chart's unless one contains the other. A hash makes it unique if it is
     not such a label, is too long, or may be another release's name. */ -}}
{{- define "k8scifar.fullname" -}}
{{- $chart := include "k8scifar.name" . -}}
{{- $release := .Release.Name -}}
{{- $stem := trimSuffix (printf "-%s" $chart) $release -}}
{{- $twin := and (ne $stem $release) (not (contains $chart $stem)) (not (contains $stem $chart)) -}}
{{- $wanted := ternary $release (printf "%s-%s" $release $chart) (or (contains $chart $release) (contains $release $chart)) -}}
{{- if .Values.fullnameOverride -}}
{{- $wanted = .Values.fullnameOverride -}}
{{- $twin = false -}}
{{- end -}}
{{- $legal := $wanted | replace "." "-" -}}
{{- if not (regexMatch "^[a-z]" $legal) -}}
{{- $legal = printf "r%s" $legal -}}
{{- end -}}
{{- $taken := regexMatch "-(tensorboard|status|[0-9a-f]{8})$" $legal -}}
{{- if or (ne $legal $wanted) (gt (len $legal) 40) (and (or $twin $taken) (not .Values.fullnameOverride)) -}}
{{- $hash := printf "%s %s" $release $wanted | sha256sum | trunc 8 -}}
{{- $legal = printf "%s-%s" ($legal | trunc 31 | trimSuffix "-") $hash -}}
{{- end -}}
{{- $legal -}}
{{- end -}}

{{- define "k8scifar.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
app.kubernetes.io/part-of: k8scifar
{{ include "k8scifar.selector" . }}
{{- end -}}

{{- /* Labels of pods, without the chart's version, so that a new chart alone does not restart a training. */ -}}
{{- define "k8scifar.podLabels" -}}
{{ include "k8scifar.selector" . }}
app.kubernetes.io/part-of: k8scifar
{{- end -}}

{{- define "k8scifar.selector" -}}
app.kubernetes.io/name: {{ include "k8scifar.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- /* Labels and annotations of the StatefulSet or Job. */ -}}
{{- define "k8scifar.workloadMetadata" -}}
labels:
  {{- $own := printf "%s\napp.kubernetes.io/component: trainer" (include "k8scifar.labels" .) }}
  {{- include "k8scifar.merged" (dict "own" $own "user" .Values.workload.labels "path" "workload.labels") | nindent 2 }}
annotations:
  {{- $own = printf "k8scifar/run-dir: %s" (include "k8scifar.runDir" . | quote) }}
  {{- include "k8scifar.merged" (dict "own" $own "user" .Values.workload.annotations "path" "workload.annotations") | nindent 2 }}
{{- end -}}

{{- define "k8scifar.configName" -}}
{{- printf "%s-%s" (include "k8scifar.fullname" .) (include "k8scifar.config" . | sha256sum | trunc 10) -}}
{{- end -}}

{{- /* The name of the StatefulSet or Job. What can't be changed gets another name with another value: a StatefulSet's
     claim template, and a whole Job. */ -}}
{{- define "k8scifar.workloadName" -}}
{{- $name := include "k8scifar.fullname" . -}}
{{- if eq .Values.workload.kind "Job" -}}
{{- $what := dict "values" (omit .Values "_whole" "tensorboard" "networkPolicy" "helmTest" "keepVolumes") "version" .Chart.AppVersion -}}
{{- printf "%s-%s" $name ($what | toJson | sha256sum | trunc 8) -}}
{{- else if .Values.local.enabled -}}
{{- printf "%s-%s" $name (list .Values.local.storageClassName .Values.local.hostPath | toJson | sha256sum | trunc 8) -}}
{{- else -}}
{{- $name -}}
{{- end -}}
{{- end -}}

{{- define "k8scifar.masterAddress" -}}
{{- $domain := ternary (printf ".%s" .Values.clusterDomain) "" (ne .Values.clusterDomain "") -}}
{{- printf "%s-0.%s.%s.svc%s" (include "k8scifar.workloadName" .) (include "k8scifar.fullname" .) .Release.Namespace $domain -}}
{{- end -}}

{{- define "k8scifar.serviceAccount" -}}
{{- if eq (include "k8scifar.scalesDown" .) "true" -}}
{{ include "k8scifar.fullname" . }}
{{- else -}}
{{ default "default" .Values.serviceAccountName }}
{{- end -}}
{{- end -}}
