{{- /* Refuse additions to the training pod that would replace the chart's own parts. */ -}}
{{- define "k8scifar.validateExtras" -}}
{{- $names := list "POD_NAME" "POD_UID" "POD_NAMESPACE" "NODE_NAME" "JOB_COMPLETION_INDEX" "K8SCIFAR_RELEASE" "K8SCIFAR_HEARTBEAT" "K8SCIFAR_STATEFULSET" -}}
{{- if .Values.dataset.s3Endpoint -}}
{{- $names = append $names "AWS_ENDPOINT_URL" -}}
{{- end -}}
{{- $seen := list -}}
{{- range $index, $item := .Values.extraEnv -}}
{{- if has $item.name $names -}}
{{- fail (printf "\n\nextraEnv[%d].name %s is a variable that the chart sets: choose another name\n" $index $item.name) -}}
{{- end -}}
{{- if has $item.name $seen -}}
{{- fail (printf "\n\nextraEnv has %s twice: keep one of them\n" $item.name) -}}
{{- end -}}
{{- $seen = append $seen $item.name -}}
{{- end -}}
{{- $own := concat (list "config" "shm" "tmp") (ternary (list "local") (list "dataset" "checkpoints") .Values.local.enabled) -}}
{{- $volumes := list -}}
{{- range $index, $item := .Values.extraVolumes -}}
{{- if has $item.name $own -}}
{{- fail (printf "\n\nextraVolumes[%d].name %s is a volume of the chart (%s): choose another name\n" $index $item.name (join ", " $own)) -}}
{{- end -}}
{{- if has $item.name $volumes -}}
{{- fail (printf "\n\nextraVolumes has %s twice: keep one of them\n" $item.name) -}}
{{- end -}}
{{- $volumes = append $volumes $item.name -}}
{{- end -}}
{{- $taken := list "/etc/k8scifar" "/volumes/checkpoints" "/volumes/dataset" "/dev/shm" "/tmp" -}}
{{- $mounted := list -}}
{{- range $index, $item := .Values.extraVolumeMounts -}}
{{- $path := trimSuffix "/" $item.mountPath -}}
{{- if not (has $item.name (concat $volumes $own)) -}}
{{- fail (printf "\n\nextraVolumeMounts[%d].name %s is not a volume of extraVolumes: add it there, or correct the name\n" $index $item.name) -}}
{{- end -}}
{{- range $taken -}}
{{- if or (eq $path .) (hasPrefix (printf "%s/" $path) .) -}}
{{- fail (printf "\n\nextraVolumeMounts[%d].mountPath %s would hide %s, which the chart mounts: choose another path\n" $index $item.mountPath .) -}}
{{- end -}}
{{- end -}}
{{- if has $path $mounted -}}
{{- fail (printf "\n\nextraVolumeMounts mounts %s twice: keep one of them\n" $path) -}}
{{- end -}}
{{- $mounted = append $mounted $path -}}
{{- end -}}
{{- if and .Values.gpu.enabled (hasKey (default dict .Values.resources.limits) .Values.gpu.resourceName) -}}
{{- fail (printf "\n\nresources.limits has %s, which gpu.perNode sets: remove it there\n" .Values.gpu.resourceName) -}}
{{- end -}}
{{- end -}}
