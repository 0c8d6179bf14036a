"""What a text, an amount or a name among the chart's values may look like.

A form is a `rule`: its pattern goes into chart/files/rules.yaml with a sentence, since of a pattern in the schema Helm
prints the pattern.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

# What Kubernetes takes for a number of seconds, pods or the like: 32 bits.
MOST = 2**31 - 1
LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
HOST = r"([A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9])?\.)*([A-Za-z0-9][A-Za-z0-9-]*)?[A-Za-z]([A-Za-z0-9-]*[A-Za-z0-9])?"
BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
IPV4 = rf"({BYTE}\.){{3}}{BYTE}"
IPV6 = r"[0-9A-Fa-f]{0,4}(:[0-9A-Fa-f]{0,4}){2,7}(\.[0-9]+){0,3}"
PART = r"[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*"
REGISTRY = rf"({HOST}|{IPV4}|\[{IPV6}\])(:[0-9]{{1,5}})?"
KEY = rf"({LABEL}(\.{LABEL})*/)?[A-Za-z0-9]([A-Za-z0-9_.-]{{0,61}}[A-Za-z0-9])?"
AMOUNT = r"[0-9]+(\.[0-9]+)?"


def rule(pattern: str, words: str) -> Any:
    """What a text must match (Go's regular expressions), and how the refusal of another goes on after the text."""
    return Field(json_schema_extra={"x-rule": {"pattern": f"^({pattern})$", "words": words}})


Server = Annotated[
    str,
    rule(
        rf"|{HOST}|{IPV4}|{IPV6}",
        "is no host name or IP address: give the server alone, without scheme, port, path, brackets or spaces "
        "(the exported folder goes into path)",
    ),
]
AbsolutePath = Annotated[
    str,
    rule(
        r"|/|(/[^/\x00-\x1f\x7f]*[^/\x00-\x20\x7f.][^/\x00-\x1f\x7f]*|/\.[^/\x00-\x1f\x7f.][^/\x00-\x1f\x7f]*)+/?",
        "is no folder's whole path: begin it with /, without .. in it (/srv/k8scifar)",
    ),
]
Folder = Annotated[
    str,
    rule(
        r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*",
        "is no folder in the volume: letters, digits, dots, _ and - (it must not lead out of the volume: no .., no / "
        "before it)",
    ),
]
Named = Annotated[
    str,
    rule(
        rf"|{LABEL}(\.{LABEL})*",
        "is no name that Kubernetes allows: small letters, digits, - and dots, a letter or digit at both ends",
    ),
]
# A name that must be there.
NamedItem = Annotated[
    str,
    rule(
        rf"{LABEL}(\.{LABEL})*",
        "is no name that Kubernetes allows: small letters, digits, - and dots, a letter or digit at both ends",
    ),
]
Size = Annotated[
    str,
    rule(
        r"(0*[1-9][0-9]*(\.[0-9]+)?|0+\.0*[1-9][0-9]*)(k|[MGTPE]|[KMGTPE]i)|[1-9][0-9]{5,}",
        "is no size: give a number above 0 and a unit, such as 512Mi or 5Gi",
    ),
]
Quantity = Annotated[
    str,
    rule(
        rf"{AMOUNT}(m|k|[MGTPE]|[KMGTPE]i|[eE][0-9]+)?",
        "is no amount of a resource: give a number, with a unit if need be, such as 500m, 2 or 6Gi",
    ),
]
Amount = Quantity | Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0)]
ResourceName = Annotated[
    str,
    rule(
        rf"cpu|memory|ephemeral-storage|hugepages-{AMOUNT}[KMGT]?i?|{LABEL}(\.{LABEL})*/[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?",
        "is no resource: cpu, memory, ephemeral-storage, hugepages-2Mi, or a device's such as nvidia.com/gpu",
    ),
]
Key = Annotated[
    str, rule(KEY, "is no key of a label or annotation: letters, digits, - _ and dots, such as team or my.org/team")
]
LabelText = Annotated[
    str,
    rule(
        r"|[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?",
        "is no value of a label: at most 63 letters, digits, - _ and dots, a letter or digit at both ends",
    ),
]
Labels = dict[Key, LabelText]
Annotations = dict[Key, str]
Seconds = Annotated[int, Field(ge=1, le=MOST)]
NumericId = Annotated[int, Field(ge=0, le=MOST)]


# Of the trainer's own texts, those of which its schema has a pattern only: in a chart a sentence is wanted.
TRAINER_RULES = {
    "name": {
        "pattern": r"^(|[A-Za-z0-9_][A-Za-z0-9_.-]*)$",
        "words": "is no name of a run: letters, digits, dots, _ and -, a letter, digit or _ first (its folder has it)",
    },
    "distributed.interface": {
        "pattern": r"^[A-Za-z0-9_.@:-]*$",
        "words": "is no network interface: one name, such as eth0, or nothing to have it chosen",
    },
}
