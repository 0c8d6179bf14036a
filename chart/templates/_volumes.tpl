{{- /* The source of a volume (root, key): local, nfs, storageClass, claim, hostPath or commonNfs. */ -}}
{{- define "k8scifar.source" -}}
{{- $volume := index .root.Values .key -}}
{{- $chosen := list -}}
{{- if $volume.nfs.server }}{{ $chosen = append $chosen "nfs" }}{{ end -}}
{{- if $volume.storageClassName }}{{ $chosen = append $chosen "storageClass" }}{{ end -}}
{{- if $volume.existingClaim }}{{ $chosen = append $chosen "claim" }}{{ end -}}
{{- if $volume.hostPath }}{{ $chosen = append $chosen "hostPath" }}{{ end -}}
{{- $names := dict "nfs" "nfs.server" "storageClass" "storageClassName" "claim" "existingClaim" "hostPath" "hostPath" -}}
{{- $set := list -}}
{{- range $chosen }}{{ $set = append $set (printf "%s.%s" $.key (index $names .)) }}{{ end -}}
{{- if and .root.Values.local.enabled $set -}}
{{- fail (printf "\n\nlocal.enabled and %s are both set: with local.enabled each pod has its own volume for data set and checkpoints; keep one of them\n" (join ", " $set)) -}}
{{- end -}}
{{- if gt (len $chosen) 1 -}}
{{- fail (printf "\n\n%s are both set: a volume comes from one place; keep one of them\n" (join " and " $set)) -}}
{{- end -}}
{{- first (append $chosen (ternary "local" "commonNfs" .root.Values.local.enabled)) -}}
{{- end -}}

{{- /* Describe where the files of a volume (root, key) are; equal texts are equal places. volumeHash contains this text:
     another wording for shared volumes would make other volumes at an upgrade. */ -}}
{{- define "k8scifar.place" -}}
{{- $volume := index .root.Values .key -}}
{{- $source := include "k8scifar.source" . -}}
{{- if eq $source "local" -}}
{{- with .root.Values.local -}}
a volume for each pod, {{ if .hostPath }}folder {{ .hostPath }} of its machine{{ else if .storageClassName }}of storage class {{ .storageClassName }}{{ else }}of the cluster's default storage class{{ end }}
{{- end -}}
{{- else if eq $source "hostPath" -}}
folder {{ $volume.hostPath }} of the machine
{{- else if eq $source "storageClass" -}}
{{ .key }}'s own of storage class {{ $volume.storageClassName }}
{{- else if eq $source "claim" -}}
claim {{ $volume.existingClaim }}
{{- else -}}
{{- $nfs := ternary .root.Values.nfs $volume.nfs (eq $source "commonNfs") -}}
NFS {{ $nfs.server }}:{{ $nfs.path }}
{{- end -}}
{{- end -}}

{{- /* A hash of what can't be changed in a volume and its claim: another address makes another volume under another name,
     and the former volume stays. */ -}}
{{- define "k8scifar.volumeHash" -}}
{{- $volume := index .root.Values .key -}}
{{- $source := include "k8scifar.source" . -}}
{{- $what := list .root.Release.Namespace (include "k8scifar.fullname" .root) .key (include "k8scifar.place" .) $volume.accessMode -}}
{{- if has $source (list "commonNfs" "nfs") -}}
{{- $what = concat $what (list .root.Values.nfs.csi (compact .root.Values.nfs.mountOptions)) -}}
{{- end -}}
{{- $what | toJson | sha256sum | trunc 8 -}}
{{- end -}}

{{- /* The claim of a volume (root, key); pod 0's if each pod has a claim. */ -}}
{{- define "k8scifar.claim" -}}
{{- $own := printf "%s-%s-%s" (include "k8scifar.fullname" .root) .key (include "k8scifar.volumeHash" .) -}}
{{- if .root.Values.local.enabled -}}
{{- $own = printf "local-%s-0" (include "k8scifar.workloadName" .root) -}}
{{- end -}}
{{- default $own (index .root.Values .key).existingClaim -}}
{{- end -}}

{{- /* The pod's volume for (root, key): with local.enabled one volume for both. */ -}}
{{- define "k8scifar.volume" -}}
{{- ternary "local" .key .root.Values.local.enabled -}}
{{- end -}}

{{- /* The size of the pods' claims. An existing StatefulSet keeps its size, because the API server refuses another. */ -}}
{{- define "k8scifar.localSize" -}}
{{- $size := ternary .Values.local.size "1Gi" (eq .Values.local.hostPath "") -}}
{{- $there := lookup "apps/v1" "StatefulSet" .Release.Namespace (include "k8scifar.workloadName" .) -}}
{{- range dig "spec" "volumeClaimTemplates" list $there -}}
{{- $size = dig "spec" "resources" "requests" "storage" $size . -}}
{{- end -}}
{{- $size -}}
{{- end -}}

{{- /* Affinity of pods that read pod 0's volume: they must be on pod 0's machine. */ -}}
{{- define "k8scifar.besidePod0" -}}
podAffinity:
  requiredDuringSchedulingIgnoredDuringExecution:
    - topologyKey: kubernetes.io/hostname
      labelSelector:
        matchLabels:
          statefulset.kubernetes.io/pod-name: {{ printf "%s-0" (include "k8scifar.workloadName" .) | quote }}
{{- end -}}

{{- /* A volume's name: at most 63 letters, and unique among the volumes of all namespaces. */ -}}
{{- define "k8scifar.volumeName" -}}
{{- $whose := printf "%s-%s" .root.Release.Namespace (include "k8scifar.fullname" .root) | trunc 42 | trimSuffix "-" -}}
{{- printf "%s-%s-%s" $whose .key (include "k8scifar.volumeHash" .) -}}
{{- end -}}

{{- /* A claim's size: a constant for NFS and folders, which have no size, because it can't be changed later. */ -}}
{{- define "k8scifar.volumeSize" -}}
{{- ternary (index .root.Values .key).size "1Gi" (eq (include "k8scifar.source" .) "storageClass") -}}
{{- end -}}

{{- /* The source of the data set; in a cluster `auto` means CIFAR-10 and never synthetic images. */ -}}
{{- define "k8scifar.dataSource" -}}
{{- ternary "cifar10" .Values.dataset.source (eq .Values.dataset.source "auto") -}}
{{- end -}}

{{- /* A folder for each source, so that no data set replaces one that another training reads. */ -}}
{{- define "k8scifar.dataDir" -}}
{{- $source := include "k8scifar.dataSource" . -}}
{{- $what := $source -}}
{{- if and .Values.dataset.s3Endpoint (hasPrefix "imagefolder:s3://" $source) -}}
{{- $what = printf "%s %s" .Values.dataset.s3Endpoint $source -}}
{{- end -}}
/volumes/dataset/{{ .Values.dataset.folder }}/{{ splitList ":" $source | first }}-{{ sha256sum $what | trunc 8 }}
{{- end -}}

{{- define "k8scifar.runsDir" -}}
/volumes/checkpoints/{{ .Values.checkpoints.folder }}
{{- end -}}

{{- define "k8scifar.runDir" -}}
{{ include "k8scifar.runsDir" . }}/{{ default .Release.Name .Values.train.name }}
{{- end -}}

{{- /* Annotations that `make results` reads after the release is uninstalled. */ -}}
{{- define "k8scifar.notes" -}}
k8scifar/run-dir: {{ include "k8scifar.runDir" . | quote }}
k8scifar/image: {{ include "k8scifar.image" . | quote }}
k8scifar/user: {{ printf "%d:%d" (int64 .Values.user.uid) (int64 .Values.user.gid) | quote }}
{{- end -}}
