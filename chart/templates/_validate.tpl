{{- /* Refuse values that do not go together, which a schema can't express. Each refusal ends with what to change. */ -}}
{{- define "k8scifar.validate" -}}
{{- $values := .Values -}}
{{- $common := list -}}
{{- include "k8scifar.validateLocal" . -}}
{{- range $key := list "dataset" "checkpoints" -}}
{{- $source := include "k8scifar.source" (dict "root" $ "key" $key) -}}
{{- $volume := index $values $key -}}
{{- if eq $source "commonNfs" -}}
  {{- $common = append $common $key -}}
  {{- if not $values.nfs.server -}}
  {{- fail (printf "\n\n%s has no volume: set nfs.server to your NFS server's address (--set nfs.server=192.168.1.10), or use a volume for each pod without a server: -f values/local.yaml (local.enabled=true); or set one of %s.storageClassName, %s.existingClaim, %s.hostPath\n" $key $key $key $key) -}}
  {{- end -}}
  {{- if not $values.nfs.path -}}
  {{- fail "\n\nnfs.server is set but nfs.path is not: set nfs.path to the exported folder\n" -}}
  {{- end -}}
{{- else if and (eq $source "nfs") (not $volume.nfs.path) -}}
  {{- fail (printf "\n\n%s.nfs.server is set but %s.nfs.path is not: set it to the exported folder\n" $key $key) -}}
{{- end -}}
{{- if and (ne $source "local") (eq $volume.accessMode "ReadWriteOnce") (gt (int $values.nodes) 1) (eq $values.podAntiAffinity.mode "required") -}}
  {{- fail (printf "\n\n%s.accessMode is ReadWriteOnce, which one machine at a time can mount, but nodes is %d: use ReadWriteMany, or set podAntiAffinity.mode=none to train on one machine\n" $key (int $values.nodes)) -}}
{{- end -}}
{{- if regexMatch "(^|/)\\.\\.(/|$)" $volume.folder -}}
  {{- fail (printf "\n\n%s.folder %q must not lead out of the volume: remove the ..\n" $key $volume.folder) -}}
{{- end -}}
{{- end -}}
{{- if and $values.nfs.server (not $common) -}}
{{- fail "\n\nnfs.server is set, but dataset and checkpoints both have another volume: remove nfs.server, or one of theirs\n" -}}
{{- end -}}
{{- $places := dict -}}
{{- range $key := list "dataset" "checkpoints" -}}
{{- $folder := printf "%s/%s/" (include "k8scifar.place" (dict "root" $ "key" $key)) (index $values $key).folder -}}
{{- $_ := set $places $key $folder -}}
{{- end -}}
{{- if or (hasPrefix $places.dataset $places.checkpoints) (hasPrefix $places.checkpoints $places.dataset) -}}
{{- fail (printf "\n\ndataset and checkpoints are in one volume (%s), and dataset.folder %s and checkpoints.folder %s overlap: give them different names\n" (include "k8scifar.place" (dict "root" . "key" "dataset")) $values.dataset.folder $values.checkpoints.folder) -}}
{{- end -}}
{{- if and $values.gpu.enabled (not $values.gpu.resourceName) -}}
{{- fail (printf "\n\ngpu.enabled with %d GPU(s) a pod, but gpu.resourceName is empty: set it to what the device plugin offers, such as nvidia.com/gpu\n" (int $values.gpu.perNode)) -}}
{{- end -}}
{{- if and $values.gpu.enabled (eq (dig "hardware" "device" "auto" $values.train) "cpu") -}}
{{- fail "\n\ngpu.enabled asks for GPUs, but train.hardware.device is cpu: change one of them\n" -}}
{{- end -}}
{{- $ranks := mul (int $values.nodes) (int (include "k8scifar.processes" .)) -}}
{{- $recipes := (.Files.Get "files/rules.json" | fromJson).recipes -}}
{{- $named := default "demo" $values.train.recipe -}}
{{- if not (hasKey $recipes $named) -}}
{{- fail (printf "\n\ntrain.recipe %q is unknown: set it to one of %s\n" $named (keys $recipes | sortAlpha | join ", ")) -}}
{{- end -}}
{{- $recipe := index $recipes $named -}}
{{- $global := int (default $recipe.global_batch $values.train.global_batch) -}}
{{- $micro := int (default $recipe.micro_batch $values.train.micro_batch) -}}
{{- if and $global $micro -}}
{{- if mod $global $micro -}}
{{- fail (printf "\n\ntrain.global_batch %d is not a multiple of train.micro_batch %d: change one of them\n" $global $micro) -}}
{{- end -}}
{{- $batches := printf "\n\ntrain.global_batch %d is %d micro-batches of %d, which %d ranks (nodes x processes) can't share" $global (div $global $micro) $micro $ranks -}}
{{- if lt (div $global $micro | int) (int $ranks) -}}
{{- fail (printf "%s: each needs one; set train.micro_batch to a divisor of %d that is at most %d, or start fewer\n" $batches $global (div $global $ranks)) -}}
{{- end -}}
{{- if and (mod (div $global $micro) $ranks) (eq (dig "distributed" "comm" "auto" $values.train) "local-sgd") -}}
{{- fail (printf "%s equally, as train.distributed.comm=local-sgd asks: choose a train.global_batch that %d divides, or another comm\n" $batches (mul $ranks $micro)) -}}
{{- end -}}
{{- end -}}
{{- with $values.workload -}}
{{- if lt (int .terminationGracePeriodSeconds) (add (int .shutdownTimeoutSeconds) 10 | int) -}}
{{- fail (printf "\n\nworkload.terminationGracePeriodSeconds %d must be at least workload.shutdownTimeoutSeconds %d + 10, or the kubelet kills a pod that is saving\n" (int .terminationGracePeriodSeconds) (int .shutdownTimeoutSeconds)) -}}
{{- end -}}
{{- if and (eq .kind "Job") $values.elastic.enabled -}}
{{- fail "\n\nelastic.enabled is for a StatefulSet: no pod of an Indexed Job may be missing; set workload.kind=StatefulSet, or elastic.enabled=false\n" -}}
{{- end -}}
{{- if and (eq .kind "Job") (eq $values.completion.policy "scaleDown") -}}
{{- fail "\n\ncompletion.policy=scaleDown is for a StatefulSet: a Job's pods end after training anyway; set it to hold\n" -}}
{{- end -}}
{{- end -}}
{{- if gt (int $values.elastic.minNodes) (int $values.nodes) -}}
{{- fail (printf "\n\nelastic.minNodes %d is more than nodes %d: lower it\n" (int $values.elastic.minNodes) (int $values.nodes)) -}}
{{- end -}}
{{- if and $values.hostNetwork (gt (int $values.nodes) 1) (ne $values.podAntiAffinity.mode "required") -}}
{{- fail (printf "\n\nhostNetwork needs podAntiAffinity.mode=required: pods on one machine would claim its port %d together\n" (int $values.rendezvous.port)) -}}
{{- end -}}
{{- $timeout := dig "distributed" "timeout_seconds" 60 $values.train | float64 -}}
{{- if le (float64 $values.probes.livenessSeconds) $timeout -}}
{{- fail (printf "\n\nprobes.livenessSeconds %d must be more than train.distributed.timeout_seconds %g: the ranks must detect a lost peer first\n" (int $values.probes.livenessSeconds) $timeout) -}}
{{- end -}}
{{- with $values.tensorboard -}}
{{- if and .ingress.enabled (not .ingress.host) -}}
{{- fail "\n\ntensorboard.ingress.enabled needs tensorboard.ingress.host\n" -}}
{{- end -}}
{{- if and .ingress.enabled (not .enabled) -}}
{{- fail "\n\ntensorboard.ingress.enabled, but tensorboard.enabled is false: set it to true\n" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Refuse what does not go with a volume for each pod. */ -}}
{{- define "k8scifar.validateLocal" -}}
{{- with .Values.local -}}
{{- if not .enabled -}}
{{- range $key := list "storageClassName" "hostPath" -}}
{{- if index $.Values.local $key -}}
{{- fail (printf "\n\nlocal.%s is set, but local.enabled is false: set it to true, or leave local.%s out\n" $key $key) -}}
{{- end -}}
{{- end -}}
{{- else if $.Values.nfs.server -}}
{{- fail "\n\nlocal.enabled and nfs.server are both set: with local.enabled each pod has its own volume for data set and checkpoints; keep one of them\n" -}}
{{- else if and .storageClassName .hostPath -}}
{{- fail "\n\nlocal.storageClassName and local.hostPath are both set: a volume comes from one place; keep one of them\n" -}}
{{- else if eq $.Values.workload.kind "Job" -}}
{{- fail "\n\nlocal.enabled is for a StatefulSet: a Job can't give each pod a claim; set workload.kind=StatefulSet (with completion.policy=scaleDown its pods end, too), or use a volume that all pods share, such as nfs.server\n" -}}
{{- else if and .hostPath (gt (int $.Values.nodes) 1) (ne $.Values.podAntiAffinity.mode "required") -}}
{{- fail (printf "\n\nlocal.hostPath needs podAntiAffinity.mode=required: pods on one machine would share its folder %s\n" .hostPath) -}}
{{- end -}}
{{- end -}}
{{- end -}}
