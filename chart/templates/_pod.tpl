{{- /* The training pod, for a StatefulSet or a Job. */ -}}
{{- define "k8scifar.pod" -}}
metadata:
  labels:
    {{- include "k8scifar.podLabels" . | nindent 4 }}
    app.kubernetes.io/component: trainer
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    kubectl.kubernetes.io/default-container: trainer
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- if eq .Values.workload.kind "Job" }}
  subdomain: {{ include "k8scifar.fullname" . }}
  restartPolicy: Never
  {{- end }}
  serviceAccountName: {{ include "k8scifar.serviceAccount" . }}
  automountServiceAccountToken: {{ include "k8scifar.scalesDown" . }}
  enableServiceLinks: false
  {{- if .Values.hostNetwork }}
  hostNetwork: true
  # The cluster's names, where hostNetwork's default would be the machine's.
  dnsPolicy: ClusterFirstWithHostNet
  {{- end }}
  terminationGracePeriodSeconds: {{ .Values.workload.terminationGracePeriodSeconds }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .Values.schedulerName }}
  schedulerName: {{ . }}
  {{- end }}
  {{- with .Values.runtimeClassName }}
  runtimeClassName: {{ . }}
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
  initContainers:
    {{- if .Values.preflight.enabled }}
    - name: preflight
      {{- include "k8scifar.container" . | nindent 6 }}
      command: [k8scifar]
      args:
        - preflight
        {{- include "k8scifar.preflightArguments" . | nindent 8 }}
        - --config=/etc/k8scifar/train.yaml
        - --min-free={{ .Values.preflight.freeMiB }}
        {{- with dig "distributed" "interface" "" .Values.train }}
        - --interface={{ . }}
        {{- end }}
      resources:
        {{- toYaml .Values.initResources | nindent 8 }}
      volumeMounts:
        {{- include "k8scifar.mounts" . | nindent 8 }}
        - name: dataset
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
            name: {{ . }}
      {{- end }}
      # Pod 0 prepares the data set, the others wait for its copy.
      command:
        - sh
        - -c
        - |
          if [ "${JOB_COMPLETION_INDEX:-${POD_NAME##*-}}" = 0 ]; then set -- "--source=$1"; else set -- "--wait=$2"; fi
          exec k8scifar prepare --data-dir={{ include "k8scifar.dataDir" . }} "$@"
        - prepare
        - {{ .Values.dataset.source | quote }}
        - {{ .Values.dataset.waitSeconds | quote }}
      resources:
        {{- toYaml .Values.initResources | nindent 8 }}
      volumeMounts:
        {{- include "k8scifar.mounts" . | nindent 8 }}
        - name: dataset
          mountPath: /volumes/dataset
    {{- if .Values.preflight.enabled }}
    - name: preflight-data
      {{- include "k8scifar.container" . | nindent 6 }}
      command: [k8scifar]
      args:
        - preflight
        - --only-data
        {{- include "k8scifar.preflightArguments" . | nindent 8 }}
      resources:
        {{- toYaml .Values.initResources | nindent 8 }}
      volumeMounts:
        {{- include "k8scifar.mounts" . | nindent 8 }}
        - name: dataset
          mountPath: /volumes/dataset
          readOnly: true
    {{- end }}
  containers:
    - name: trainer
      {{- include "k8scifar.container" . | nindent 6 }}
      command: [k8scifar]
      args:
        - launch
        - --nnodes={{ .Values.nodes }}
        - --nproc-per-node={{ include "k8scifar.processes" . }}
        - --master-addr={{ include "k8scifar.masterAddress" . }}
        - --master-port={{ .Values.rendezvous.port }}
        - --wait={{ .Values.rendezvous.waitSeconds }}
        - --restart=always
        - --when-done={{ include "k8scifar.whenDone" . }}
        - --shutdown-timeout={{ .Values.workload.shutdownTimeoutSeconds }}
        - --first-step={{ .Values.probes.firstStepSeconds }}
        - --config=/etc/k8scifar/train.yaml
        - --data-dir={{ include "k8scifar.dataDir" . }}
        - --runs-dir={{ include "k8scifar.runsDir" . }}
      ports:
        - name: rendezvous
          containerPort: {{ .Values.rendezvous.port }}
          {{- if .Values.hostNetwork }}
          hostPort: {{ .Values.rendezvous.port }}
          {{- end }}
      startupProbe:
        {{- include "k8scifar.heartbeatProbe" . | nindent 8 }}
        periodSeconds: 5
        failureThreshold: {{ div (add .Values.probes.startupSeconds 4) 5 }}
      livenessProbe:
        {{- include "k8scifar.heartbeatProbe" . | nindent 8 }}
        periodSeconds: 15
        failureThreshold: 2
      resources:
        {{- include "k8scifar.resources" . | nindent 8 }}
      volumeMounts:
        {{- include "k8scifar.mounts" . | nindent 8 }}
        - name: dataset
          mountPath: /volumes/dataset
          readOnly: true
        {{- with .Values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ include "k8scifar.configName" . }}
    - name: dataset
      persistentVolumeClaim:
        claimName: {{ include "k8scifar.claim" (dict "root" . "key" "dataset") }}
    - name: checkpoints
      persistentVolumeClaim:
        claimName: {{ include "k8scifar.claim" (dict "root" . "key" "checkpoints") }}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ .Values.sharedMemorySize }}
    - name: tmp
      emptyDir:
        sizeLimit: {{ .Values.scratchSize }}
    {{- with .Values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{- /* The heartbeat is fresh: a file that a former container left behind is not. */ -}}
{{- define "k8scifar.heartbeatProbe" -}}
exec:
  command:
    - sh
    - -c
    - test $(( $(date +%s) - $(stat -c %Y /tmp/heartbeat || echo 0) )) -le {{ .Values.probes.livenessSeconds }}
timeoutSeconds: 5
{{- end -}}

{{- /* What every container of the training pod shares. */ -}}
{{- define "k8scifar.container" -}}
image: {{ include "k8scifar.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  {{- include "k8scifar.containerSecurity" . | nindent 2 }}
terminationMessagePolicy: FallbackToLogsOnError
env:
  - name: POD_NAME
    valueFrom:
      fieldRef:
        fieldPath: metadata.name
  - name: K8SCIFAR_HEARTBEAT
    value: /tmp/heartbeat
  {{- if eq (include "k8scifar.scalesDown" .) "true" }}
  - name: K8SCIFAR_STATEFULSET
    value: {{ include "k8scifar.workloadName" . }}
  {{- end }}
  {{- with .Values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "k8scifar.mounts" -}}
- name: config
  mountPath: /etc/k8scifar
  readOnly: true
- name: checkpoints
  mountPath: /volumes/checkpoints
- name: shm
  mountPath: /dev/shm
- name: tmp
  mountPath: /tmp
{{- end -}}

{{- define "k8scifar.preflightArguments" -}}
- --nnodes={{ .Values.nodes }}
- --master-addr={{ include "k8scifar.masterAddress" . }}
- --wait={{ .Values.rendezvous.waitSeconds }}
- --data-dir={{ include "k8scifar.dataDir" . }}
- --runs-dir={{ include "k8scifar.runsDir" . }}
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
{{- $gpus := dict .Values.gpu.resourceName .Values.gpu.perNode -}}
{{- $_ := set $resources "limits" (merge $gpus (default dict $resources.limits)) -}}
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
