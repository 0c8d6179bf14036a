"""Types and limits of the chart's values. The words for people are the comments in chart/values.yaml.

`train` is the trainer's own model, less what the chart decides itself.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$", max_length=52)]
Folder = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]*$")]
AbsolutePath = Annotated[str, Field(pattern=r"^(/.*)?$")]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?)?$")]
Amount = Quantity | Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0)]
Labels = dict[str, str]
NumericId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Image(Section):
    repository: str = Field(min_length=1)
    tag: str = Field(pattern=r"^[A-Za-z0-9_.-]*$")
    digest: str = Field(pattern=r"^(sha256:[0-9a-f]{64})?$")
    pullPolicy: Literal["Always", "IfNotPresent", "Never"]


class PullSecret(Section):
    name: str = Field(min_length=1)


class CommonNfs(Section):
    server: str
    path: AbsolutePath
    mountOptions: list[str]
    csi: bool


class Nfs(Section):
    server: str
    path: AbsolutePath


class Checkpoints(Section):
    folder: Folder
    size: Quantity
    accessMode: Literal["ReadWriteMany", "ReadWriteOnce"]
    nfs: Nfs
    storageClassName: str
    existingClaim: str
    hostPath: AbsolutePath


class Dataset(Checkpoints):
    source: str = Field(pattern=r"^(auto|cifar10(:.+)?|synthetic(:[0-9]+:[0-9]+)?|imagefolder:.+)$")
    credentialsSecret: str
    s3Endpoint: str = Field(pattern=r"^(https?://.+)?$")
    waitSeconds: int = Field(ge=1)


class User(Section):
    uid: int = Field(ge=1, le=2**31 - 1)
    gid: NumericId
    supplementalGroups: list[NumericId]
    fsGroup: NumericId | None


class Workload(Section):
    kind: Literal["StatefulSet", "Job"]
    labels: Labels
    annotations: Labels
    terminationGracePeriodSeconds: int = Field(ge=1)
    shutdownTimeoutSeconds: int = Field(ge=1)


class Job(Section):
    backoffLimit: int = Field(ge=0)
    activeDeadlineSeconds: Annotated[int, Field(ge=1)] | None
    ttlSecondsAfterFinished: NumericId | None


class Completion(Section):
    policy: Literal["hold", "scaleDown"]


class Rendezvous(Section):
    port: int = Field(ge=1024, le=65535)
    waitSeconds: int = Field(ge=1)


class Gpu(Section):
    enabled: bool
    perNode: int = Field(ge=1, le=64)
    resourceName: str


class ResourceClaim(Section):
    name: str
    request: str = ""


class Resources(Section):
    limits: dict[str, Amount] = {}
    requests: dict[str, Amount] = {}
    claims: list[ResourceClaim] = []


class Toleration(Section):
    key: str = ""
    operator: Literal["Exists", "Equal", "Lt", "Gt"] = "Equal"
    value: str = ""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute", ""] = ""
    tolerationSeconds: int = 0


class Affinity(Section):
    nodeAffinity: dict[str, Any] = {}
    podAffinity: dict[str, Any] = {}
    podAntiAffinity: dict[str, Any] = {}


class PodAntiAffinity(Section):
    mode: Literal["required", "preferred", "none"]
    topologyKey: str = Field(min_length=1)


class EnvironmentVariable(Section):
    name: str = Field(min_length=1)
    value: str = ""
    valueFrom: dict[str, Any] = {}


class Mount(Section):
    name: str = Field(min_length=1)
    mountPath: str = Field(min_length=1)
    subPath: str = ""
    subPathExpr: str = ""
    readOnly: bool = False
    mountPropagation: str = ""


class Volume(BaseModel):
    """A pod's volume: its name and whichever of Kubernetes' many sources."""

    model_config = ConfigDict(extra="allow")
    name: str = Field(min_length=1)


class Preflight(Section):
    enabled: bool
    freeMiB: int = Field(ge=0)


class Probes(Section):
    startupSeconds: int = Field(ge=10)
    firstStepSeconds: int = Field(ge=1)
    livenessSeconds: int = Field(ge=10)


class Ingress(Section):
    enabled: bool
    className: str
    host: str
    annotations: Labels
    tlsSecret: str


class TensorBoard(Section):
    enabled: bool
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"]
    port: int = Field(ge=1, le=65535)
    resources: Resources
    nodeSelector: Labels
    tolerations: list[Toleration]
    ingress: Ingress


class NetworkPolicy(Section):
    enabled: bool
    tensorboardFrom: list[dict[str, Any]]


class HelmTest(Section):
    timeoutSeconds: int = Field(ge=1)


class Values(Section):
    nodes: int = Field(ge=1, le=1000)
    processesPerNode: int = Field(ge=1, le=64)
    train: dict[str, Any]
    image: Image
    imagePullSecrets: list[PullSecret]
    nfs: CommonNfs
    dataset: Dataset
    checkpoints: Checkpoints
    keepVolumes: bool
    user: User
    workload: Workload
    job: Job
    completion: Completion
    rendezvous: Rendezvous
    hostNetwork: bool
    clusterDomain: str = Field(pattern=r"^[a-z0-9.-]*$")
    gpu: Gpu
    runtimeClassName: str
    resources: Resources
    initResources: Resources
    nodeSelector: Labels
    tolerations: list[Toleration]
    affinity: Affinity
    podAntiAffinity: PodAntiAffinity
    priorityClassName: str
    schedulerName: str
    podLabels: Labels
    podAnnotations: Labels
    extraEnv: list[EnvironmentVariable]
    extraVolumes: list[Volume]
    extraVolumeMounts: list[Mount]
    serviceAccountName: str
    sharedMemorySize: Quantity
    scratchSize: Quantity
    preflight: Preflight
    probes: Probes
    tensorboard: TensorBoard
    networkPolicy: NetworkPolicy
    helmTest: HelmTest
    nameOverride: Name
    fullnameOverride: Name
