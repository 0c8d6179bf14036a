{{- /* The training pod, for a StatefulSet or a Job. */ -}}
{{- define "k8scifar.pod" -}}
{{- $tries := min 20 (int64 .Values.probes.startupSeconds) -}}
metadata:
  labels:
    {{- $own := printf "%s\napp.kubernetes.io/component: trainer" (include "k8scifar.podLabels" .) }}
    {{- include "k8scifar.merged" (dict "own" $own "user" .Values.podLabels "path" "podLabels") | nindent 4 }}
  annotations:
    {{- $own = "kubectl.kubernetes.io/default-container: trainer" }}
    {{- include "k8scifar.merged" (dict "own" $own "user" .Values.podAnnotations "path" "podAnnotations") | nindent 4 }}
spec:
  {{- if eq .Values.workload.kind "Job" }}
  subdomain: {{ include "k8scifar.fullname" . | quote }}
  restartPolicy: Never
  {{- end }}
  serviceAccountName: {{ include "k8scifar.serviceAccount" . | quote }}
  automountServiceAccountToken: {{ include "k8scifar.scalesDown" . }}
  enableServiceLinks: false
  {{- if .Values.hostNetwork }}
  hostNetwork: true
  # The cluster's names, where hostNetwork's default would be the machine's.
  dnsPolicy: ClusterFirstWithHostNet
  {{- end }}
  terminationGracePeriodSeconds: {{ .Values.workload.terminationGracePeriodSeconds | int64 }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- with .Values.schedulerName }}
  schedulerName: {{ . | quote }}
  {{- end }}
  {{- with .Values.runtimeClassName }}
  runtimeClassName: {{ . | quote }}
  {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "k8scifar.affinity" . | fromYaml }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- include "k8scifar.podSecurity" . | nindent 4 }}
  # No init container waits for another pod: a rolling upgrade replaces the next pod when this one is Ready. The trainer
  # waits for its peers and is Ready meanwhile.
  initContainers:
    {{- if .Values.preflight.enabled }}
    - name: preflight
      {{- include "k8scifar.container" . | nindent 6 }}
      args:
        - preflight
        - {{ printf "--data-dir=%s" (include "k8scifar.dataDir" .) | quote }}
        - {{ printf "--runs-dir=%s" (include "k8scifar.runsDir" .) | quote }}
        - --min-free={{ .Values.preflight.freeMiB | int64 }}
        {{- with dig "distributed" "interface" "" .Values.train }}
        - {{ printf "--interface=%s" . | quote }}
        {{- end }}
      resources:
        {{- toYaml .Values.initResources | nindent 8 }}
      volumeMounts:
        {{- include "k8scifar.mounts" . | nindent 8 }}
        - name: {{ include "k8scifar.volume" (dict "root" . "key" "dataset") }}
          mountPath: /volumes/dataset
    {{- end }}
    - name: prepare
      {{- include "k8scifar.container" . | nindent 6 }}
        {{- with .Values.dataset.s3Endpoint }}
        - name: AWS_ENDPOINT_URL
          value: {{ . | quote }}
        {{- end }}
      {{- with .Values.dataset.credentialsSecret }}
      envFrom:
        - secretRef:
            name: {{ . | quote }}
      {{- end }}
      # tini is process 1 and passes SIGTERM on, which a process 1 without a handler ignores.
      command:
        - tini
        - --
        - sh
        - -c
        - |
          if [ "${JOB_COMPLETION_INDEX:-${POD_NAME##*-}}" != 0 ]; then echo "pod 0 prepares the data set"; exit 0; fi
          exec k8scifar prepare "$@"
        - prepare
      args:
        - {{ printf "--data-dir=%s" (include "k8scifar.dataDir" .) | quote }}
        - {{ printf "--source=%s" (include "k8scifar.dataSource" .) | quote }}
      resources:
        {{- toYaml .Values.initResources | nindent 8 }}
      volumeMounts:
        {{- include "k8scifar.mounts" . | nindent 8 }}
        - name: {{ include "k8scifar.volume" (dict "root" . "key" "dataset") }}
          mountPath: /volumes/dataset
  containers:
    - name: trainer
      {{- include "k8scifar.container" . | nindent 6 }}
      args:
        - launch
        - --nnodes={{ .Values.nodes | int64 }}
        - --nproc-per-node={{ include "k8scifar.processes" . }}
        - --master-addr={{ include "k8scifar.masterAddress" . }}
        - --master-port={{ .Values.rendezvous.port | int64 }}
        - --wait={{ .Values.rendezvous.waitSeconds | int64 }}
        {{- if eq (include "k8scifar.isElastic" .) "true" }}
        - --min-nodes={{ .Values.elastic.minNodes | int64 }}
        - --elastic-wait={{ .Values.elastic.waitSeconds | int64 }}
        - --elastic-grow={{ .Values.elastic.growSeconds | int64 }}
        {{- end }}
        - --data-wait={{ .Values.dataset.waitSeconds | int64 }}
        - --restart=always
        - --when-done={{ include "k8scifar.whenDone" . }}
        - --shutdown-timeout={{ .Values.workload.shutdownTimeoutSeconds | int64 }}
        - --first-step={{ .Values.probes.firstStepSeconds | int64 }}
        - --config=/etc/k8scifar/train.yaml
        - {{ printf "--data-dir=%s" (include "k8scifar.dataDir" .) | quote }}
        - {{ printf "--runs-dir=%s" (include "k8scifar.runsDir" .) | quote }}
      ports:
        - name: rendezvous
          containerPort: {{ .Values.rendezvous.port | int64 }}
          {{- if .Values.hostNetwork }}
          hostPort: {{ .Values.rendezvous.port | int64 }}
          {{- end }}
      # The probe waits in the container, so that an ordinary start causes no events of failed probes.
      startupProbe:
        exec:
          command:
            - sh
            - -c
            - |
              {{- include "k8scifar.fresh" . | nindent 14 }}
              for second in $(seq {{ $tries }}); do if fresh; then exit 0; fi; sleep 1; done
              echo "no heartbeat yet"; exit 1
        periodSeconds: 5
        timeoutSeconds: {{ add $tries 5 }}
        failureThreshold: {{ div (add (int64 .Values.probes.startupSeconds) $tries -1) $tries }}
      livenessProbe:
        exec:
          command:
            - sh
            - -c
            - |
              {{- include "k8scifar.fresh" . | nindent 14 }}
              fresh || { echo "no heartbeat for {{ .Values.probes.livenessSeconds | int64 }} s"; exit 1; }
        timeoutSeconds: 5
        periodSeconds: 15
        failureThreshold: 2
      resources:
        {{- include "k8scifar.resources" . | nindent 8 }}
      volumeMounts:
        {{- include "k8scifar.mounts" . | nindent 8 }}
        - name: {{ include "k8scifar.volume" (dict "root" . "key" "dataset") }}
          mountPath: /volumes/dataset
          {{- if not .Values.local.enabled }}
          readOnly: true
          {{- end }}
        {{- with .Values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ include "k8scifar.configName" . | quote }}
    {{- if not .Values.local.enabled }}
    - name: dataset
      persistentVolumeClaim:
        claimName: {{ include "k8scifar.claim" (dict "root" . "key" "dataset") | quote }}
    - name: checkpoints
      persistentVolumeClaim:
        claimName: {{ include "k8scifar.claim" (dict "root" . "key" "checkpoints") | quote }}
    {{- end }}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ .Values.sharedMemorySize | quote }}
    - name: tmp
      emptyDir:
        sizeLimit: {{ .Values.scratchSize | quote }}
    {{- with .Values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{- /* A shell function: whether the heartbeat is fresh. The file may be a former container's. */ -}}
{{- define "k8scifar.fresh" -}}
fresh() { test $(( $(date +%s) - $(stat -c %Y /tmp/heartbeat 2>/dev/null || echo 0) )) -le {{ .Values.probes.livenessSeconds | int64 }}; }
{{- end -}}

{{- /* What all containers of the training pod share. */ -}}
{{- define "k8scifar.container" -}}
image: {{ include "k8scifar.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  {{- include "k8scifar.containerSecurity" . | nindent 2 }}
terminationMessagePolicy: FallbackToLogsOnError
env:
  - name: POD_NAME
    valueFrom:
      fieldRef:
        fieldPath: metadata.name
  - name: POD_UID
    valueFrom:
      fieldRef:
        fieldPath: metadata.uid
  - name: POD_NAMESPACE
    valueFrom:
      fieldRef:
        fieldPath: metadata.namespace
  - name: NODE_NAME
    valueFrom:
      fieldRef:
        fieldPath: spec.nodeName
  # The owner of the run folders.
  - name: K8SCIFAR_RELEASE
    value: {{ printf "%s/%s" .Release.Namespace .Release.Name | quote }}
  - name: K8SCIFAR_HEARTBEAT
    value: /tmp/heartbeat
  {{- if eq (include "k8scifar.scalesDown" .) "true" }}
  - name: K8SCIFAR_STATEFULSET
    value: {{ include "k8scifar.workloadName" . | quote }}
  {{- end }}
  {{- with .Values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "k8scifar.mounts" -}}
- name: config
  mountPath: /etc/k8scifar
  readOnly: true
- name: {{ include "k8scifar.volume" (dict "root" . "key" "checkpoints") }}
  mountPath: /volumes/checkpoints
- name: shm
  mountPath: /dev/shm
- name: tmp
  mountPath: /tmp
{{- end -}}

{{- define "k8scifar.whenDone" -}}
{{- if eq .Values.workload.kind "Job" -}}
exit
{{- else if eq .Values.completion.policy "scaleDown" -}}
scale-down
{{- else -}}
hold
{{- end -}}
{{- end -}}

{{- define "k8scifar.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- if .Values.gpu.enabled -}}
{{- $limits := merge (dict .Values.gpu.resourceName (.Values.gpu.perNode | int64 | toString)) (default dict $resources.limits) -}}
{{- $_ := set $resources "limits" $limits -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "k8scifar.affinity" -}}
{{- $affinity := deepCopy .Values.affinity -}}
{{- $mode := .Values.podAntiAffinity.mode -}}
{{- if ne $mode "none" -}}
{{- $labels := merge (dict "app.kubernetes.io/component" "trainer") (include "k8scifar.selector" . | fromYaml) -}}
{{- $term := dict "topologyKey" .Values.podAntiAffinity.topologyKey "labelSelector" (dict "matchLabels" $labels) -}}
{{- $apart := default dict $affinity.podAntiAffinity -}}
{{- if eq $mode "required" -}}
{{- $key := "requiredDuringSchedulingIgnoredDuringExecution" -}}
{{- $_ := set $apart $key (append (default list (index $apart $key)) $term) -}}
{{- else -}}
{{- $key := "preferredDuringSchedulingIgnoredDuringExecution" -}}
{{- $_ := set $apart $key (append (default list (index $apart $key)) (dict "weight" 100 "podAffinityTerm" $term)) -}}
{{- end -}}
{{- $_ := set $affinity "podAntiAffinity" $apart -}}
{{- end -}}
{{- toYaml $affinity -}}
{{- end -}}
