{{- define "k8scifar.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- /* Short enough for a StatefulSet's revision label and a Job's hash to follow. */ -}}
{{- define "k8scifar.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "k8scifar.name" . -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (or (contains $name .Release.Name) (contains .Release.Name $name)) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "k8scifar.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: k8scifar
{{ include "k8scifar.selector" . }}
{{- end -}}

{{- /* Of pods: without the chart's version, so that a new chart alone does not restart a training. */ -}}
{{- define "k8scifar.podLabels" -}}
{{ include "k8scifar.selector" . }}
app.kubernetes.io/part-of: k8scifar
{{- end -}}

{{- define "k8scifar.selector" -}}
app.kubernetes.io/name: {{ include "k8scifar.name" . }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

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
{{- ternary .Values.gpu.perNode .Values.processesPerNode .Values.gpu.enabled -}}
{{- end -}}

{{- /* The trainer's configuration: `train`, whose empty name becomes the release's; with GPUs it never falls back to the CPU. */ -}}
{{- define "k8scifar.config" -}}
{{- $train := deepCopy .Values.train -}}
{{- if not $train.name -}}
{{- $_ := set $train "name" .Release.Name -}}
{{- end -}}
{{- if and .Values.gpu.enabled (not (dig "hardware" "device" "" $train)) -}}
{{- $_ := set $train "hardware" (merge (dict "device" "cuda") (default dict $train.hardware)) -}}
{{- end -}}
{{- toYaml $train -}}
{{- end -}}

{{- define "k8scifar.configName" -}}
{{- printf "%s-%s" (include "k8scifar.fullname" .) (include "k8scifar.config" . | sha256sum | trunc 10) -}}
{{- end -}}

{{- /* A StatefulSet keeps its name; a Job can't be changed, so that another pod template makes another Job. */ -}}
{{- define "k8scifar.workloadName" -}}
{{- $name := include "k8scifar.fullname" . -}}
{{- if eq .Values.workload.kind "Job" -}}
{{- $what := dict "values" (omit .Values "tensorboard" "networkPolicy" "helmTest" "keepVolumes") "version" .Chart.AppVersion -}}
{{- printf "%s-%s" $name ($what | toJson | sha256sum | trunc 8) -}}
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

{{- define "k8scifar.scalesDown" -}}
{{- and (eq .Values.completion.policy "scaleDown") (eq .Values.workload.kind "StatefulSet") -}}
{{- end -}}

{{- define "k8scifar.dataDir" -}}
/volumes/dataset/{{ .Values.dataset.folder }}
{{- end -}}

{{- define "k8scifar.runsDir" -}}
/volumes/checkpoints/{{ .Values.checkpoints.folder }}
{{- end -}}

{{- define "k8scifar.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.user.uid }}
runAsGroup: {{ .Values.user.gid }}
{{- with .Values.user.supplementalGroups }}
supplementalGroups: {{ toJson . }}
{{- end }}
{{- if kindIs "float64" .Values.user.fsGroup }}
fsGroup: {{ .Values.user.fsGroup }}
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

{{- /* Which volume source a volume's values choose: of (root, key) one of nfs, storageClass, claim,
     hostPath, commonNfs. */ -}}
{{- define "k8scifar.source" -}}
{{- $volume := index .root.Values .key -}}
{{- $chosen := list -}}
{{- if $volume.nfs.server }}{{ $chosen = append $chosen "nfs" }}{{ end -}}
{{- if $volume.storageClassName }}{{ $chosen = append $chosen "storageClass" }}{{ end -}}
{{- if $volume.existingClaim }}{{ $chosen = append $chosen "claim" }}{{ end -}}
{{- if $volume.hostPath }}{{ $chosen = append $chosen "hostPath" }}{{ end -}}
{{- if gt (len $chosen) 1 -}}
{{- $names := dict "nfs" "nfs.server" "storageClass" "storageClassName" "claim" "existingClaim" "hostPath" "hostPath" -}}
{{- $set := list -}}
{{- range $chosen }}{{ $set = append $set (printf "%s.%s" $.key (index $names .)) }}{{ end -}}
{{- fail (printf "\n\n%s are both set: a volume comes from one place; keep one of them\n" (join " and " $set)) -}}
{{- end -}}
{{- first (append $chosen "commonNfs") -}}
{{- end -}}

{{- define "k8scifar.claim" -}}
{{- default (printf "%s-%s" (include "k8scifar.fullname" .root) .key) (index .root.Values .key).existingClaim -}}
{{- end -}}

{{- define "k8scifar.volumeName" -}}
{{- printf "%s-%s-%s" .root.Release.Namespace (include "k8scifar.fullname" .root) .key -}}
{{- end -}}

{{- define "k8scifar.runDir" -}}
{{ include "k8scifar.runsDir" . }}/{{ default .Release.Name .Values.train.name }}
{{- end -}}
