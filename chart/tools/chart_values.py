"""Types and limits of the chart's values. The words for people are the comments in chart/values.yaml.

`train` is the trainer's own model, less what the chart decides itself.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from value_types import (
    HOST,
    IPV4,
    IPV6,
    LABEL,
    MOST,
    PART,
    REGISTRY,
    AbsolutePath,
    Amount,
    Annotations,
    Folder,
    Key,
    Labels,
    Named,
    NamedItem,
    NumericId,
    ResourceName,
    Seconds,
    Server,
    Size,
    rule,
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Image(Section):
    repository: Annotated[
        str,
        rule(
            rf"({REGISTRY}/)?{PART}(/{PART})*",
            "is no image's name: small letters, such as registry.example/me/k8scifar, without a scheme, a tag or a "
            "digest (they go into image.tag and image.digest)",
        ),
    ]
    tag: Annotated[
        str,
        rule(r"|[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", "is no image's tag: letters, digits, _ - and dots, such as 0.1.0"),
    ]
    digest: Annotated[str, rule(r"|sha256:[0-9a-f]{64}", "is no digest: sha256: and 64 digits or letters a to f")]
    pullPolicy: Literal["Always", "IfNotPresent", "Never"]


class PullSecret(Section):
    name: NamedItem


class CommonNfs(Section):
    server: Server
    path: AbsolutePath
    mountOptions: list[
        Annotated[
            str,
            rule(
                r"|[A-Za-z][A-Za-z0-9_.,=:/@%+-]*",
                "is no option of a mount: one word each, without spaces or -o, such as nfsvers=4.1",
            ),
        ]
    ]
    csi: bool


class Nfs(Section):
    server: Server
    path: AbsolutePath


class Local(Section):
    enabled: bool
    storageClassName: Named
    size: Size
    hostPath: AbsolutePath


class Checkpoints(Section):
    folder: Folder
    size: Size
    accessMode: Literal["ReadWriteMany", "ReadWriteOnce"]
    nfs: Nfs
    storageClassName: Named
    existingClaim: Named
    hostPath: AbsolutePath


class Dataset(Checkpoints):
    source: Annotated[
        str,
        rule(
            r"auto|cifar10(:[^\x00-\x1f]+)?|synthetic(:[1-9][0-9]{0,7}:[1-9][0-9]{0,7})?|imagefolder:[^\x00-\x1f]+",
            "is no data set that is known: use cifar10, synthetic, imagefolder:PATH, imagefolder:https://... or "
            "imagefolder:s3://...",
        ),
    ]
    credentialsSecret: Named
    s3Endpoint: Annotated[
        str,
        rule(
            rf"|https?://({HOST}|{IPV4}|\[{IPV6}\])(:[0-9]{{1,5}})?(/[^\s]*)?",
            "is no address of a server: give it with its scheme, such as http://minio.storage:9000",
        ),
    ]
    waitSeconds: Seconds


class User(Section):
    uid: int = Field(ge=1, le=MOST)
    gid: NumericId
    supplementalGroups: list[NumericId]
    fsGroup: NumericId | None


class Workload(Section):
    kind: Literal["StatefulSet", "Job"]
    labels: Labels
    annotations: Annotations
    terminationGracePeriodSeconds: Seconds
    shutdownTimeoutSeconds: Seconds


class Job(Section):
    backoffLimit: NumericId
    activeDeadlineSeconds: Seconds | None
    ttlSecondsAfterFinished: NumericId | None


class Completion(Section):
    policy: Literal["hold", "scaleDown"]


class Rendezvous(Section):
    port: int = Field(ge=1024, le=65535)
    waitSeconds: Seconds


class Elastic(Section):
    enabled: bool | None
    minNodes: int = Field(ge=1, le=1000)
    waitSeconds: Seconds
    growSeconds: Seconds


class Gpu(Section):
    enabled: bool
    perNode: int = Field(ge=1, le=64)
    resourceName: Annotated[
        str,
        rule(
            rf"|{LABEL}(\.{LABEL})*/[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?",
            "is no resource of a device plugin: such as nvidia.com/gpu",
        ),
    ]


class ResourceClaim(Section):
    name: str
    request: str = ""


class Resources(Section):
    limits: dict[ResourceName, Amount] = {}
    requests: dict[ResourceName, Amount] = {}
    claims: list[ResourceClaim] = []


class Toleration(Section):
    key: str = ""
    operator: Literal["Exists", "Equal", "Lt", "Gt"] = "Equal"
    value: str = ""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute", ""] = ""
    tolerationSeconds: int = 0


class Affinity(Section):
    nodeAffinity: dict[str, Any] = {}
    podAffinity: dict[str, list[Any]] = {}
    podAntiAffinity: dict[str, list[Any]] = {}


class PodAntiAffinity(Section):
    mode: Literal["required", "preferred", "none"]
    topologyKey: Key


class EnvironmentVariable(Section):
    name: Annotated[
        str,
        rule(r"[A-Za-z_.-][A-Za-z0-9_.-]*", "is no variable's name: letters, digits and _, no digit first"),
    ]
    value: str = ""
    valueFrom: dict[str, Any] = {}


VolumeName = Annotated[
    str,
    rule(
        r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?",
        "is no volume's name: at most 63 small letters, digits and -, a letter or digit at both ends",
    ),
]


class Mount(Section):
    name: VolumeName
    mountPath: Annotated[str, rule(r"/[^:\x00-\x1f]*", "is no path in a container: begin it with /, without a colon")]
    subPath: str = ""
    subPathExpr: str = ""
    readOnly: bool = False
    mountPropagation: str = ""


class Volume(BaseModel):
    """A pod's volume: its name and whichever of Kubernetes' many sources."""

    model_config = ConfigDict(extra="allow")
    name: VolumeName


class Preflight(Section):
    enabled: bool
    freeMiB: NumericId


class Probes(Section):
    startupSeconds: int = Field(ge=10, le=MOST)
    firstStepSeconds: Seconds
    livenessSeconds: int = Field(ge=10, le=MOST)


class Ingress(Section):
    enabled: bool
    className: Named
    host: Annotated[
        str,
        rule(
            rf"|(\*\.)?{LABEL}(\.{LABEL})*",
            "is no host name: small letters, digits, - and dots, without scheme, port or path, such as tb.example.org",
        ),
    ]
    annotations: Annotations
    tlsSecret: Named


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
    timeoutSeconds: Seconds


class Values(Section):
    nodes: int = Field(ge=1, le=1000)
    processesPerNode: int = Field(ge=1, le=64)
    train: dict[str, Any]
    image: Image
    imagePullSecrets: list[PullSecret]
    nfs: CommonNfs
    local: Local
    dataset: Dataset
    checkpoints: Checkpoints
    keepVolumes: bool
    user: User
    workload: Workload
    job: Job
    completion: Completion
    rendezvous: Rendezvous
    elastic: Elastic
    hostNetwork: bool
    clusterDomain: Annotated[
        str,
        rule(
            rf"|{LABEL}(\.{LABEL})*",
            "is no DNS domain: small letters, digits, - and dots, none at the ends, such as cluster.local",
        ),
    ]
    gpu: Gpu
    runtimeClassName: Named
    resources: Resources
    initResources: Resources
    nodeSelector: Labels
    tolerations: list[Toleration]
    affinity: Affinity
    podAntiAffinity: PodAntiAffinity
    priorityClassName: Named
    schedulerName: Named
    podLabels: Labels
    podAnnotations: Annotations
    extraEnv: list[EnvironmentVariable]
    extraVolumes: list[Volume]
    extraVolumeMounts: list[Mount]
    serviceAccountName: Named
    sharedMemorySize: Size
    scratchSize: Size
    preflight: Preflight
    probes: Probes
    tensorboard: TensorBoard
    networkPolicy: NetworkPolicy
    helmTest: HelmTest
    nameOverride: Annotated[
        str,
        rule(
            r"|[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?",
            "is no part of an object's name: at most 63 small letters, digits and -, a letter or digit at both ends",
        ),
    ]
    fullnameOverride: Annotated[
        str,
        rule(
            r"|[a-z]([-a-z0-9]{0,61}[a-z0-9])?",
            "is no name for a Service: at most 63 small letters, digits and -, a letter first, no - at the end",
        ),
    ]
    # Helm hands it to a chart that is another one's part.
    global_: dict[str, Any] = Field(default={}, alias="global")
